"""Distillation for chat: divergences match their equations, and a student becomes its teacher on its own answers."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_task import EXECUTION, chat, make_config, question, toy_model, write_lines

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.folder import find_checkpoint, read_metadata
from maxlm.cli import main
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError, DataError
from maxlm.interop.load import load_model
from maxlm.models.decoder import Decoder
from maxlm.objectives.teacher import token_divergence
from maxlm.ops.divergences import jensen_shannon_divergence, kl_divergence, reverse_kl_divergence
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from maxlm.train.state import create_state


def reference(p, q, beta):
    """The divergence in float64, from probabilities."""
    kl = lambda a, b: (a * (np.log(a) - np.log(b))).sum(axis=-1)  # noqa: E731
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def function_of(beta):
    if beta in (0, 1):
        return reverse_kl_divergence if beta else kl_divergence
    return partial(jensen_shannon_divergence, beta=beta)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("chunk_length", [3, 100])
def test_divergence_and_gradient_match_equations(beta, chunk_length):
    shape = {"vocab_size": 23, "tie_embeddings": False, "num_layers": 1}
    execution = ExecutionConfig(**EXECUTION, loss_chunk_length=chunk_length)
    student = initialize(Decoder(ModelConfig(**toy_model(**shape)), execution), jax.random.key(0))
    teacher = initialize(Decoder(ModelConfig(**toy_model(**shape, embed_dim=64)), execution), jax.random.key(1))
    random = np.random.default_rng(0)
    hidden, taught = (random.normal(0, 20, (2, 7, width)).astype(np.float32) for width in (32, 64))
    weights, temperature = random.random((2, 7)).astype(np.float32), 1.7

    @jax.value_and_grad
    def total(hidden):
        divergence_BL = token_divergence(student, hidden, teacher, taught, function_of(beta), temperature=temperature)
        return jnp.sum(weights * divergence_BL)

    found, gradient = total(hidden)
    head, taught_head = (np.asarray(model.head, np.float64) for model in (student, teacher))
    p = softmax(taught.astype(np.float64) @ taught_head.T / temperature)

    def expected(hidden):
        return (weights * reference(p, softmax(hidden @ head.T / temperature), beta)).sum()

    hidden = hidden.astype(np.float64)
    np.testing.assert_allclose(found, expected(hidden), rtol=1e-5)
    for place in [(0, 0, 0), (1, 6, 31), (0, 3, 7), (1, 2, 12)]:
        moved = np.zeros_like(hidden)
        moved[place] = 1e-5
        numerical = (expected(hidden + moved) - expected(hidden - moved)) / 2e-5
        np.testing.assert_allclose(gradient[place], numerical, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


def test_jensen_shannon_approaches_both_kl_divergences():
    log_p, log_q = (jax.nn.log_softmax(jax.random.normal(jax.random.key(n), (5, 9))) for n in range(2))
    near_0, near_1 = (jensen_shannon_divergence(log_p, log_q, beta=beta) for beta in (1e-3, 1 - 1e-3))
    np.testing.assert_allclose(near_0 / 1e-3, kl_divergence(log_p, log_q), rtol=2e-2)
    np.testing.assert_allclose(near_1 / 1e-3, reverse_kl_divergence(log_p, log_q), rtol=2e-2)


@pytest.fixture(scope="module")
def teacher(tuned, tmp_path_factory):
    """The tuned model after SFT on chats that always answer `coin N` with yes."""
    folder = tmp_path_factory.mktemp("teacher")
    data = write_lines(folder / "chats.jsonl", [chat(f"coin {n}", "yes") for n in range(5)])
    train(make_config(folder / "run", init_from=str(tuned[0]), objective={"kind": "sft", "train_file": data}, steps=30))
    return folder / "run"


def distill_config(output, tuned, teacher, data, *, steps=8, objective=None, **settings):
    return make_config(
        output,
        init_from=str(tuned[0]),
        objective={
            "kind": "distill_chat",
            "teacher": str(teacher),
            "train_file": data,
            "max_new_tokens": 6,
            **(objective or {}),
        },
        optim={"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}},
        steps=steps,
        log_every=2,
        **settings,
    )


@pytest.fixture(scope="module")
def wrong_chats(tmp_path_factory):
    """The coins with the answers of the student: half of them are not what the teacher says."""
    records = [chat(f"coin {n}", answer) for n in range(5) for answer in ("yes", "no")]
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", records)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_student_answers_like_its_teacher(kind, tuned, teacher, wrong_chats, tmp_path):
    objective = {"divergence": {"kind": kind}, "on_policy": 1.0, "valid_file": wrong_chats}
    manifest = train(distill_config(tmp_path / "run", tuned, teacher, wrong_chats, steps=16, objective=objective))
    assert manifest["inputs"]["teacher"]["path"]
    assert {"loss", "perplexity"} <= set(manifest["metrics"]["valid"])
    first, *_, last = [record for record in read_metrics(tmp_path / "run") if "divergence" in record]
    # Of three seeds: 0.035 to 0.085 of the first one.
    assert last["divergence"] < 0.3 * first["divergence"]
    assert last["on_policy"] == 1.0
    assert first["sampler_mismatch"] < 1e-4
    assert 1 < last["answer_length"] <= 6


@pytest.fixture(scope="module")
def mixed(tuned, teacher, wrong_chats, tmp_path_factory):
    """A run of 8 steps with both kinds of answers, and one that was interrupted after 3."""
    folder = tmp_path_factory.mktemp("mixed")
    train(distill_config(folder / "whole", tuned, teacher, wrong_chats))
    for steps in (3, 8):
        train(distill_config(folder / "resumed", tuned, teacher, wrong_chats, steps=steps))
    return folder


def test_steps_learn_from_given_and_own_answers_and_resume_exactly(mixed):
    shares = [record["on_policy"] for record in read_metrics(mixed / "whole") if "on_policy" in record]
    assert 0 < np.mean(shares) < 1
    whole, resumed = (flatten(load_model(mixed / name)[0]) for name in ("whole", "resumed"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], resumed[path], err_msg=path)


def test_prompts_are_enough_without_given_answers(tuned, teacher, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question(f"coin {n}")} for n in range(8)])
    train(distill_config(tmp_path / "run", tuned, teacher, prompts, steps=1, objective={"on_policy": 1.0}))
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: "):
        train(distill_config(tmp_path / "other", tuned, teacher, prompts, steps=1))


def test_answers_of_a_teacher_are_sampled_for_a_student(tuned, teacher, tmp_path):
    """From prompts to a student: `maxlm feedback` writes the teacher's answers, `maxlm train` learns them."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question(f"coin {n}")} for n in range(5)])
    feedback = tmp_path / "answer.yaml"
    feedback.write_text(
        f"kind: feedback\noutput: {tmp_path}/answers\nrecords: {prompts}\ntask: {{kind: answer}}\n"
        f"model: {{kind: local, path: {teacher}}}\nanswers: {{count: 1, max_tokens: 6, temperature: 0}}\n"
    )
    assert main(["feedback", str(feedback)]) == 0
    chats = tmp_path / "answers" / "chats.jsonl"
    texts = [json.loads(line)["messages"][-1]["content"] for line in chats.read_text().splitlines()]
    assert texts == ["yes"] * 5
    manifest = train(distill_config(tmp_path / "run", tuned, teacher, str(chats), objective={"on_policy": 0.0}))
    first, *_, last = [record for record in read_metrics(tmp_path / "run") if "divergence" in record]
    assert last["divergence"] < 0.3 * first["divergence"]
    assert manifest["inputs"]["train_file"]["hash"]


def test_teacher_with_another_tokenizer_is_refused_by_name(tuned, teacher, wrong_chats, tmp_path):
    checkpoint = find_checkpoint(teacher)
    metadata = read_metadata(checkpoint)
    with Checkpointer(tmp_path / "foreign", keep=1) as checkpointer:
        checkpointer.save(
            create_state({"x": jnp.zeros(1)}, optax.identity()), {**metadata, "fingerprint": "0" * 32, "step": 0}
        )
    with pytest.raises(CheckpointError, match=r"objective\.teacher: .*foreign has another tokenizer.*kind=sft"):
        train(distill_config(tmp_path / "run", tuned, tmp_path / "foreign", wrong_chats))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_answers_without_room_are_refused(tuned, teacher, wrong_chats, tmp_path):
    with pytest.raises(ConfigError, match=r"objective\.max_new_tokens \(40\) leaves no room for a prompt"):
        distill_config(tmp_path / "run", tuned, teacher, wrong_chats, objective={"max_new_tokens": 40})
