"""Which of many items a validation reads where it does not read all: a fixed choice that is spread evenly over them."""

from collections.abc import Sequence

import numpy as np


def spread_order(count: int) -> np.ndarray:
    """A fixed permutation of 0 ... count - 1 of which each beginning is spread evenly over the whole: int64 [count].

    A van der Corput sequence in base 2, scrambled by a hash (Owen, 1995), so that it does not go in step with data that
    repeats at regular distances.
    """
    bits = max(count - 1, 1).bit_length()
    indices, keys = np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)
    for level in range(bits):
        shift = np.uint64(bits - 1 - level)
        bit = (indices >> shift) & np.uint64(1)
        # The two halves of a stretch are exchanged, or not, by the hash of where it lies.
        stretch = (indices >> shift >> np.uint64(1)) + np.uint64(1 << level)
        keys |= (bit ^ (_hash(stretch) & np.uint64(1))) << np.uint64(level)
    return np.argsort(keys)


def even_sample(groups: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """At most `limit` of the items of all groups, ascending; those of each group are spread evenly over it.

    The first of each group come before all others, so that none is left out while there are as many places as groups;
    beyond that, each has places in proportion to its size. What a limit takes, a larger one takes too.

    Args:
      groups: the items of each, int64, in order; an item may be of several groups. Their order decides ties alone.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        return np.empty(0, np.int64)
    items = np.concatenate([group[spread_order(len(group))] for group in groups])
    ranks = np.concatenate([(np.arange(len(group)) + 0.5) / len(group) for group in groups])
    # Of the firsts, those of larger groups come first.
    ranks[np.cumsum([0, *map(len, groups[:-1])])] = [-len(group) for group in groups]
    ranked = items[np.argsort(ranks, kind="stable")]
    _, first_places = np.unique(ranked, return_index=True)
    return np.sort(ranked[np.sort(first_places)[:limit]])


def _hash(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
