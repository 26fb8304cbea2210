"""Advantages of sampled answers.

Dimensions: N prompts, G answers per prompt (a group).
"""

import numpy as np

# Keeps advantages bounded in groups whose rewards are nearly equal.
STD_EPSILON = 1e-4


def group_advantages(rewards_NG: np.ndarray, *, normalize_std: bool) -> np.ndarray:
    """The advantage of each answer over its group.

        A_ng = (r_ng - mean_g r_ng) / (std_g r_ng + 1e-4)

    with the sample standard deviation (G - 1 in the divisor); without `normalize_std` only the difference, which
    does not favor prompts that are almost solved or almost hopeless (arXiv:2402.03300, arXiv:2503.20783). A group
    with equal rewards has zero advantages.

    Returns:
      float32 [N, G].
    """
    rewards_NG = np.asarray(rewards_NG, np.float64)
    centered_NG = rewards_NG - rewards_NG.mean(axis=1, keepdims=True)
    if normalize_std:
        centered_NG = centered_NG / (rewards_NG.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON)
    # The mean of equal numbers may differ from them in the last bit.
    return np.where(has_signal(rewards_NG)[:, None], centered_NG, 0.0).astype(np.float32)


def leave_one_out_advantages(rewards_NG: np.ndarray) -> np.ndarray:
    """The advantage of each answer over the mean of the others in its group (RLOO, arXiv:2402.14740).

    Returns:
      float32 [N, G].
    """
    rewards_NG = np.asarray(rewards_NG, np.float64)
    size = rewards_NG.shape[1]
    others_NG = (rewards_NG.sum(axis=1, keepdims=True) - rewards_NG) / (size - 1)
    return np.where(has_signal(rewards_NG)[:, None], rewards_NG - others_NG, 0.0).astype(np.float32)


def has_signal(rewards_NG: np.ndarray) -> np.ndarray:
    """Whether the rewards of a group differ, so that its advantages are nonzero: bool [N]."""
    return np.ptp(rewards_NG, axis=1) > 0
