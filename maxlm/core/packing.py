"""Packing of sequences into rows."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the items of each bin. Bins hold at most `capacity`; no item may be longer.

    Bit n of `free` is set if some open bin has n left; the lowest set bit at or above an item's length is the tightest
    fit.
    """
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            index = open_bins[space].pop()
            if not open_bins[space]:
                free &= ~(1 << space)
        else:
            space, index = capacity, len(bins)
            bins.append([])
        bins[index].append(item)
        if left := space - length:
            open_bins[left].append(index)
            free |= 1 << left
    return bins
