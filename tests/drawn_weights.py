"""Weights of tiny models, drawn from a seed, so that none have to be stored."""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a model: vectors away from 0, and norms from 0 and 1, so that a missing one shows."""
    normal = np.random.default_rng([7, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if len(shape) > 1:
        is_table = "embed" in name or "wte" in name or "wpe" in name
        return normal * np.float32(0.5 if is_table else shape[1] ** -0.5)
    return np.float32(0.6 if name.endswith("weight") else 0) + np.float32(0.2) * normal


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the mask of real ones, [2, 16]: the second row ends with padding."""
    tokens = np.random.default_rng(3).integers(3, 67, (2, 16)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, 11:] = 0
    return np.where(mask == 1, tokens, 0).astype(np.int32), mask
