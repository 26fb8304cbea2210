"""Losses, averages and advantages of sampled answers against their equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from maxlm.objectives.sampling.policy_advantages import AnyAdvantage, RewardedAnswers
from maxlm.objectives.sampling.policy_losses import (
    AnySurrogate,
    ImportanceConfig,
    KlConfig,
    PolicyTokens,
    average,
    close_answers,
)
from maxlm.ops.advantages import overlong_penalty
from maxlm.ops.policy_losses import high_entropy_tokens, value_loss

B, L, DELTA = 4, 7, 1e-6
LENGTHS = np.array([5, 1, 7, 3])
STARTS = np.array([1, 0, 0, 2])
IS_ANSWER = (np.arange(L) >= STARTS[:, None]) & (np.arange(L) < (STARTS + LENGTHS)[:, None])
# An observation of a tool within an answer.
IS_ANSWER[2, 3] = False
MASK = IS_ANSWER.astype(np.float64)


def float32(x):
    return np.float64(np.float32(x))


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    log_p = float32(-random.uniform(0.1, 3, (B, L)))
    old = float32(log_p + random.normal(0, 0.3, (B, L)))
    advantages = float32(np.array([1.3, -0.7, -1.5, 0.4])[:, None] * np.ones((B, L)))
    return log_p, old, advantages


def geometric_mean(log_ratio):
    return (MASK * log_ratio).sum(axis=1, keepdims=True) / MASK.sum(axis=1, keepdims=True) * np.ones((B, L))


def clip(log_ratio, a, low=0.2, high=0.28, largest=np.inf, bound=np.inf):
    ratio = np.exp(log_ratio)
    loss = -np.minimum(np.minimum(ratio, largest) * a, np.clip(ratio, 1 - low, 1 + high) * a)
    return np.where(a < 0, np.minimum(loss, -bound * a), loss)


def constant(function):
    """A function of the log-probabilities that has no gradient: its value where they are not moved."""
    return lambda log_p, old, a, here: function(here - old)


def vespo(log_ratio, a):
    log_w = (MASK * log_ratio).sum(axis=1, keepdims=True)
    k, d = np.where(a >= 0, 2.0, 3.0), np.where(a >= 0, 3.0, 2.0)
    return np.exp(log_w) ** k * np.exp(d * (1 - np.exp(log_w)))


# Settings, and the loss of tokens as a function of log p, log p_old, A, and of log p as a constant.
SURROGATES = {
    "clip": ({}, lambda x, old, a, here: clip(x - old, a)),
    "clip, answers": (
        {"ratio": "answer", "low": 0.05, "high": 0.1},
        lambda x, old, a, here: clip(geometric_mean(x - old), a, 0.05, 0.1),
    ),
    "clip, two-sided": ({"largest_ratio": 1.1}, lambda x, old, a, here: clip(x - old, a, largest=1.1)),
    "clip, dual": ({"largest_loss_ratio": 1.2}, lambda x, old, a, here: clip(x - old, a, bound=1.2)),
    "cispo": (
        {"low": 0.1, "high": 0.15},
        lambda x, old, a, here: -np.clip(np.exp(here - old), 0.9, 1.15) * a * x,
    ),
    "sapo": (
        {},
        lambda x, old, a, here: (
            -a * 4 / np.where(a > 0, 1.0, 1.05) / (1 + np.exp(-np.where(a > 0, 1.0, 1.05) * (np.exp(x - old) - 1)))
        ),
    ),
    "vespo": ({}, lambda x, old, a, here: -vespo(here - old, a) * a * x),
    "reinforce": ({}, lambda x, old, a, here: -a * x),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_and_its_gradient(name, arrays):
    settings, reference = SURROGATES[name]
    surrogate = TypeAdapter(AnySurrogate).validate_python({"kind": name.partition(",")[0], **settings})
    log_p, old, advantages = arrays

    def ours(log_p):
        tokens = PolicyTokens(log_p, log_p - jnp.float32(old), jnp.float32(advantages), jnp.float32(MASK))
        return surrogate(tokens)

    loss, is_clipped = ours(jnp.float32(log_p))
    np.testing.assert_allclose(loss[IS_ANSWER], reference(log_p, old, advantages, log_p)[IS_ANSWER], rtol=2e-5)
    gradient = jax.grad(lambda x: jnp.sum(MASK * ours(x)[0]))(jnp.float32(log_p))
    for row, column in zip(*np.nonzero(IS_ANSWER)):
        moved = np.zeros((B, L))
        moved[row, column] = DELTA
        sums = [(MASK * reference(log_p + sign * moved, old, advantages, log_p)).sum() for sign in (1, -1)]
        np.testing.assert_allclose(gradient[row, column], (sums[0] - sums[1]) / (2 * DELTA), rtol=2e-4, atol=2e-6)
    if name.startswith("clip"):
        np.testing.assert_array_equal((gradient == 0)[IS_ANSWER], np.asarray(is_clipped)[IS_ANSWER])
        assert np.asarray(is_clipped)[IS_ANSWER].any()


@pytest.mark.parametrize("how", ["tokens", "answers", "answer_sums", "longest"])
def test_averages(how):
    loss = np.random.default_rng(1).normal(size=(B, L))
    means = [loss[row][IS_ANSWER[row]].mean() for row in range(B)]
    sums = [loss[row][IS_ANSWER[row]].sum() for row in range(B)]
    expected = {
        "tokens": loss[IS_ANSWER].mean(),
        "answers": np.mean(means),
        "answer_sums": np.mean(sums),
        "longest": np.mean(sums) / 9,
    }
    padded = [np.pad(x, ((0, 2), (0, 3))) for x in (loss, MASK)]
    for loss_BL, is_answer_BL in ((loss, MASK), padded):
        term = average(jnp.float32(loss_BL), jnp.float32(is_answer_BL), how, longest=9)
        np.testing.assert_allclose(term.mean(), expected[how], rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("true_gradient", [False, True])
def test_divergence_and_its_gradient(estimator, true_gradient, arrays):
    log_p, reference, _ = arrays
    values = {"k1": lambda r: r, "k2": lambda r: r**2 / 2, "k3": lambda r: np.exp(-r) + r - 1}
    gradients = {"k1": np.ones_like, "k2": lambda r: r, "k3": lambda r: 1 - np.exp(-r)}
    kl = KlConfig(estimator=estimator, true_gradient=true_gradient)

    def ours(x):
        return kl.loss(PolicyTokens(x, jnp.zeros_like(x), None, None), jnp.float32(reference))

    ratio = log_p - reference
    np.testing.assert_allclose(ours(jnp.float32(log_p)), values[estimator](ratio), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(ours(x)))(jnp.float32(log_p))
    expected = gradients["k2" if true_gradient else estimator](ratio)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_only_k2_has_the_gradient_of_the_divergence_of_the_policy():
    """Over all outcomes, the mean of the gradient of the estimator of samples: with it, sum_v d KL / d theta."""
    random = np.random.default_rng(3)
    logits, reference = random.normal(size=5), np.log(random.dirichlet(np.ones(5)))

    def log_softmax(x):
        return x - jnp.log(jnp.sum(jnp.exp(x)))

    def exact(logits):
        log_p = log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - reference))

    def sampled(logits, kl):
        log_p = log_softmax(logits)
        zeros = jnp.zeros_like(log_p)
        return jnp.sum(
            jax.lax.stop_gradient(jnp.exp(log_p)) * kl.loss(PolicyTokens(log_p, zeros, None, None), reference)
        )

    expected = jax.grad(exact)(logits)
    for kl, is_right in ((KlConfig(estimator="k2"), True), (KlConfig(true_gradient=True), True), (KlConfig(), False)):
        assert np.allclose(jax.grad(sampled)(logits, kl), expected, atol=1e-5) == is_right


@pytest.mark.parametrize("level", ["token", "answer"])
def test_importance_weights(level, arrays):
    log_p, old, _ = arrays
    log_ratio = log_p - old
    weights = ImportanceConfig(level=level, cap=1.2).weights(jnp.float32(log_ratio), jnp.float32(MASK))
    if level == "answer":
        log_ratio = (MASK * log_ratio).sum(axis=1, keepdims=True) * np.ones((B, L))
    np.testing.assert_allclose(weights, np.minimum(np.exp(log_ratio), 1.2), rtol=1e-5)


def test_bad_answers_of_distant_policies_are_left_out():
    """Of answers with mean log p_sampled - log p of 0.5: the bad one, and not the good one."""
    log_ratio = -0.5 * jnp.ones((3, 4))
    advantages = jnp.array([[1.0], [-1.0], [-1.0]]) * jnp.ones((3, 4))
    mask = jnp.ones((3, 4)).at[2].set(jnp.array([1, 0, 0, 0]))
    tokens = PolicyTokens(log_ratio, log_ratio.at[2, 0].set(-0.1), advantages, mask)
    assert close_answers(tokens, 0.3)[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip):
    random = np.random.default_rng(0)
    values, old, returns = (float32(random.normal(size=50)) for _ in range(3))

    def reference(v):
        near = v if clip is None else np.clip(v, old - clip, old + clip)
        return 0.5 * np.maximum((v - returns) ** 2, (near - returns) ** 2)

    def ours(v):
        return value_loss(v, jnp.float32(old), jnp.float32(returns), clip=clip)

    np.testing.assert_allclose(ours(jnp.float32(values)), reference(values), rtol=1e-5, atol=1e-7)
    gradient = jax.grad(lambda v: jnp.sum(ours(v)))(jnp.float32(values))
    np.testing.assert_allclose(
        gradient, (reference(values + DELTA) - reference(values - DELTA)) / (2 * DELTA), rtol=1e-4, atol=1e-6
    )


def answers_of(**changes):
    """Two prompts with two answers each."""
    random = np.random.default_rng(5)
    given = {
        "rewards_NG": random.normal(size=(2, 2)),
        "is_answer_BL": IS_ANSWER,
        "penalties_BL": 0.1 * random.normal(size=(B, L)) * MASK,
        "add_up": lambda x: x,
        "greedy_N": random.normal(size=2),
        "values_BL": random.normal(size=(B, L)),
    }
    return RewardedAnswers(**{**given, **changes})


def advantage(answers, **settings):
    return TypeAdapter(AnyAdvantage).validate_python(settings)(answers)


def whitened(x):
    found = x[IS_ANSWER]
    return np.where(IS_ANSWER, (x - found.mean()) / np.sqrt(found.var(ddof=1) + 1e-8), 0)


def token_rewards(answers):
    """The reward of each answer at its last token, less the penalties."""
    rewards = -np.where(IS_ANSWER, answers.penalties_BL, 0)
    for row in range(B):
        rewards[row, np.flatnonzero(IS_ANSWER[row])[-1]] += answers.rewards_NG.reshape(-1)[row]
    return rewards


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "group"}, lambda r: (r - r.mean(1)[:, None]) / (r.std(1, ddof=1)[:, None] + 1e-4)),
        (
            {"kind": "group", "population_std": True, "std_epsilon": 1e-6},
            lambda r: (r - r.mean(1)[:, None]) / (r.std(1)[:, None] + 1e-6),
        ),
        ({"kind": "group", "normalize_std": False}, lambda r: r - r.mean(1)[:, None]),
        ({"kind": "leave_one_out"}, lambda r: r - r[:, ::-1]),
        (
            {"kind": "length_weighted"},
            lambda r: r - ((r * MASK.sum(1).reshape(2, 2)).sum(1) / MASK.sum(1).reshape(2, 2).sum(1))[:, None],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_advantages_of_answers(settings, expected):
    """Penalties of tokens are part of an answer's reward."""
    answers = answers_of()
    found, returns = advantage(answers, **settings)
    rewards = token_rewards(answers).sum(axis=1).reshape(2, 2)
    np.testing.assert_allclose(found, MASK * expected(rewards).reshape(B, 1), rtol=1e-5, atol=1e-7)
    assert returns is None


