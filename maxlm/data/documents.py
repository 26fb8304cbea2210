"""Documents, and records that cannot be documents."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text, and where it is from."""

    id: str
    source: str
    licence: str
    text: str


@dataclass(frozen=True)
class Reject:
    """A record that was left out: kept aside with a reason, so that nothing is lost silently.

    Attributes:
      id: the record's id, or `file:line` where it has none.
      source: the source's uri.
      reason: one of a few words, to count by.
      detail: what exactly is wrong with this record.
      text: the record as far as it could be read.
    """

    id: str
    source: str
    reason: str
    detail: str
    text: str


Record = Document | Reject
