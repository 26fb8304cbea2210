"""One process that samples from a model whose weights are on all processes: `main(FILE)` writes what it sampled.

The answers of all rows, in order, with the differences that the check of the weights measured.
"""

import json
from pathlib import Path

import numpy as np


class Numbers:
    stop_ids = (2, 3, 4)

    def decode(self, ids):
        return " ".join(map(str, ids))


def main(arguments: list[str]) -> int:
    from maxlm.runtime.distributed import initialize_distributed

    initialize_distributed()
    import jax

    from maxlm.config.execution import ExecutionConfig
    from maxlm.config.mesh import MeshConfig
    from maxlm.config.model import ModelConfig
    from maxlm.core.parameters import initialize, shardings
    from maxlm.core.sharding import make_mesh, row_shard
    from maxlm.data.examples.chat import share_of
    from maxlm.data.examples.preference import Prompt
    from maxlm.models.decoder import Decoder
    from maxlm.objectives.sampling.sampler import Sampler
    from maxlm.objectives.sampling.weight_sync import WeightSync, WeightSyncError

    layers = {"repeat": 2, "mixer": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}, "mlp": {"dim": 64}}
    execution = ExecutionConfig(activation_dtype="float32", matmul_dtype="float32")
    plan = Decoder(ModelConfig(embed_dim=32, vocab_size=64, layers=layers), execution)
    mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
    draw = jax.jit(lambda seed: initialize(plan, jax.random.key(seed)), out_shardings=shardings(plan, mesh))
    model, newer = draw(0), draw(1)
    random = np.random.default_rng(0)
    drawn = [Prompt(random.integers(5, 64, size=n).tolist(), {}) for n in (3, 1, 9, 5)]
    shard = row_shard(mesh)
    rows = share_of(np.arange(16), shard.index, shard.count)
    prompts = [drawn[row // 4] for row in rows]
    answers = {}
    with jax.set_mesh(mesh):
        sync = WeightSync(mesh)
        for layout in ("replicated", "sharded"):
            sampler = Sampler(Numbers(), mesh, prompt_length=9, max_new_tokens=12, seed=0, layout=layout)
            sampled = sampler(model, prompts, rows, stream=1, temperature=1.0, group_size=4)
            assert sync.check(model, sampled, temperature=1.0) < 1e-5
            answers[layout] = sampled.texts
            if jax.process_index() == 1:
                # Only one process has other weights: all must stop.
                sampled = sampler_with_other_fingerprints(sampled)
            try:
                sync.check(model if jax.process_count() > 1 else newer, sampled, temperature=1.0)
            except WeightSyncError:
                continue
            raise AssertionError("other weights are not found")
    assert answers["replicated"] == answers["sharded"]
    Path(arguments[0]).write_text(json.dumps(dict(zip(rows.tolist(), answers["sharded"]))), encoding="utf-8")
    return 0


def sampler_with_other_fingerprints(answers):
    from dataclasses import replace

    return replace(answers, fingerprints_R=answers.fingerprints_R + np.uint32(1))
