"""Loss and gradient depend only on the examples, not on gradient accumulation, padding or packing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import EXECUTION, chat, make_config, question, toy_model, write_lines

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.batch import Batch
from maxlm.core.parameters import initialize
from maxlm.data.examples.chat import PackedChats
from maxlm.data.examples.judged import JudgedAnswers
from maxlm.data.examples.preference import PreferencePairs
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.models.scores import sequence_scores
from maxlm.objectives.sequences import rows_of
from maxlm.scoring.reward_model import reward_of_sequences
from maxlm.train.step import loss_and_gradient

CHATS = [chat("sky", "blue"), chat("grass", "green"), chat("coin 1", "yes"), chat("snow and coal", "white and black")]
PAIRS = [
    {"prompt": question(text), "chosen": chosen, "rejected": rejected}
    for text, chosen, rejected in [
        ("sky", "blue", "red"),
        ("coin", "yes", "no"),
        ("a", "b c d e", "f"),
        ("g", "h", "i j"),
    ]
]


@pytest.fixture(scope="module")
def model_config(tokenizer):
    return ModelConfig(**toy_model(vocab_size=tokenizer.vocab_size))


@pytest.fixture(scope="module")
def model(model_config):
    return initialize(Decoder(model_config, ExecutionConfig(**EXECUTION)), jax.random.key(1))


def objective_of(settings):
    """An objective with these settings; its files do not exist."""
    return make_config("run", init_from="unused", objective=settings).objective


@partial(jax.jit, static_argnames=("compute_loss", "accumulate"))
def compute(compute_loss, model, batch, accumulate):
    loss_function = lambda model, _, batch: compute_loss(AppliedModel.of(model, batch), batch)  # noqa: E731
    return loss_and_gradient(model, None, batch, loss_function=loss_function, accumulate=accumulate)


def terms_and_gradient(objective, model, batch, accumulate=1):
    """The means of the loss terms, and the gradient of their sum."""
    output, gradient = compute(objective.compute_loss, model, batch, accumulate)
    means = {name: float(term.mean()) for name, term in {**output.terms, **output.metrics}.items()}
    return means, gradient


def assert_same(left, right):
    (left_means, left_gradient), (right_means, right_gradient) = left, right
    assert left_means.keys() == right_means.keys()
    for name in left_means:
        np.testing.assert_allclose(left_means[name], right_means[name], rtol=1e-5, atol=1e-6, err_msg=name)
    leaves = list(zip(jax.tree.leaves(left_gradient), jax.tree.leaves(right_gradient)))
    assert any(np.abs(a).max() > 1e-4 for a, _ in leaves)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def padded(batch, *, rows, columns):
    """The batch with extra rows and columns of padding at the end."""
    return jax.tree.map(lambda x: np.pad(x, [(0, rows), (0, columns)][: x.ndim]), batch)


class TestSft:
    @pytest.fixture
    def objective(self):
        return objective_of({"kind": "sft", "train_file": "nowhere", "z_loss": 1e-2})

    @pytest.mark.parametrize("weighting", ["token", "dialogue"])
    def test_packing_padding_and_accumulation_change_nothing(self, objective, model, tokenizer, weighting):
        encoded = [tokenizer.encode_chat(record["messages"]) for record in CHATS]
        packed = PackedChats(encoded, row_length=40, weighting=weighting)
        assert len(packed.rows) == 2
        alone = PackedChats(encoded, row_length=max(len(c.ids) - 1 for c in encoded), weighting=weighting)
        alone.rows = [[index] for index in range(4)]
        expected = terms_and_gradient(objective, model, alone.batch(np.arange(4)))
        assert_same(terms_and_gradient(objective, model, packed.batch(np.arange(2))), expected)
        assert_same(terms_and_gradient(objective, model, alone.batch(np.arange(4)), accumulate=4), expected)
        assert_same(
            terms_and_gradient(objective, model, padded(alone.batch(np.arange(4)), rows=2, columns=7)), expected
        )

    def test_weighting_by_dialogue_is_the_mean_of_the_means_of_dialogues(self, objective, model, tokenizer):
        encoded = [tokenizer.encode_chat(record["messages"]) for record in CHATS]
        packed = PackedChats(encoded, row_length=40, weighting="dialogue").batch(np.arange(2))
        text = packed["text"]
        outputs = model(text.tokens, positions_BL=text.positions, segment_ids_BL=text.segment_ids)
        log_p = np.asarray(jax.nn.log_softmax(model.logits(outputs.hidden_BLD)), np.float64)
        nll = -np.take_along_axis(log_p, text.targets[..., None], -1)[..., 0]
        learned = [
            nll[row][(text.segment_ids[row] == segment) & (text.loss_weights[row] > 0)].mean()
            for row in range(2)
            for segment in range(1, text.segment_ids[row].max() + 1)
        ]
        assert len(learned) == 4
        means, _ = terms_and_gradient(objective, model, packed)
        np.testing.assert_allclose(means["cross_entropy"], np.mean(learned), rtol=1e-5)


class TestReward:
    @pytest.fixture(scope="class")
    def model(self, model_config):
        config = model_config.model_copy(update={"labels": ("reward",)})
        model = initialize(Decoder(config), jax.random.key(1))
        model.score = jax.random.normal(jax.random.key(2), model.score.shape)
        return model

    def test_padding_and_accumulation_change_nothing(self, model, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        objective = objective_of({"kind": "reward", "train_file": path, "center": 0.01})
        batch = PreferencePairs.read(path, tokenizer, row_length=32, with_margins=True).batch(np.arange(4))
        batch = replace(batch, values={"margin_B": np.array([0, 1, 0.5, 2], np.float32)})
        expected = terms_and_gradient(objective, model, batch)
        assert_same(terms_and_gradient(objective, model, batch, accumulate=2), expected)
        assert_same(terms_and_gradient(objective, model, padded(batch, rows=2, columns=5)), expected)

    def test_score_is_that_of_the_last_token_also_if_padding_is_the_end_token(self, model, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        objective = objective_of({"kind": "reward", "train_file": path, "center": 0.01})
        batch = PreferencePairs.read(path, tokenizer, row_length=32, with_margins=True).batch(np.arange(4))
        expected = terms_and_gradient(objective, model, batch)
        end = next(int(row.tokens[0][row.segment_ids[0] > 0][-1]) for row in rows_of(batch["chosen"]))

        def with_ends(stream):
            return replace(stream, tokens=np.where(stream.segment_ids > 0, stream.tokens, end))

        ends = replace(batch, streams={name: with_ends(stream) for name, stream in batch.streams.items()})
        assert (ends["chosen"].tokens != batch["chosen"].tokens).any()
        assert_same(terms_and_gradient(objective, model, ends), expected)
        # The reward is that of each row's last token, computed alone.
        scores = sequence_scores_of(model, ends["chosen"])
        for row, score in zip(rows_of(batch["chosen"]), scores):
            ids = row.tokens[0][row.segment_ids[0] > 0].tolist()
            np.testing.assert_allclose(score, reward_of_sequences(model, [ids])[0], rtol=1e-4, atol=1e-5)


def sequence_scores_of(model, stream):
    places = {"positions_BL": stream.positions, "segment_ids_BL": stream.segment_ids}
    return sequence_scores(model, model.apply(jax.tree.map(jnp.asarray, stream)), **places)[:, 0]


class TestDpo:
    def test_padding_and_accumulation_change_nothing(self, model, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        loss = {"kind": "dpo", "label_smoothing": 0.1}
        objective = objective_of({"kind": "preference", "train_file": path, "sft_weight": 0.3, "loss": loss})
        pairs = PreferencePairs.read(path, tokenizer, row_length=32).batch(np.arange(4))
        chosen, rejected = np.random.default_rng(0).normal(-20, 3, (2, 4)).astype(np.float32)
        batch = replace(pairs, values={"reference_chosen_B": chosen, "reference_rejected_B": rejected})
        expected = terms_and_gradient(objective, model, batch)
        assert_same(terms_and_gradient(objective, model, batch, accumulate=2), expected)
        assert_same(terms_and_gradient(objective, model, padded(batch, rows=2, columns=5)), expected)

    @pytest.mark.parametrize(
        ("loss", "settings"),
        [
            ({"kind": "simpo"}, {"tail_weight": 0.5, "weight_by_policy": True, "sft_weight": 0.3}),
            ({"kind": "orpo"}, {"sft_on_prompts": True}),
            ({"kind": "aot", "paired": False}, {}),
        ],
        ids=lambda value: value.get("kind"),
    )
    def test_no_loss_depends_on_padding_and_accumulation(self, loss, settings, model, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        objective = objective_of({"kind": "preference", "train_file": path, "loss": loss, **settings})
        pairs = PreferencePairs.read(path, tokenizer, row_length=32).batch(np.arange(4))
        names = [*objective.loss.names_of_matches]
        if objective.loss.needs_reference:
            names += ["reference_chosen_B", "reference_rejected_B"]
        drawn = np.random.default_rng(0).normal(-20, 3, (len(names), 4)).astype(np.float32)
        batch = replace(pairs, values=dict(zip(names, drawn)))
        expected = terms_and_gradient(objective, model, batch)
        assert_same(terms_and_gradient(objective, model, batch, accumulate=2), expected)
        assert_same(terms_and_gradient(objective, model, padded(batch, rows=2, columns=5)), expected)


class TestKto:
    def test_padding_and_accumulation_change_nothing(self, model, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
        objective = objective_of({"kind": "unpaired_preference", "train_file": path, "bad_weight": 1.3})
        answers = JudgedAnswers.read(path, tokenizer, row_length=32, form=objective).batch(np.arange(8))
        reference = np.random.default_rng(0).normal(-20, 3, 8).astype(np.float32)
        values = {**answers.values, "reference_B": reference, "baseline_B": np.full(8, 0.7, np.float32)}
        batch = Batch({"answers": answers["answers"]}, values)
        expected = terms_and_gradient(objective, model, batch)
        assert_same(terms_and_gradient(objective, model, batch, accumulate=2), expected)
        assert_same(terms_and_gradient(objective, model, padded(batch, rows=2, columns=5)), expected)


class TestGrpo:
    @pytest.fixture(scope="class")
    def objective(self):
        settings = {"kl": {"beta": 0.1}, "temperature": 0.7, "max_new_tokens": 6}
        return objective_of({"kind": "policy", "train_file": "nowhere", **settings})

    @pytest.fixture(scope="class")
    def batch(self, tokenizer):
        rng = np.random.default_rng(0)
        encoded = [tokenizer.encode_chat(record["messages"]) for record in CHATS]
        packed = PackedChats(encoded, row_length=32)
        packed.rows = [[index] for index in range(4)]
        rows = packed.batch(np.arange(4))["text"]
        drawn = [(-6 + rng.normal(size=rows.tokens.shape) * 0.3).astype(np.float32) for _ in range(2)]
        values = {
            "sampled_BL": drawn[0] * rows.loss_weights,
            "reference_BL": drawn[1] * rows.loss_weights,
            "advantages_BL": rng.normal(size=(4, 1)).astype(np.float32) * rows.loss_weights,
            "lengths_B": rows.loss_weights.sum(axis=1),
            "is_truncated_B": np.zeros(4, np.float32),
            "sync_difference_B": np.zeros(4, np.float32),
            "rewards_B": np.array([1, 0, 0, 1], np.float32),
            "has_signal_B": np.array([1, 1, 0, 0], np.float32),
        }
        return Batch({"answers": rows}, values)

    def test_padding_and_accumulation_change_nothing(self, objective, batch, model):
        expected = terms_and_gradient(objective, model, batch)
        assert_same(terms_and_gradient(objective, model, batch, accumulate=2), expected)
        assert_same(terms_and_gradient(objective, model, padded(batch, rows=0, columns=5)), expected)

    def test_loss_is_mean_over_tokens_of_all_answers(self, objective, batch, model):
        """Tokens of a long answer count the same as those of a short one."""
        answers, values = batch["answers"], batch.values
        logits = model.logits(model(answers.tokens, segment_ids_BL=answers.segment_ids).hidden_BLD) / 0.7
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), answers.targets[..., None], -1)[..., 0]
        ratio, a = np.exp((log_p - values["sampled_BL"]).astype(np.float64)), values["advantages_BL"]
        token_loss = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a) * answers.loss_weights
        log_ratio = (values["reference_BL"] - log_p).astype(np.float64)
        kl = (np.exp(log_ratio) - log_ratio - 1) * answers.loss_weights
        means, _ = terms_and_gradient(objective, model, batch)
        num_tokens = answers.loss_weights.sum()
        np.testing.assert_allclose(means["policy"], token_loss.sum() / num_tokens, rtol=1e-4)
        np.testing.assert_allclose(means["kl_penalty"], 0.1 * kl.sum() / num_tokens, rtol=1e-4)
        np.testing.assert_allclose(means["reward"], 0.5)
        np.testing.assert_allclose(means["groups_with_signal"], 0.5)
        np.testing.assert_allclose(means["completion_length"], num_tokens / 4)

    def test_tokens_outside_answers_have_no_effect(self, objective, batch, model):
        expected = terms_and_gradient(objective, model, batch)
        answers = batch["answers"]
        targets = np.where(answers.loss_weights > 0, answers.targets, 7)
        changed = replace(batch, streams={"answers": replace(answers, targets=targets)})
        assert_same(terms_and_gradient(objective, model, changed), expected)
