"""Read a file in blocks or lines, compressed or not. The part before a corruption is still read."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

_BLOCK = 1 << 16
_COMPRESSED_BLOCK = 1 << 14  # small, because the rest of a block is lost after a corruption
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

# Magic bytes of compressed files, and their decompressors. A zstd window is at most 2 GB (--long=31).
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}


class BrokenFile(Exception):  # noqa: N818 - it ends an iteration and is always caught
    """A file cannot be read to the end; `rest` is the truncated last line."""

    def __init__(self, message: str, rest: bytes = b""):
        self.rest = rest
        super().__init__(message)


def read_blocks(path: Path) -> Iterator[bytes]:
    """Read the decompressed content of a file in non-empty blocks of varying size.

    Raises:
      BrokenFile: after the last block that can be read.
    """
    is_first = True
    try:
        for block in _decompressed(path):
            if is_first and block.startswith(_UTF16_MARKS) and b"\0" in block:
                raise BrokenFile("is UTF-16 text; convert it with: iconv -f UTF-16 -t UTF-8")
            is_first = False
            yield block
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise BrokenFile(f"its compressed data cannot be read to the end: {error}") from None
    except MemoryError:
        raise BrokenFile("its compressed data needs more memory than available") from None
    except OSError as error:
        raise BrokenFile(f"cannot be read: {error.strerror}") from None


def line_end(first_block: bytes) -> bytes:
    """The line end of a file: a newline, or a carriage return if the first block has no newline."""
    return b"\r" if b"\r" in first_block and b"\n" not in first_block else b"\n"


def read_text_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read the lines of a file, numbered from 1, each with its line end and without a byte order mark.

    Raises:
      BrokenFile: after the last complete line that can be read.
    """
    number, end = 0, b""
    parts: list[bytes] = []  # of the line that is not complete yet
    problem = None
    blocks = read_blocks(path)
    while True:
        try:
            block = next(blocks, b"")
        except BrokenFile as error:
            problem, block = str(error), b""
        if not block:
            break
        end = end or line_end(block)
        *lines, rest = block.split(end)
        for line in lines:
            number += 1
            yield number, b"".join([*parts, line, end]).removeprefix(_BYTE_ORDER_MARK)
            parts.clear()
        parts.append(rest)
    rest = b"".join(parts).removeprefix(_BYTE_ORDER_MARK)
    if problem is not None:
        raise BrokenFile(problem, rest)
    if rest:
        yield number + 1, rest


def _decompressed(path: Path) -> Iterator[bytes]:
    """Decompress a file; gzip and zstd files may have several members, and zeros after them."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), path.suffix.lower())
        if compression not in _DECOMPRESSORS:
            while block := file.read(_BLOCK):
                yield block
            return
        member = None
        while block := file.read(_COMPRESSED_BLOCK):
            while block := block if member else block.lstrip(b"\0"):
                member = member or _DECOMPRESSORS[compression]()
                if data := member.decompress(block):
                    yield data
                block, member = (member.unused_data, None) if member.eof else (b"", member)
    if member is not None:
        raise EOFError("it is truncated")
