"""Shared test settings: CPU, eight virtual devices, one compilation cache for all workers, slow tests."""

import os
import tempfile
from pathlib import Path

import pytest
from xla_flags import flags_of

os.environ["JAX_PLATFORMS"] = "cpu"
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = flags_of(devices=8)
# Threads of XLA, as maxlm.runtime.platform.use_virtual_devices sets them.
os.environ.setdefault("NPROC", "32")
cache = os.path.join(tempfile.gettempdir(), "maxlm-test-compilation-cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


# Files that take more than six seconds on two cores without AVX-512; `make test-fast` skips them.
SLOW_FILES = """
    checkpoint/test_checkpoint checkpoint/test_checksums checkpoint/test_kill_points checkpoint/test_sharded_restore
    checkpoint/test_storage_faults core/test_parameters data/test_build data/test_embedded eval/test_eval_cli
    export/test_bundle export/test_export export/test_resize feedback/test_feedback fuzz/test_fuzz_values
    gcp/test_gcp_client gcp/test_gcp_commands generate/test_engine generate/test_model generate/test_sampling
    models/test_adapters models/test_context_mesh models/test_decoder models/test_moe models/test_pipeline_stages
    models/test_prediction_modules multi/test_elastic multi/test_lost_processes multi/test_rollback
    multi/test_sampling_processes objectives/test_adapter_kinds objectives/test_ai_feedback
    objectives/test_chat_template objectives/test_distill objectives/test_distill_chat objectives/test_environments
    objectives/test_invariance objectives/test_judged_reward objectives/test_mesh objectives/test_multi_token
    objectives/test_online_preference objectives/test_opening objectives/test_policy
    objectives/test_policy_pretraining objectives/test_ppo objectives/test_preferences
    objectives/test_process_reward objectives/test_rlhf_chain objectives/test_rollouts objectives/test_safe_rlhf
    objectives/test_sampler objectives/test_sft objectives/test_stages objectives/test_unpaired_preference
    ops/test_attention ops/test_context ops/test_eight_bit ops/test_flash_tpu_compile ops/test_loss
    ops/test_mixture_of_experts ops/test_qtensor optim/test_ema optim/test_optimizers optim/test_transfer
    quickstart/test_questions runtime/test_bounded runtime/test_peers runtime/test_supervise
    scoring/test_chat_endpoint serve/test_answer_forms serve/test_chat_models serve/test_http
    serve/test_openai_client serve/test_page_in_browser serve/test_serve_cli serve/test_served_adapters sweep/test_sweep
    tokenizer/test_extend train/test_faults train/test_moe_run train/test_resume train/test_runs train/test_step
    train/test_training verify/test_planted_bugs verify/test_verified_adapters verify/test_verify
"""


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    slow = {tests / f"{name}.py" for name in SLOW_FILES.split()}
    assert all(path.is_file() for path in slow), "SLOW_FILES names a file that does not exist"
    for item in items:
        if item.path in slow:
            item.add_marker(pytest.mark.slow)
    # Slow files first, so that no worker still has a long one when the others are done.
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> str:
    """A tokenizer of 400 tokens, trained on the help texts of every Python installation."""
    from pydoc_data.topics import topics

    from maxlm.config import TokenizerConfig
    from maxlm.tokenizer.train import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    train_tokenizer(TokenizerConfig(kind="tokenizer", input=str(text), output=str(folder / "out"), vocab_size=400))
    return str(folder / "out")


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory) -> Path:
    """A tiny Qwen 3 with a tokenizer, as transformers writes them."""
    from family_cases import CASES
    from family_comparison import write_folder
    from tokenizer_kinds import KINDS

    from maxlm.tokenizer.codec import Tokenizer

    folder = tmp_path_factory.mktemp("qwen3")
    KINDS["byte-level BPE"](folder)
    write_folder(folder, CASES["qwen3"] | {"vocab_size": Tokenizer.load(folder).vocab_size})
    return folder


@pytest.fixture(scope="session")
def imported_run(tmp_path_factory, huggingface_folder) -> Path:
    """The same model as a run folder."""
    from maxlm.export.importing import import_huggingface

    run = tmp_path_factory.mktemp("imported") / "run"
    import_huggingface(huggingface_folder, run)
    return run


@pytest.fixture(scope="session")
def tiny_data_folder(tmp_path_factory, tiny_tokenizer_folder) -> str:
    """Packed rows of 32 tokens, some held out, from a real build."""
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
