"""Advantages of sampled answers, and of their tokens. All results are float32, computed in float64.

An answer whose reward is NaN has none: the others have the advantages that they would have without it, and its own has
no meaning.

Dimensions: N prompts, G answers per prompt (a group), B = N * G answers, L length of a row.
"""

import numpy as np

# Keeps advantages bounded where rewards are nearly equal.
STD_EPSILON = 1e-4


def group_advantages(
    rewards_NG: np.ndarray,
    *,
    normalize_std: bool,
    epsilon: float = STD_EPSILON,
    degrees_of_freedom: int = 1,
) -> np.ndarray:
    """The advantage of each answer over its group: [N, G].

        A_ng = (r_ng - mean_g r_ng) / (std_g r_ng + epsilon)

    without `normalize_std` only the difference, which does not favor prompts that are almost solved or almost hopeless
    (arXiv:2402.03300, arXiv:2503.20783). A group with equal rewards has zero advantages.

    Args:
      degrees_of_freedom: subtracted from G in the divisor of the variance.
    """
    rewards_NG = np.asarray(rewards_NG, np.float64)
    count_N1 = _num_rewarded(rewards_NG)
    centered_NG = rewards_NG - np.nansum(rewards_NG, axis=1, keepdims=True) / count_N1
    if normalize_std:
        squares_N1 = np.nansum(np.square(centered_NG), axis=1, keepdims=True)
        centered_NG = centered_NG / (np.sqrt(squares_N1 / np.maximum(count_N1 - degrees_of_freedom, 1)) + epsilon)
    # The mean of equal numbers may differ from them in the last bit.
    return np.where(has_signal(rewards_NG)[:, None], centered_NG, 0.0).astype(np.float32)


def leave_one_out_advantages(rewards_NG: np.ndarray) -> np.ndarray:
    """The advantage of each answer over the mean of the others in its group: [N, G] (RLOO, arXiv:2402.14740)."""
    rewards_NG = np.asarray(rewards_NG, np.float64)
    num_others_N1 = np.maximum(_num_rewarded(rewards_NG) - 1, 1)
    others_NG = (np.nansum(rewards_NG, axis=1, keepdims=True) - rewards_NG) / num_others_N1
    return np.where(has_signal(rewards_NG)[:, None], rewards_NG - others_NG, 0.0).astype(np.float32)


def length_weighted_advantages(rewards_NG: np.ndarray, lengths_NG: np.ndarray) -> np.ndarray:
    """The advantage of each answer over the mean weighted by length, of the least variance: [N, G] (OPO,
    arXiv:2505.23585)."""
    rewards_NG, lengths_NG = np.asarray(rewards_NG, np.float64), np.asarray(lengths_NG, np.float64)
    lengths_NG = np.where(np.isfinite(rewards_NG), lengths_NG, 0.0)
    total_N1 = np.maximum(lengths_NG.sum(axis=1, keepdims=True), 1)
    baseline_N1 = np.nansum(lengths_NG * rewards_NG, axis=1, keepdims=True) / total_N1
    return np.where(has_signal(rewards_NG)[:, None], rewards_NG - baseline_N1, 0.0).astype(np.float32)


def returns_to_go(rewards_BL: np.ndarray, is_answer_BL: np.ndarray, *, discount: float) -> np.ndarray:
    """The discounted sum of the rewards of a token and of the later ones of its answer: [B, L]; 0 elsewhere.

    Args:
      is_answer_BL: bool; other places, of prompts, tools and padding, are left out as if they did not exist.
    """
    rewards_BL = np.asarray(rewards_BL, np.float64)
    returns_BL, later_B = np.zeros_like(rewards_BL), np.zeros(len(rewards_BL))
    for place in reversed(range(rewards_BL.shape[1])):
        is_answer_B = is_answer_BL[:, place]
        later_B = np.where(is_answer_B, rewards_BL[:, place] + discount * later_B, later_B)
        returns_BL[:, place] = np.where(is_answer_B, later_B, 0.0)
    return returns_BL.astype(np.float32)


