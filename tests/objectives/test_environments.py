"""Tools are bounded and tell the model what went wrong; a conversation is learned on the model's own tokens."""

import json
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_task import make_config, question, write_lines

from maxlm.config.mesh import MeshConfig
from maxlm.core.batch import Batch
from maxlm.core.sharding import make_mesh
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError, DataError
from maxlm.interop.load import load_model
from maxlm.models.applied import AppliedModel
from maxlm.objectives.sampling.conversations import Conversations
from maxlm.objectives.sampling.environments import Tool, ToolEnvironment, calculator, python, retrieval
from maxlm.objectives.sampling.rollouts import policy_rows
from maxlm.objectives.sampling.sampler import Sampler
from maxlm.objectives.sampling.weight_sync import WeightSync
from maxlm.objectives.sequences import target_log_probabilities
from maxlm.runtime.bounded import Limits, isolation_problem
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

ISOLATED = pytest.mark.skipif(isolation_problem() is not None, reason="programs cannot be isolated here")


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def results(text, *tools, **settings):
    messages = ToolEnvironment(tools, **settings).step([*question("?"), {"role": "assistant", "content": text}])
    assert messages is None or all(message["role"] == "tool" for message in messages)
    return messages and [message["content"] for message in messages]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * (3 + 4)", "14"),
        ("-7 // 2", "-4"),
        ("2 ** 10 % 7", "2"),
        ("1 / 8", "0.125"),
        ("6 / 3", "2"),
        ("-(+3)", "-3"),
    ],
)
def test_calculator(expression, value):
    assert results(call("calculator", expression=expression), calculator()) == [value]


@pytest.mark.parametrize(
    "expression",
    [
        *("1 / 0", "9 ** 9 ** 9", "9 ** 99999999", "10.0 ** 400", "(-8) ** 0.5", "1 and 1", "True + 1"),
        *("__import__('os')", "x", "1 +", "[1] * 9", 7, "(" * 400 + ")" * 400, "1" * 501, "9" * 400 + "**9"),
    ],
)
def test_calculator_refuses_what_is_no_arithmetic_or_too_large(expression):
    (result,) = results(call("calculator", expression=expression), calculator())
    assert result.startswith("error: ")
    assert len(result) < 2100


def test_answer_without_a_call_ends_the_conversation():
    assert results("42 <b>", calculator()) is None


def test_several_calls_and_a_limit():
    text = " then ".join(call("calculator", expression=f"{n} + 1") for n in range(3))
    assert results(text, calculator()) == ["1", "2", "3"]
    assert results(text, calculator(), max_calls=2) == ["1", "2", "error: only the first 2 of 3 calls were run"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>{</tool_call>", "error: the call is not JSON"),
        ("<tool_call>" + "[" * 100_000, "error: the call is not JSON"),
        ("<tool_call>[1]</tool_call>", "error: a call is {"),
        ('<tool_call>{"name": "calculator", "arguments": "1"}</tool_call>', "error: a call is {"),
        (call("shell", command="ls"), "error: there is no tool 'shell', only calculator"),
        (call("calculator", text="1"), "error: calculator takes expression, not text"),
        (call("calculator"), "error: calculator takes expression, not nothing"),
    ],
)
def test_malformed_calls_are_told_to_the_model(text, message):
    (result,) = results(text, calculator())
    assert result.startswith(message)


def test_tool_that_raises_hangs_or_floods_is_bounded():
    def fail():
        raise RuntimeError("disk on fire")

    broken, flood = Tool("broken", "", {}, fail), Tool("flood", "", {}, lambda: "x" * 10_000)
    assert results(call("broken"), broken) == ["error: RuntimeError: disk on fire"]
    (long,) = results(call("flood"), flood, max_characters=100)
    assert long == "x" * 100 + "... (9900 more characters)"
    hang = Tool("hang", "", {}, threading.Event().wait)
    assert results(call("hang"), hang, seconds=0.05) == ["error: hang took longer than 0.05 seconds"]
    surrogate = Tool("odd", "", {}, lambda: "\ud800")
    assert results(call("odd"), surrogate) == ["?"]


@ISOLATED
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(6 * 7)", "42\n"),
        ("while True: pass", "error: the program was ended by its limit of time 0.5 seconds"),
        ("while True: print('x' * 1000)", "error: the program was ended by its limit of output"),
        ("1 / 0", "ZeroDivisionError: division by zero\n\nerror: exit code 1"),
        ("open('/etc/passwd')", "FileNotFoundError"),
    ],
    ids=["result", "hangs", "floods", "fails", "reads"],
)
def test_programs_are_bounded(code, expected):
    (result,) = results(call("python", code=code), python(Limits(seconds=0.5, cpu_seconds=5)))
    assert expected in result
    assert len(result) < 2100


