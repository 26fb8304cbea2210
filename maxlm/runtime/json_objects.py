"""JSON objects without duplicate keys."""

from typing import Any


class DuplicateKeyError(ValueError):
    """A JSON object has a duplicate key."""

    def __init__(self, key: str):
        super().__init__(f"the key {key!r} is given twice in one object")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for a JSON decoder that rejects duplicate keys, which the standard one accepts silently.

    Raises:
      DuplicateKeyError: with the first such key.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in value if keys.count(key) > 1))
    return value
