"""Objectives on pipeline stages: those that apply a model twice, sample from it, or train adapters."""

from functools import partial

import jax
import numpy as np
import pytest
from toy_task import EXECUTION, make_config, question, toy_model, write_lines

from maxlm.core.batch import put_batch
from maxlm.core.parameters import initialize
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.train.loss import TrainingLoss
from maxlm.train.objective import RunContext
from maxlm.train.step import loss_and_gradient
from maxlm.train.trained_model import assemble

RECORDS = {
    "preference": [{"prompt": question(f"coin {n}"), "chosen": "yes", "rejected": "no"} for n in range(4)],
    "policy": [{"prompt": question(f"coin {n}"), "answer": "yes"} for n in range(4)],
}
LORA = {"kind": "lora", "rank": 2, "targets": ["query", "down"]}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "lora", "schedule"), [("preference", None, "1f1b"), ("policy", LORA, "1f1b")])
def test_stages_change_nothing(kind, lora, schedule, tokenizer, tmp_path):
    objective = {"kind": kind, "train_file": write_lines(tmp_path / "records.jsonl", RECORDS[kind])}
    if kind == "policy":
        objective |= {"max_new_tokens": 4, "group_size": 2, "kl": {"beta": 0.1}}
    model = toy_model(num_layers=4, vocab_size=tokenizer.vocab_size)
    settings = {"adapters": lora, "model": model, "execution": {**EXECUTION, "pipeline": {"schedule": schedule}}}
    results, batch = [], None
    for sizes in ({"stage": 2, "data": 2}, {}):
        mesh = {"data": 1, "fsdp": 1, **sizes}
        config = make_config(tmp_path / "run", init_from="x", objective=objective, mesh=mesh, **settings)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            start = initialize(Decoder(config.model, config.execution), jax.random.key(0), mesh)
            data = config.objective.open_data(RunContext(config, tokenizer, mesh, lambda start=start: start))
            if batch is None:
                # Answers are sampled and scored on the stages too.
                batch = next(data.batches(0, lambda: start))  # noqa: B023
            trainable = start
            if lora is not None:
                plan = Decoder(config.model, config.execution)
                trainable = initialize(declare_adapters(plan, config.adapters), jax.random.key(1), mesh)
            # Adapters start with a zero update, for which half of them have no gradient.
            trainable = jax.tree.map(lambda leaf: leaf + 0.05, trainable)
            results.append(_terms_and_gradient(config, trainable, start, put_batch(batch, mesh)))
    (terms, gradient), (expected_terms, expected_gradient) = results
    for name, values in expected_terms.items():
        np.testing.assert_allclose(terms[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    for path, value in expected_gradient.items():
        scale = np.abs(value).max()
        assert scale > 0, path
        np.testing.assert_allclose(gradient[path], value, rtol=1e-3, atol=1e-4 * scale + 1e-9, err_msg=path)


def _terms_and_gradient(config, trainable, frozen, batch):
    loss = TrainingLoss(config.objective, config.regularization, partial(assemble, config))
    frozen = {} if config.adapters is None else {"base": frozen}

    def compute(trainable, frozen, batch):
        pipeline = config.execution.pipeline
        return loss_and_gradient(trainable, frozen, batch, loss_function=loss, accumulate=1, pipeline=pipeline)

    output, gradient = jax.jit(compute)(trainable, frozen, batch)
    terms = {name: (float(term.sum), float(term.weight)) for name, term in {**output.terms, **output.metrics}.items()}
    return terms, flatten(jax.device_get(gradient))
