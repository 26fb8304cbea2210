"""Near-duplicates: MinHash signatures (Broder, 1997), split into bands that hash similar documents together (LSH)."""

import math

import numpy as np
import rensa

from maxlm.data.shingles import hash_ngrams

_SIGNATURE_SEED = 20
_TARGET_RECALL = 0.99


def make_signatures(words: list[np.ndarray], *, shingle_words: int, num_permutations: int) -> np.ndarray:
    """MinHash signatures of documents.

    Args:
      words: the word hashes of each document. A document shorter than a shingle is a single shingle.

    Returns:
      `[num_documents, num_permutations]` uint32. The fraction of equal entries estimates the Jaccard similarity of two
      documents' sets of shingles.
    """
    if not words:
        return np.empty((0, num_permutations), np.uint32)
    shingles = [np.unique(hash_ngrams(w, max(1, min(shingle_words, len(w))))) for w in words]
    offsets = np.cumsum([0, *map(len, shingles)])
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets.astype(np.uint64), num_permutations, _SIGNATURE_SEED
    )
    return np.array(digests.to_rows(), np.uint32)


class NearDuplicates:
    """An LSH index of the signatures of the kept documents.

    Documents with similarity `threshold` share a bucket with probability 0.99 or more; comparing full signatures then
    decides whether they are near-duplicates. Signatures only estimate the similarity, so the threshold is lowered by
    two standard deviations: about 2 in 100 copies just at the threshold are missed.
    Memory: about 4 KB per document with 128 permutations.
    """

    def __init__(self, *, threshold: float, num_permutations: int):
        self._lowest_estimate = threshold - 2 * math.sqrt(threshold * (1 - threshold) / num_permutations)
        self._rows_per_band = _rows_per_band(threshold, num_permutations)
        self._num_bands = num_permutations // self._rows_per_band
        self._buckets: list[dict[bytes, tuple[int, ...]]] = [{} for _ in range(self._num_bands)]
        self._signatures = np.empty((1024, num_permutations), np.uint32)
        self._num_kept = 0

    def add(self, signature: np.ndarray) -> tuple[int, float] | None:
        """Keep a document, unless its estimated similarity to a kept one reaches the threshold.

        Args:
          signature: `[num_permutations]` uint32.

        Returns:
          None if the document is kept; its number is the count of those kept before. Otherwise the number of the most
          similar kept document, and the similarity.
        """
        width = self._rows_per_band
        keys = [signature[band * width : (band + 1) * width].tobytes() for band in range(self._num_bands)]
        candidates = sorted({n for bucket, key in zip(self._buckets, keys) for n in bucket.get(key, ())})
        if candidates:
            similarities = (self._signatures[candidates] == signature).mean(axis=1)
            best = int(similarities.argmax())
            if similarities[best] >= self._lowest_estimate:
                return candidates[best], float(similarities[best])
        if self._num_kept == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._num_kept] = signature
        for bucket, key in zip(self._buckets, keys):
            bucket[key] = (*bucket.get(key, ()), self._num_kept)
        self._num_kept += 1
        return None


def _rows_per_band(threshold: float, num_permutations: int) -> int:
    """The longest bands for which documents at the threshold share at least one with the target recall."""
    for rows in range(num_permutations, 1, -1):
        if 1 - (1 - threshold**rows) ** (num_permutations // rows) >= _TARGET_RECALL:
            return rows
    return 1
