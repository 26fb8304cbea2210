"""JSON objects in which each key stands once."""

from typing import Any


class DuplicateKeyError(ValueError):
    """A key that stands twice."""

    def __init__(self, key: str):
        super().__init__(f"the key {key!r} stands twice in one object")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a JSON decoder that refuses what the standard one takes in silence.

    Raises:
      DuplicateKeyError: naming the first such key.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in value if keys.count(key) > 1))
    return value
