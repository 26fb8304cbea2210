"""The bundle on disk, and the quantized model in memory."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxlm.core.tree import flatten
from maxlm.errors import CheckFailed, CheckpointError
from maxlm.interop.int8 import load_bundle, write_bundle
from maxlm.models import quantized as quantized_module
from maxlm.models.quantized import check_quantized, quantize_model
from maxlm.ops.qtensor import QTensor
from tests.export.conftest import draw_model, small_config

SHAPES = [
    {},
    {"tie_embeddings": False},
    {"qk_norm": True, "window_pattern": (None, 5)},
    {"attention_soft_cap": 20.0, "logit_soft_cap": 15.0},
]


@jax.jit
def logits_of(model, tokens):
    return model.logits(model(tokens).hidden_BLD)


def leaves(model):
    return jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, QTensor))


class TestQuantizedModel:
    @pytest.mark.parametrize("changes", SHAPES)
    def test_all_matrices_and_no_norms_are_quantized(self, changes):
        model = draw_model(small_config(vocab_size=50, **changes))
        quantized = leaves(quantize_model(model))
        num_matrices = sum("norm" not in path for path in flatten(model))
        assert sum(isinstance(leaf, QTensor) for leaf in quantized) == num_matrices
        # The seven of each position of the pattern, and the tables.
        assert num_matrices == 7 * len(changes.get("window_pattern", (None,))) + 1 + ("tie_embeddings" in changes)
        for leaf in quantized:
            if isinstance(leaf, QTensor):
                assert leaf.values.dtype == jnp.int8
                assert leaf.scales.shape == leaf.values.shape[:-1]
                assert (np.abs(leaf.values).max(axis=-1) == 127).all()
            else:
                assert leaf.dtype == jnp.float32

    def test_matrix_left_in_float_raises(self, monkeypatch):
        model = draw_model(small_config(vocab_size=50))
        with pytest.raises(CheckFailed, match="8 matrices were not quantized, embedding first"):
            check_quantized(model)
        monkeypatch.setattr(quantized_module, "quantize", lambda weight: weight)
        with pytest.raises(CheckFailed, match="8 matrices were not quantized"):
            quantize_model(model)

    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_tables_may_have_16_bits(self, tie_embeddings):
        model = draw_model(small_config(vocab_size=50, tie_embeddings=tie_embeddings))
        quantized = flatten(quantize_model(model, "float16"))
        for name in ("embedding", "head")[: 2 - tie_embeddings]:
            assert quantized[name].dtype == jnp.float16
            np.testing.assert_allclose(quantized[name], getattr(model, name), rtol=2**-11, atol=1e-7)
        assert sum(leaf.dtype == jnp.int8 for leaf in quantized.values()) == 7

    @pytest.mark.parametrize("changes", SHAPES)
    def test_is_close_to_the_float_model(self, changes):
        model = draw_model(small_config(vocab_size=50, **changes), seed=3)
        tokens = jax.random.randint(jax.random.key(1), (3, 20), 0, 50)
        float_logits, int8_logits = (np.asarray(logits_of(m, tokens)) for m in (model, quantize_model(model)))
        error = np.sqrt(np.mean((float_logits - int8_logits) ** 2))
        assert 0 < error < 0.02 * float_logits.std()

    @pytest.mark.parametrize("changes", SHAPES)
    def test_cached_decoding_matches_the_full_forward_pass(self, changes):
        """One token at a time and one row: the shapes in which a matrix product has a single row."""
        model = quantize_model(draw_model(small_config(vocab_size=50, **changes)))
        tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 50)
        whole = logits_of(model, tokens)

        @jax.jit
        def step(model, caches, tokens, positions):
            output = model(tokens, positions_BL=positions, caches=caches)
            return model.logits(output.hidden_BLD), output.caches

        logits, caches = step(model, model.create_caches(1, 16, "float32"), tokens[:, :5], jnp.arange(5)[None])
        outputs = [logits]
        for position in range(5, 12):
            logits, caches = step(model, caches, tokens[:, position : position + 1], jnp.array([[position]]))
            outputs.append(logits)
        # A last-bit difference before rounding to int8 may move a value by a whole step.
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=0.02 * float(whole.std()))

    def test_matches_the_model_with_dequantized_weights(self):
        """Against float weights of values * scales only activation rounding remains, which is negligible."""
        model = draw_model(small_config(vocab_size=50))
        quantized = quantize_model(model)
        flat = {
            path: leaf.dequantize() if isinstance(leaf, QTensor) else leaf
            for path, leaf in zip(flatten(model), leaves(quantized))
        }
        tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 50)
        dequantized = jax.tree.unflatten(
            jax.tree.structure(model),
            [leaf if leaf.ndim < 2 or p in ("embedding",) else _input_first(p, leaf) for p, leaf in flat.items()],
        )
        reference, got = (np.asarray(logits_of(m, tokens)) for m in (dequantized, quantized))
        assert np.sqrt(np.mean((reference - got) ** 2)) < 2e-4 * reference.std()


def _input_first(path, weight):
    return weight if "norm" in path else jnp.swapaxes(weight, -1, -2)


@pytest.fixture
def written(run, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    quantized = quantize_model(run.model)
    write_bundle(
        folder,
        quantized,
        run.tokenizer,
        receipt={"mean_kl": 0.001},
    )
    return folder, quantized


def edit_index(folder, **changes):
    file = folder / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestLoading:
    def test_round_trip(self, written, run):
        folder, quantized = written
        loaded, tokenizer = load_bundle(folder)
        assert tokenizer.fingerprint == run.tokenizer.fingerprint
        assert jax.tree.structure(loaded) == jax.tree.structure(quantized)
        for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(quantized)):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)

    def test_round_trip_of_16_bit_tables(self, run, tmp_path):
        quantized = quantize_model(run.model, "float16")
        write_bundle(tmp_path, quantized, run.tokenizer, receipt={})
        loaded, _ = load_bundle(tmp_path)
        assert loaded.embedding.dtype == jnp.float16
        for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(quantized)):
            np.testing.assert_array_equal(got, wanted)
        tokens = jnp.arange(12)[None]
        np.testing.assert_array_equal(logits_of(loaded, tokens), logits_of(quantized, tokens))

    def test_weights_are_plain_safetensors(self, written, run):
        tensors = load_file(written[0] / "model.safetensors")
        assert tensors["layers/0/0/mixer/query/values"].shape == (2, 32, 32)
        assert tensors["layers/0/0/mlp/up/values"].shape == (2, 48, 32)
        assert tensors["layers/0/0/mlp/up/scales"].shape == (2, 48)
        assert tensors["embedding/values"].shape == (run.tokenizer.vocab_size, 32)
        assert tensors["layers/0/0/mlp_norm/scale"].shape == (2, 32)

    def test_all_files_have_the_same_permissions(self, written):
        modes = {path.stat().st_mode for path in written[0].iterdir() if path.is_file()}
        assert len(modes) == 1

    def test_folder_without_an_index_is_not_a_bundle(self, written):
        (written[0] / "bundle.json").unlink()
        with pytest.raises(CheckpointError, match=r"is not an int8 bundle: it has no bundle\.json"):
            load_bundle(written[0])

    @pytest.mark.parametrize("text", ["", "{", '{"format": "maxlm/int8", "version": 3}', "[]"])
    def test_damaged_index(self, written, text):
        (written[0] / "bundle.json").write_text(text)
        with pytest.raises(CheckpointError, match="export the model again"):
            load_bundle(written[0])

    @pytest.mark.parametrize("changes", [{"version": 2}, {"version": 4}, {"format": "other"}])
    def test_unknown_version(self, written, changes):
        edit_index(written[0], **changes)
        with pytest.raises(CheckpointError, match="this release reads maxlm/int8 version 3"):
            load_bundle(written[0])

    def test_missing_weights(self, written):
        (written[0] / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors: there is no such file"):
            load_bundle(written[0])

    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(self, written, kept):
        file = written[0] / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(CheckpointError, match="is corrupt or truncated"):
            load_bundle(written[0])

    def test_one_changed_byte(self, written):
        file = written[0] / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="differs from what was exported"):
            load_bundle(written[0])

    def test_missing_or_extra_tensor(self, written):
        file = written[0] / "model.safetensors"
        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if name != "final_norm/scale"}, file)
        with pytest.raises(CheckpointError, match="lacks the tensor final_norm/scale"):
            load_bundle(written[0])
        save_file({**tensors, "extra": tensors["final_norm/scale"]}, file)
        with pytest.raises(CheckpointError, match="has, in addition to its model, the tensor extra"):
            load_bundle(written[0])

    def test_model_of_another_shape(self, written, run):
        edit_index(
            written[0], model=small_config(vocab_size=run.tokenizer.vocab_size, mlp_dim=64).model_dump(mode="json")
        )
        with pytest.raises(CheckpointError, match=r"layers/0/0/mlp/.* but the model needs"):
            load_bundle(written[0])
        edit_index(written[0], tables="int4")
        with pytest.raises(CheckpointError, match="it has tables of 'int4'"):
            load_bundle(written[0])
        edit_index(written[0], model={"layers": "many"})
        with pytest.raises(CheckpointError, match="does not describe a model"):
            load_bundle(written[0])

    def test_missing_or_different_tokenizer(self, written):
        edit_index(written[0], tokenizer_fingerprint="0" * 32)
        with pytest.raises(CheckpointError, match="not the one it was exported with"):
            load_bundle(written[0])
        shutil.rmtree(written[0] / "tokenizer")
        with pytest.raises(CheckpointError, match="its tokenizer is corrupt"):
            load_bundle(written[0])
