"""How many pages a PDF has, without a PDF library.

Such a library reads whatever a file leads it to: bombs, loops, fonts. The count needs two objects, the catalog and the
root of its pages, which are in the file as they are or in a compressed object stream. Both are looked for directly,
within bounds of time and memory; what cannot be found so (an encrypted or a broken file) has no count.
"""

from __future__ import annotations

import re
import time
import zlib
from mmap import ACCESS_READ, mmap
from typing import BinaryIO

MAX_BYTES = 100 * 1024 * 1024
MAX_PAGES = 1_000_000
_SECONDS = 3.0
_MAX_UNPACKED = 64 * 1024 * 1024
_PIECE_BYTES = 256 * 1024
_MAX_STREAM = 8 * 1024 * 1024
# A dictionary of a page tree lists its children; a flat one of 50,000 pages is about that long.
_MAX_OBJECT = 1024 * 1024

_ROOT = re.compile(rb"/Root\s{1,8}(\d{1,9})\s{1,8}\d{1,5}\s{1,8}R")
_PAGES = re.compile(rb"/Pages\s{1,8}(\d{1,9})\s{1,8}\d{1,5}\s{1,8}R")
_COUNT = re.compile(rb"/Count\s{1,8}(\d{1,9})")
_STREAM = re.compile(rb"stream\r?\n")
_NUMBER = re.compile(rb"/(N|First)\s{1,8}(\d{1,9})")


def count_pages(file: BinaryIO) -> int | None:
    """The pages of a PDF; None where they cannot be counted. Blocks for 3 seconds at most."""
    size = file.seek(0, 2)
    if not 0 < size <= MAX_BYTES:
        return None
    with mmap(file.fileno(), size, access=ACCESS_READ) as content:
        try:
            return _Document(content, time.monotonic() + _SECONDS).pages()
        except _GivenUpError:
            return None


class _GivenUpError(Exception):
    """It takes too long."""


class _Document:
    def __init__(self, content: mmap, deadline: float) -> None:
        self._content = content
        self._deadline = deadline
        self._unpacked = 0

    def pages(self) -> int | None:
        at = self._last(b"/Root", len(self._content))
        root = None if at < 0 else _ROOT.match(self._content[at : at + 64])
        catalog = self._object(int(root[1])) if root else None
        tree = _PAGES.search(catalog) if catalog else None
        pages = self._object(int(tree[1])) if tree else None
        # The root counts all leaves below it; of a count that stands deeper there is none in a dictionary of pages.
        count = _COUNT.search(pages) if pages else None
        return int(count[1]) if count and int(count[1]) <= MAX_PAGES else None

    def _object(self, number: int) -> bytes | None:
        """What an object is: the last one of this number, as files that were changed have several."""
        plain_at, plain = self._plain(number)
        packed_at, packed = self._packed(number)
        return plain if plain_at > packed_at else packed

    def _plain(self, number: int) -> tuple[int, bytes | None]:
        wanted = re.compile(rb"(?<!\d)%d\s{1,8}\d{1,5}\s{1,8}obj" % number)
        at = len(self._content)
        while (at := self._last(b"%d " % number, at)) >= 0:
            before = max(at - 1, 0)
            if found := wanted.search(self._content[before : at + 40]):
                start = before + found.end()
                end = self._content.find(b"endobj", start, start + _MAX_OBJECT)
                return at, self._content[start : end if end >= 0 else start + _MAX_OBJECT]
        return -1, None

    def _packed(self, number: int) -> tuple[int, bytes | None]:
        at = len(self._content)
        while (at := self._last(b"/ObjStm", at)) >= 0:
            if (found := self._in_stream(at, number)) is not None:
                return at, found
        return -1, None

    def _in_stream(self, at: int, number: int) -> bytes | None:
        """The object in the object stream whose dictionary names its type here."""
        begin = max(self._content.rfind(b"obj", max(at - 2_048, 0), at), 0)
        after = self._content[at : at + 2_048]
        start = _STREAM.search(after)
        if start is None:
            return None
        said = {key: int(value) for key, value in _NUMBER.findall(self._content[begin : at + start.start()])}
        unpacked = self._unpack(at + start.end())
        first, entries = said.get(b"First", 0), said.get(b"N", 0)
        numbers = unpacked[:first].split()[: 2 * min(entries, 100_000)]
        for place in range(0, len(numbers) - 1, 2):
            if numbers[place] == b"%d" % number and numbers[place + 1].isdigit():
                offset = first + int(numbers[place + 1])
                following = [int(n) for n in numbers[place + 3 : place + 4] if n.isdigit()]
                return unpacked[offset : first + following[0] if following else offset + _MAX_OBJECT]
        return None

    def _unpack(self, at: int) -> bytes:
        """A compressed stream, in pieces: what one says about its length is not believed."""
        unpacker, unpacked = zlib.decompressobj(), bytearray()
        while not unpacker.eof and len(unpacked) < _MAX_STREAM and at < len(self._content):
            self._check()
            piece = self._content[at : at + 65_536]
            at += len(piece)
            try:
                unpacked += unpacker.decompress(piece, _MAX_STREAM - len(unpacked))
            except zlib.error:
                break
        self._unpacked += len(unpacked)
        if self._unpacked > _MAX_UNPACKED:
            raise _GivenUpError
        return bytes(unpacked)

    def _last(self, wanted: bytes, before: int) -> int:
        """Where something begins last before a place, or -1. Piece by piece: one long search would stop all threads."""
        while before > 0:
            self._check()
            start = max(before - _PIECE_BYTES, 0)
            at = self._content[start : before + len(wanted) - 1].rfind(wanted)
            if at >= 0:
                return start + at
            before = start
        return -1

    def _check(self) -> None:
        if time.monotonic() > self._deadline:
            raise _GivenUpError
