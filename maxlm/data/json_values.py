"""The JSON values of a file: one per line, a list, objects over several lines, or rows of Parquet.

Values are parsed one after another at any position, so the layout of a file, or how it was concatenated, does not
matter: line ends of any kind, empty lines, byte order marks and commas between values are skipped. A malformed value is
reported with its location, and reading continues after it.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from maxlm.data.lines import BrokenFile, line_end, read_blocks
from maxlm.runtime.json_objects import DuplicateKeyError, unique_keys

# Separators between two values.
_GAP = re.compile(r"[\s,\ufeff]*")
_LIST_OF_RECORDS = re.compile(r"\[[\s\ufeff]*([{\]]|\Z)")
# An error this close to the end of the buffer may be due to truncation: the longest name in JSON is "-Infinity".
_LONGEST_NAME = 16
_PARQUET_BATCH = 1024


@dataclass(frozen=True)
class Value:
    """A JSON value; `place` is unique within its file, `where` is FILE:LINE for messages."""

    place: str
    where: str
    value: Any


@dataclass(frozen=True)
class Broken:
    """A malformed value; `reason` is a category for counting, `detail` a sentence, `text` the raw text."""

    place: str
    where: str
    reason: str
    detail: str
    text: str


def read_values(path: Path) -> Iterator[Value | Broken]:
    """The values of a file, in order; items of a list at the start of the file have their index as `place`.

    Compressed files are read too. Memory is bounded by the largest value.
    """
    if is_parquet(path):
        yield from _read_rows(path)
    else:
        yield from _Reader(path).values()


def is_parquet(path: Path) -> bool:
    """Whether a file has Parquet's extension or magic bytes."""
    if path.suffix.lower() == ".parquet":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def lookup(value: Any, path: str) -> Any:
    """The value at a dotted path in nested objects and lists, such as `a.b.0`; None if there is none.

    A key that contains dots itself takes precedence.
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    head, dot, rest = path.partition(".")
    if isinstance(value, dict) and head in value:
        value = value[head]
    elif isinstance(value, list) and head.isdecimal() and int(head) < len(value):
        value = value[int(head)]
    else:
        return None
    return lookup(value, rest) if dot else value


def shown(raw: bytes | str) -> str:
    """Malformed text made printable and encodable as UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", raw) if isinstance(raw, str) else raw.decode(errors="replace")


