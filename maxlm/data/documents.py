"""Documents and rejected records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and its origin."""

    id: str
    source: str
    licence: str
    text: str


@dataclass(frozen=True)
class Reject:
    """A rejected record, kept with a reason so that nothing is lost silently.

    Attributes:
      id: the record's id, or `file:line` if it has none.
      source: the source's uri.
      reason: a category for counting.
      detail: the specific problem of this record.
      text: the record as far as it could be read.
    """

    id: str
    source: str
    reason: str
    detail: str
    text: str


Record = Document | Reject
