"""Settings that every test shares: CPU, eight virtual devices, one compilation cache for all workers."""

import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
cache = os.path.join(tempfile.gettempdir(), "maxlm-test-compilation-cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.fixture(scope="module")
def quick_compile():
    """For modules that compile much and run little: XLA leaves most optimisations out, in half the time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> str:
    """A tokenizer of 400 tokens, trained on help texts that every Python carries."""
    from pydoc_data.topics import topics

    from maxlm.config import TokenizerConfig
    from maxlm.tokenizer.train import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    train_tokenizer(TokenizerConfig(kind="tokenizer", input=str(text), output=str(folder / "out"), vocab_size=400))
    return str(folder / "out")


@pytest.fixture(scope="session")
def tiny_data_folder(tmp_path_factory, tiny_tokenizer_folder) -> str:
    """Packed rows of 32 tokens, with some held out, by the real build."""
    from pydoc_data.topics import topics

    from maxlm.config import DataConfig
    from maxlm.data.build import build_data

    folder = tmp_path_factory.mktemp("tiny_data")
    for name in sorted(topics)[:12]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    build_data(
        DataConfig(
            kind="data",
            output=str(folder / "out"),
            tokenizer=tiny_tokenizer_folder,
            sources=[{"uri": f"{folder}/*.txt", "split_on_blank_lines": 400}],
            valid_fraction=0.2,
            row_length=32,
            workers=1,
        )
    )
    return str(folder / "out")