def test_whitened_group_advantages():
    answers = answers_of()
    plain, _ = advantage(answers, kind="group", normalize_std=False)
    found, _ = advantage(answers, kind="group", normalize_std=False, whiten=True)
    np.testing.assert_allclose(found, whitened(np.float64(plain)), rtol=1e-4, atol=1e-6)


def test_advantages_over_greedy_answers():
    answers = answers_of()
    rewards = token_rewards(answers)
    to_go = np.stack([[rewards[row, place:].sum() for place in range(L)] for row in range(B)])
    found, _ = advantage(answers, kind="greedy")
    np.testing.assert_allclose(found, MASK * (to_go - np.repeat(answers.greedy_N, 2)[:, None]), rtol=1e-5, atol=1e-6)


def test_batch_advantages_are_discounted_over_the_tokens_of_the_answer():
    answers = answers_of()
    rewards, to_go = token_rewards(answers), np.zeros((B, L))
    for row in range(B):
        places = np.flatnonzero(IS_ANSWER[row])
        for number, place in enumerate(places):
            later = places[number:]
            to_go[row, place] = sum(0.9**k * rewards[row, each] for k, each in enumerate(later))
    found, _ = advantage(answers, kind="batch", discount=0.9)
    np.testing.assert_allclose(found, whitened(to_go), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_generalized_advantages(whiten):
    """The definition: a discounted sum of all later differences, over the tokens of the answer alone."""
    answers = answers_of()
    rewards, expected = token_rewards(answers), np.zeros((B, L))
    for row in range(B):
        places = np.flatnonzero(IS_ANSWER[row])
        values = [*answers.values_BL[row, places], 0.0]
        delta = [rewards[row, place] + 0.97 * values[k + 1] - values[k] for k, place in enumerate(places)]
        for k, place in enumerate(places):
            expected[row, place] = sum((0.97 * 0.8) ** (j - k) * delta[j] for j in range(k, len(places)))
    found, returns = advantage(answers, kind="gae", discount=0.97, trace_decay=0.8, whiten=whiten)
    np.testing.assert_allclose(returns, MASK * (expected + answers.values_BL), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, whitened(expected) if whiten else expected, rtol=1e-4, atol=1e-6)


def test_equal_rewards_give_no_signal_and_nothing_infinite():
    answers = answers_of(rewards_NG=np.full((2, 2), 0.1), penalties_BL=np.zeros((B, L)), values_BL=np.zeros((B, L)))
    for settings in ({"kind": "group"}, {"kind": "leave_one_out"}, {"kind": "length_weighted"}):
        assert (advantage(answers, **settings)[0] == 0).all()
    for kind in ("batch", "gae"):
        assert np.isfinite(advantage(answers, kind=kind)[0]).all()


@pytest.mark.parametrize("fraction", [0.05, 0.4, 1.0])
def test_tokens_of_highest_entropy(fraction):
    """In any part of a batch, the tokens above the quantile of all, by its definition: linear between ranks."""
    entropies = float32(np.random.default_rng(1).gamma(2.0, 0.5, (B, L)))
    ranked = np.sort(entropies[IS_ANSWER])
    place = (1 - fraction) * (len(ranked) - 1)
    low, high = ranked[int(np.floor(place))], ranked[int(np.ceil(place))]
    threshold = low + (place - np.floor(place)) * (high - low)
    expected = IS_ANSWER & (entropies >= threshold - 1e-12)
    for part in (slice(0, 2), slice(2, B)):
        found = high_entropy_tokens(entropies[part], IS_ANSWER[part], entropies[IS_ANSWER], fraction=fraction)
        np.testing.assert_array_equal(found, expected[part])
    assert expected.sum() == pytest.approx(fraction * len(ranked), abs=1)


def test_penalty_of_answers_near_the_limit():
    penalties = overlong_penalty(np.array([1, 6, 7, 8, 10]), longest=10, buffer=4)
    np.testing.assert_allclose(penalties, [0, 0, 0.25, 0.5, 1])
    assert (overlong_penalty(np.array([10]), longest=10, buffer=0) == 0).all()