def test_retrieval_returns_the_best_paragraphs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("The sky is blue.\n\nGrass is green.", encoding="utf-8")
    (tmp_path / "sub" / "b.md").write_text("Coal is black, and black is coal.", encoding="utf-8")
    tool = retrieval(tmp_path, count=1)
    assert results(call("search", query="Which colour has grass?"), tool) == ["a.txt: Grass is green."]
    assert results(call("search", query="coal"), tool) == ["sub/b.md: Coal is black, and black is coal."]
    assert results(call("search", query="zebra"), tool) == ["nothing was found"]
    assert results(call("search", query=3), tool)[0].startswith("error: ")


def test_retrieval_needs_texts(tmp_path):
    with pytest.raises(DataError, match=r"has no \.txt or \.md file"):
        retrieval(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as UTF-8"):
        retrieval(tmp_path)


class Echo:
    """Asks for the colors of other things, as often as it is told; things of odd rows need no second answer."""

    tools = ()

    def step(self, conversation):
        answers = [message for message in conversation if message["role"] == "assistant"]
        number = int(conversation[0]["content"].split()[1])
        return None if number % 2 and len(answers) > 1 else [{"role": "user", "content": f"coin {len(answers)}"}]


MAX_TOKENS, TURN = 40, 6


@pytest.fixture(scope="module")
def conversations(tuned, tokenizer):
    """The model, and conversations about coins."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1))
    model, _ = load_model(tuned[0], mesh)
    prompts = []
    for n in range(6):
        messages = question(f"coin {n}")
        prompts.append(Prompt(tokenizer.encode_chat(messages, generation_prompt=True).ids, {}, text=messages))
    sampler = Sampler(tokenizer, mesh, prompt_length=12 + MAX_TOKENS, max_new_tokens=TURN, seed=0)
    converse = Conversations(sampler, tokenizer, Echo(), 3, MAX_TOKENS)
    with jax.set_mesh(mesh):
        answers = converse(model, prompts, np.arange(6), stream=1, temperature=1.1)
        assert WeightSync(mesh).check(model, answers, temperature=1.1) < 1e-5
    return jax.device_get(model), answers, tokenizer


def test_conversations_are_those_of_the_chat_template(conversations):
    _, answers, tokenizer = conversations
    for row in range(6):
        ids = answers.tokens_RN[row, : answers.lengths_R[row]]
        is_sampled = answers.is_sampled_RN[row, : answers.lengths_R[row]]
        turns = np.split(ids, np.flatnonzero(np.diff(is_sampled.astype(int)) != 0) + 1)
        said = [
            tokenizer.decode([id_ for id_ in turn.tolist() if id_ not in tokenizer.stop_ids]) for turn in turns[::2]
        ]
        assert said[-1] == answers.texts[row]
        assert len(said) == (2 if row % 2 else 3)
        messages = question(f"coin {row}")
        for number, text in enumerate(said, 1):
            messages.append({"role": "assistant", "content": text})
            if number < len(said):
                messages.append({"role": "user", "content": f"coin {number}"})
        whole = [*answers.prompts_RP[row, : answers.prompt_lengths_R[row]].tolist(), *ids.tolist()]
        expected = tokenizer.encode_chat(messages).ids
        assert whole == expected[: len(whole)]


def test_log_probabilities_of_all_turns_are_those_of_a_plain_forward_pass(conversations):
    model, answers, _ = conversations
    stream, sampled_BL = policy_rows(answers)
    log_p_BL = target_log_probabilities(model, stream, temperature=1.1)
    np.testing.assert_allclose(log_p_BL, sampled_BL, atol=2e-5)
    assert stream.loss_weights.sum() == answers.is_sampled_RN.sum()
    assert 0 < answers.is_sampled_RN.sum() < answers.lengths_R.sum(), "there are observations"


def test_observations_have_no_gradient(conversations, tmp_path):
    """Whatever is recorded of them, loss and gradient are the same; of the model's own tokens they are not."""
    model, answers, _ = conversations
    stream, sampled_BL = policy_rows(answers)
    objective = make_config(
        tmp_path, init_from="x", objective={"kind": "policy", "train_file": "x.jsonl", "max_new_tokens": TURN}
    ).objective
    random = np.random.default_rng(0)
    zeros_B, advantages_BL = np.zeros(6, np.float32), random.normal(size=sampled_BL.shape).astype(np.float32)
    names = ("rewards_B", "has_signal_B", "lengths_B", "is_truncated_B", "sync_difference_B")

    @jax.jit
    def gradient(advantages_BL, sampled_BL):
        given = {"sampled_BL": sampled_BL, "advantages_BL": advantages_BL, **dict.fromkeys(names, zeros_B)}
        batch = Batch({"answers": stream}, given)

        def loss(model):
            terms = objective.compute_loss(AppliedModel.of(model, batch), batch).terms
            return sum(term.mean() for term in terms.values())

        return jax.tree.leaves(jax.grad(loss)(model))

    is_observed_BL = (stream.segment_ids > 0) & (stream.loss_weights == 0)
    own = gradient(advantages_BL, sampled_BL)
    noise_BL = random.normal(size=sampled_BL.shape).astype(np.float32)
    for one, other in zip(own, gradient(advantages_BL + is_observed_BL * noise_BL, sampled_BL + is_observed_BL)):
        np.testing.assert_array_equal(one, other)
    changed = gradient(advantages_BL + stream.loss_weights * noise_BL, sampled_BL)
    assert any(np.abs(one - other).max() > 1e-3 for one, other in zip(own, changed))


def test_conversations_are_limited_in_tokens(conversations):
    _, answers, _ = conversations
    assert answers.lengths_R.max() <= MAX_TOKENS
    assert answers.tokens_RN.shape == (6, MAX_TOKENS)


def test_row_without_a_prompt_gets_no_answer(conversations, tokenizer):
    model, _, _ = conversations
    mesh = make_mesh(MeshConfig(data=1, fsdp=1))
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    sampler = Sampler(tokenizer, mesh, prompt_length=12, max_new_tokens=4, seed=0)
    prompts = [Prompt(tokenizer.encode_chat(question(f"coin {n}"), generation_prompt=True).ids, {}) for n in range(2)]
    with jax.set_mesh(mesh):
        both = sampler(model, prompts, np.arange(2), stream=0, temperature=1.0)
        one = sampler(model, [prompts[0], replace(prompts[1], ids=[])], np.arange(2), stream=0, temperature=1.0)
    assert one.lengths_R.tolist() == [both.lengths_R[0], 0]
    np.testing.assert_array_equal(one.tokens_RN[0], both.tokens_RN[0])


def test_training_with_tools(tuned, tmp_path):
    records = [{"prompt": question(f"coin {n}"), "answer": "yes"} for n in range(4)]
    config = make_config(
        tmp_path / "run",
        init_from=str(tuned[0]),
        objective={
            "kind": "policy",
            "train_file": write_lines(tmp_path / "prompts.jsonl", records),
            "max_new_tokens": 6,
            "group_size": 4,
            "environment": {"tools": ["calculator"], "max_turns": 2, "max_tokens": 24},
        },
        execution={"max_length": 1024, "activation_dtype": "float32", "matmul_dtype": "float32"},
        batch_size=2,
        row_length=768,
        steps=2,
        log_every=1,
    )
    train(config)
    for record in read_metrics(tmp_path / "run"):
        if "reward" in record:
            assert record["sync_difference"] < 1e-4
            assert record["sampler_mismatch"] < 1e-4


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"tools": ["search"]}, r"objective\.environment\.folder and the tool `search` need one another"),
        ({"tools": ["calculator"], "folder": "x"}, "need one another"),
        ({"tools": []}, r"objective\.environment\.tools"),
        ({"tools": ["calculator"], "max_tokens": 32}, r"environment\.max_tokens \(32\) leaves no room for a prompt"),
    ],
)
def test_wrong_settings_are_refused(environment, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_config(
            tmp_path,
            init_from="x",
            objective={"kind": "policy", "train_file": "x.jsonl", "max_new_tokens": 8, "environment": environment},
        )


def test_tools_need_messages(tuned, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "coin 1", "answer": "yes"}])
    environment = {"tools": ["calculator"], "max_tokens": 16}
    objective = {"kind": "policy", "train_file": prompts, "max_new_tokens": 8, "environment": environment}
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the prompt is a text, but tools need messages"):
        train(make_config(tmp_path / "run", init_from=str(tuned[0]), objective=objective, steps=1))
