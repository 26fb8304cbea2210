"""Lines of a file, compressed or not. What stands before a break in the file is still read."""

import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

_BLOCK = 1 << 20
_COMPRESSED_BLOCK = 1 << 14  # small: where data is damaged, the rest of a block is lost
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BrokenFile(Exception):  # noqa: N818 - it ends an iteration and is always caught
    """A compressed file that breaks off or is damaged; `rest` is the line that was cut."""

    def __init__(self, message: str, rest: bytes):
        self.rest = rest
        super().__init__(message)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, counted from 1, each with its line end.

    Raises:
      BrokenFile: after the last whole line that can be read.
    """
    number, rest = 0, b""
    problem = None
    blocks = _decompressed(path)
    while True:
        try:
            block = next(blocks, b"")
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            problem = f"its compressed data cannot be read to the end: {error}"
            break
        if not block:
            break
        lines = io.BytesIO(rest + block).readlines()
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            number += 1
            yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
    if problem:
        raise BrokenFile(problem, rest)
    if rest:
        yield number + 1, rest.removeprefix(_BYTE_ORDER_MARK) if number == 0 else rest


def _decompressed(path: Path) -> Iterator[bytes]:
    """Blocks of a file's content; gzip and zstd files may hold several members."""
    make = {".gz": lambda: zlib.decompressobj(31), ".zst": lambda: zstandard.ZstdDecompressor().decompressobj()}
    with path.open("rb") as file:
        if path.suffix not in make:
            while block := file.read(_BLOCK):
                yield block
            return
        member = None
        while block := file.read(_COMPRESSED_BLOCK):
            while block:
                member = member or make[path.suffix]()
                if data := member.decompress(block):
                    yield data
                block = b""
                if member.eof:
                    block, member = member.unused_data.lstrip(b"\0"), None
    if member is not None:
        raise EOFError("it breaks off")
