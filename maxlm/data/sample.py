"""A fixed, evenly spread sample of items, for validations that do not read all of them."""

from collections.abc import Sequence

import numpy as np


def spread_order(count: int) -> np.ndarray:
    """A fixed permutation of 0 ... count - 1 whose every prefix is spread evenly over the range: int64 [count].

    A van der Corput sequence in base 2, scrambled by a hash (Owen, 1995), so that it does not align with periodic data.
    """
    bits = max(count - 1, 1).bit_length()
    indices, keys = np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)
    for level in range(bits):
        shift = np.uint64(bits - 1 - level)
        bit = (indices >> shift) & np.uint64(1)
        # The hash of an interval's position decides whether its halves are swapped.
        interval = (indices >> shift >> np.uint64(1)) + np.uint64(1 << level)
        keys |= (bit ^ (_hash(interval) & np.uint64(1))) << np.uint64(level)
    return np.argsort(keys)


def even_sample(groups: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """At most `limit` items of all groups, ascending and spread evenly over each group.

    The first item of each group has priority, so that no group is omitted if `limit` is at least the number of groups;
    beyond that, each is represented in proportion to its size. A larger limit selects a superset.

    Args:
      groups: the items of each, int64, in order; an item may be in several groups. Their order only breaks ties.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        return np.empty(0, np.int64)
    items = np.concatenate([group[spread_order(len(group))] for group in groups])
    ranks = np.concatenate([(np.arange(len(group)) + 0.5) / len(group) for group in groups])
    # Among the first items, those of larger groups have priority.
    ranks[np.cumsum([0, *map(len, groups[:-1])])] = [-len(group) for group in groups]
    ranked = items[np.argsort(ranks, kind="stable")]
    _, first_places = np.unique(ranked, return_index=True)
    return np.sort(ranked[np.sort(first_places)[:limit]])


def _hash(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