def generalized_advantages(
    rewards_BL: np.ndarray,
    values_BL: np.ndarray,
    is_answer_BL: np.ndarray,
    *,
    discount: float,
    trace_decay: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized advantage estimation over the tokens of each answer (arXiv:1506.02438).

        A_t = sum_k (discount trace_decay)^k delta_(t+k),   delta_t = r_t + discount v_(t+1) - v_t

    with v = 0 after the last token.

    Args:
      values_BL: the value before each token of an answer, which predicts the rewards from this token on.
      is_answer_BL: as in `returns_to_go`.

    Returns:
      (advantages, returns = advantages + values), each [B, L]; 0 outside of answers.
    """
    rewards_BL, values_BL = np.asarray(rewards_BL, np.float64), np.asarray(values_BL, np.float64)
    advantages_BL = np.zeros_like(rewards_BL)
    next_value_B, advantage_B = np.zeros(len(rewards_BL)), np.zeros(len(rewards_BL))
    for place in reversed(range(rewards_BL.shape[1])):
        is_answer_B, value_B = is_answer_BL[:, place], values_BL[:, place]
        delta_B = rewards_BL[:, place] + discount * next_value_B - value_B
        advantage_B = np.where(is_answer_B, delta_B + discount * trace_decay * advantage_B, advantage_B)
        next_value_B = np.where(is_answer_B, value_B, next_value_B)
        advantages_BL[:, place] = np.where(is_answer_B, advantage_B, 0.0)
    returns_BL = np.where(is_answer_BL, advantages_BL + values_BL, 0.0)
    return advantages_BL.astype(np.float32), returns_BL.astype(np.float32)


def overlong_penalty(lengths: np.ndarray, *, longest: int, buffer: int) -> np.ndarray:
    """0 for answers of up to longest - buffer tokens, then linearly up to 1 (arXiv:2503.14476, equation 13): [B]."""
    if buffer == 0:
        return np.zeros(len(lengths))
    return np.clip((np.asarray(lengths, np.float64) - (longest - buffer)) / buffer, 0.0, 1.0)


def whiten(x_BL: np.ndarray, is_answer_BL: np.ndarray, *, mean: float, variance: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-8) of the tokens of answers, and 0 elsewhere: [B, L]."""
    scaled_BL = (np.asarray(x_BL, np.float64) - mean) / np.sqrt(variance + 1e-8)
    return np.where(is_answer_BL, scaled_BL, 0.0).astype(np.float32)


def moments(x_BL: np.ndarray, is_answer_BL: np.ndarray) -> np.ndarray:
    """Sum, sum of squares and number of the values in answers: float64 [3], to be added over processes."""
    values = np.asarray(x_BL, np.float64)[np.asarray(is_answer_BL, bool)]
    return np.array([values.sum(), np.square(values).sum(), values.size])


def mean_and_variance(moments_3: np.ndarray) -> tuple[float, float]:
    """Mean and unbiased variance; both 0 without values, the variance 0 of a single one."""
    total, squares, count = moments_3
    if count == 0:
        return 0.0, 0.0
    mean = total / count
    return float(mean), float(max(squares - count * mean**2, 0.0) / max(count - 1, 1))


def has_signal(rewards_NG: np.ndarray) -> np.ndarray:
    """Whether the rewards of a group differ, so that its advantages are nonzero: bool [N]."""
    return np.fmax.reduce(rewards_NG, axis=1) - np.fmin.reduce(rewards_NG, axis=1) > 0


def _num_rewarded(rewards_NG: np.ndarray) -> np.ndarray:
    """How many answers of a group have a reward, at least 1 for divisors: [N, 1]."""
    return np.maximum(np.isfinite(rewards_NG).sum(axis=1, keepdims=True), 1)