class _Reader:
    """Reads values from `text[pos:]`, which grows as the file is read."""

    def __init__(self, path: Path):
        self.path = path
        self.blocks = read_blocks(path)
        # Bytes that are not UTF-8 become lone surrogates, which valid UTF-8 cannot contain.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.pos = "", 0
        self.is_whole = False  # the whole readable part of the file has been read
        self.problem: str | None = None  # why the file cannot be read to the end
        self.newline = ""
        self.line, self.line_start = 1, 0
        self.indent: str | None = ""  # whitespace before the value in its line; None if another value precedes it
        self.in_list = self.began_with_list = False
        self.index: int | None = None  # of the next item, in a list at the start of the file

    def values(self) -> Iterator[Value | Broken]:
        is_start = True
        while self._skip_gap():
            if self.in_list and self.text[self.pos] == "]":
                self._advance(self.pos + 1)
                self.in_list, self.index, self.indent = False, None, None
            elif not self.in_list and self._starts_list():
                self._advance(self.pos + 1)
                self.in_list = True
                if is_start:
                    self.began_with_list, self.index = True, 0
            else:
                yield self._next_value()
                if self.index is not None:
                    self.index += 1
            is_start = False
        if self.problem is not None:
            yield self._broken("broken_text", self.problem, "")
        elif self.in_list:
            yield self._broken("no_json", "the list is not closed: its end is missing", "")
        elif not self.newline:
            yield Broken("", str(self.path), "empty_file", "is empty", "")

    def _next_value(self) -> Value | Broken:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                if self._may_be_truncated(error) and self._read_more():
                    continue
                return self._skip_broken(error)
            except RecursionError:
                return self._skip_broken("nested too deeply")
            except DuplicateKeyError as error:
                return self._skip_broken(str(DuplicateKeyError(shown(error.key))))
            except ValueError as error:
                return self._skip_broken(str(error))
            # A number may continue in the next block.
            if end == len(self.text) and isinstance(value, int | float) and self._read_more():
                continue
            place, where, raw = self._place(), self._where(), self.text[self.pos : end]
            self._advance(end)
            self.indent = None
            if _holds_bytes(raw):
                return Broken(place, where, "broken_text", "is not valid UTF-8", shown(raw))
            return Value(place, where, value)

    def _may_be_truncated(self, error: json.JSONDecodeError) -> bool:
        # Strings end in their line: an unterminated one has reached the end of the buffer.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _LONGEST_NAME

    def _skip_broken(self, error: json.JSONDecodeError | str) -> Broken:
        """Skip malformed JSON: to the next line, or to the next value with the same indentation."""
        while (line_end := self.text.find(self.newline, self.pos)) < 0 and self._read_more():
            pass
        next_line = line_end + 1 if line_end >= 0 else len(self.text)
        line = self.text[self.pos : next_line].rstrip()
        detail, opens_lines = self._explain(error, line)
        target = self._next_alike() if self.in_list or opens_lines else next_line
        is_last = target == len(self.text) and self.is_whole
        reason = "broken_text" if _holds_bytes(line) else "no_json"
        if is_last and self.problem is not None:
            reason, detail, self.problem = "broken_text", self.problem, None
        elif is_last and self.in_list:
            detail += "; the rest of the list cannot be read"
        broken = self._broken(reason, detail, shown(self.text[self.pos : target].rstrip("\r\n")))
        self._advance(target)
        self.indent = ""
        if is_last:
            self.in_list = False  # the missing end of the list is already reported
        return broken

    def _explain(self, error: json.JSONDecodeError | str, line: str) -> tuple[str, bool]:
        """The problem of the value that begins with `line`, and whether it continues past the line."""
        if _holds_bytes(line):
            return "is not valid UTF-8", False
        if line.startswith("\0"):
            return "contains zero bytes, as after an interrupted write", False
        if isinstance(error, str):
            problem = "it has a number of thousands of digits" if error.startswith("Exceeds the limit") else error
            return f"is not JSON: {problem}", False
        opens_lines = False
        try:
            _DECODER.raw_decode(line)
        except json.JSONDecodeError as alone:
            opens_lines = alone.pos >= len(line)
            if not opens_lines or error.pos >= len(self.text.rstrip()):
                return (
                    f"is not JSON: {alone.msg.removesuffix(' at')} at column {self._column() + alone.pos}",
                    opens_lines,
                )
        except (ValueError, RecursionError):
            pass
        number = self.line + self.text.count(self.newline, self.pos, error.pos)
        column = error.pos - self.text.rfind(self.newline, 0, error.pos)
        return f"is not JSON: {error.msg.removesuffix(' at')} at line {number}, column {column}", opens_lines

    def _next_alike(self) -> int:
        """The start of the next line with a value of the same indentation; else the end of the file."""
        start = None if self.indent is None else re.compile(f"{self.newline}{re.escape(self.indent)}[{{\\[]")
        while not (found := start and start.search(self.text, self.pos)):
            if not self._read_more():
                return len(self.text)
        return found.start() + 1

    def _skip_gap(self) -> bool:
        """Advance to the next value; returns whether there is one."""
        while True:
            end = _GAP.match(self.text, self.pos).end()
            gap = self.text[self.pos : end].replace("\ufeff", "")
            self._advance(end)
            if self.newline and self.newline in gap:
                self.indent = gap.rpartition(self.newline)[2]
            elif self.indent is not None:
                self.indent += gap
            if self.pos < len(self.text):
                return True
            if not self._read_more():
                return False

    def _starts_list(self) -> bool:
        while (found := _LIST_OF_RECORDS.match(self.text, self.pos)) and not found[1]:
            if not self._read_more():
                return False
        return found is not None

    def _read_more(self) -> bool:
        """At least double the buffer, so that repeated parsing attempts take linear time in total."""
        parts = [self.text[self.pos :]]
        self.line_start -= self.pos
        self.pos = 0
        size = 0
        while not self.is_whole and size <= len(parts[0]):
            try:
                block = next(self.blocks, b"")
            except BrokenFile as error:
                self.problem, block = str(error), b""
            if block and not self.newline:
                self.newline = line_end(block).decode()
            self.is_whole = not block
            parts.append(self.decoder.decode(block, final=self.is_whole))
            size += len(parts[-1])
        self.text = "".join(parts)
        return size > 0

    def _advance(self, end: int) -> None:
        if self.newline and (count := self.text.count(self.newline, self.pos, end)):
            self.line += count
            self.line_start = self.text.rfind(self.newline, self.pos, end) + 1
        self.pos = end

    def _broken(self, reason: str, detail: str, text: str) -> Broken:
        return Broken(self._place(), self._where(), reason, detail, text)

    def _place(self) -> str:
        if self.index is not None:
            return str(self.index)
        is_first = self.indent is not None and not self.began_with_list
        return str(self.line) if is_first else f"{self.line}:{self._column()}"

    def _where(self) -> str:
        if self.index is not None:
            return f"{self.path}:{self.line}, item {self.index}"
        return f"{self.path}:{self._place()}"

    def _column(self) -> int:
        return self.pos - self.line_start + 1


def _read_rows(path: Path) -> Iterator[Value | Broken]:
    """The rows of a Parquet file as objects."""
    number = 0
    try:
        # Opened here, because Arrow rejects file names that are not UTF-8.
        with path.open("rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    yield Value(str(number), f"{path}, row {number}", row)
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = str(error).partition("\n")[0]
        yield Broken(str(number), f"{path}, row {number}", "broken_file", f"cannot be read as Parquet: {problem}", "")


def _holds_bytes(text: str) -> bool:
    """Whether a text contains bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
