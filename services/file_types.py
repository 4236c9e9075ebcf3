"""What a file is, told by its content and never by its name, and how it is named and served.

Types are few. An image is one that browsers show and whose header is whole and within bounds; nothing is decoded here.
Text is whatever is UTF-8 without NUL: HTML, SVG and XML are text, and are served as such. The rest is kept as bytes
that nobody looks into.
"""

from __future__ import annotations

import codecs
import struct
import zlib
from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote

from services.errors import BadUserInputError
from streams.tokens import estimate_tokens_of

TEXT = "text/plain"
PDF = "application/pdf"
UNKNOWN = "application/octet-stream"
IMAGES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
MAX_PIXELS = 50_000_000
MAX_NAME_BYTES = 255

# What stands before a JPEG's dimensions (colour profiles, Exif) is seldom more than some 10 KiB.
_HEAD_BYTES = 1024 * 1024
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What was found out about a file."""

    content_type: str
    size: int
    sha256: bytes
    tokens: int | None
    width: int | None
    height: int | None


class Inspection:
    """Looks at a file while it passes by. Keeps at most 1 MiB of it."""

    def __init__(self) -> None:
        self._size = 0
        self._hash = sha256()
        self._head = bytearray()
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()

    async def through(self, chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
        """The chunks as they come, each looked at."""
        async for chunk in chunks:
            self._look(chunk)
            yield chunk

    def _look(self, chunk: bytes) -> None:
        self._size += len(chunk)
        self._hash.update(chunk)
        if len(self._head) < _HEAD_BYTES:
            self._head += chunk[: _HEAD_BYTES - len(self._head)]
        if self._decoder is not None:
            try:
                self._decoder.decode(chunk)
            except UnicodeDecodeError:
                self._decoder = None
            if b"\x00" in chunk:
                self._decoder = None

    def facts(self, declared_type: str | None) -> FileFacts:
        """What the file is.

        Args:
            declared_type: what its sender said; for an image or a PDF it has to be true.

        Raises:
            BadUserInputError: it is empty, is not what was said, or is an image that is broken or too large.
        """
        if self._size == 0:
            raise BadUserInputError("The file is empty.", field="file")
        found = self._type()
        if declared_type in IMAGES | {PDF} and declared_type != found:
            raise BadUserInputError(f"The file is not what {declared_type} means.", field="contentType")
        width, height = dimensions(found, bytes(self._head)) if found in IMAGES else (None, None)
        if width is not None and height is not None and width * height > MAX_PIXELS:
            raise BadUserInputError(f"An image has at most {MAX_PIXELS // 10**6} million pixels.", field="file")
        tokens = estimate_tokens_of(self._size) if found == TEXT else None
        return FileFacts(found, self._size, self._hash.digest(), tokens, width, height)

    def _type(self) -> str:
        head = bytes(self._head[:16])
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return "image/png"
        if head.startswith(b"\xff\xd8\xff"):
            return "image/jpeg"
        if head.startswith((b"GIF87a", b"GIF89a")):
            return "image/gif"
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return "image/webp"
        if head.startswith(b"%PDF-"):
            return PDF
        if self._decoder is not None:
            try:
                self._decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return UNKNOWN
            return TEXT
        return UNKNOWN


def facts_of_beginning(data: bytes) -> FileFacts:
    """What bytes are that are there already, told by the first MiB of them; their size and hash are that part's.

    Raises:
        BadUserInputError: they are none, or an image that is broken or too large.
    """
    inspection = Inspection()
    inspection._look(data[:_HEAD_BYTES])  # noqa: SLF001 - its own module
    return inspection.facts(None)


def dimensions(content_type: str, head: bytes) -> tuple[int, int]:
    """Width and height of an image as its header has them, nothing decoded.

    Raises:
        BadUserInputError: the header is not one.
    """
    try:
        width, height = _DIMENSIONS[content_type](head)
    except (struct.error, ValueError, IndexError):
        width = height = 0
    if width < 1 or height < 1:
        raise BadUserInputError("The image is broken: its header cannot be read.", field="file")
    return width, height


def _png(head: bytes) -> tuple[int, int]:
    length, kind, width, height = struct.unpack_from(">I4sII", head, 8)
    (checksum,) = struct.unpack_from(">I", head, 29)
    if length != 13 or kind != b"IHDR" or zlib.crc32(head[12:29]) != checksum:
        raise ValueError("no IHDR")
    return width, height


def _gif(head: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", head, 6)
    return width, height


def _webp(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":
        width, height = head[24:27], head[27:30]
        if len(height) < 3:
            raise ValueError("cut")
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no frame")


def _jpeg(head: bytes) -> tuple[int, int]:
    place = 2
    while True:
        if head[place] != 0xFF:
            raise ValueError("no marker")
        marker = head[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        # Start of a frame: C0 to CF without the tables DHT (C4), JPG (C8) and DAC (CC). A scan may not come before it.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, place + 5)
            return width, height
        if marker in (0xD8, 0xD9, 0xDA) or marker == 0:
            raise ValueError("no frame")
        (length,) = struct.unpack_from(">H", head, place + 2)
        if length < 2:
            raise ValueError("no segment")
        place += 2 + length


_DIMENSIONS = {"image/png": _png, "image/jpeg": _jpeg, "image/gif": _gif, "image/webp": _webp}


def file_name(given: str) -> str:
    """A name that can be shown and stored: no folders, no control or direction characters, at most 255 bytes.

    Never refused, because people do not choose what their devices call a photo, and never a part of any path.
    """
    name = "".join(
        character
        for character in given.replace("\\", "/")[-4_096:].rsplit("/", 1)[-1]
        if character >= " "
        and not "\x7f" <= character <= "\x9f"
        and not "\ud800" <= character <= "\udfff"
        and character not in _DIRECTIONS
    ).strip(" .")
    if not name:
        return "file"
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    stem, dot, ending = name.rpartition(".")
    if not dot or not 1 <= len(ending.encode()) <= 20:
        stem, ending = name, ""
    kept = stem.encode()[: MAX_NAME_BYTES - len((dot + ending).encode()) if ending else MAX_NAME_BYTES]
    return kept.decode(errors="ignore") + (dot + ending if ending else "")


def served_type(content_type: str) -> str:
    """The type that a file is served with: its own where that cannot run, with the one encoding text has."""
    if content_type == TEXT:
        return "text/plain; charset=utf-8"
    return content_type if content_type in IMAGES | {PDF} else UNKNOWN


def disposition(content_type: str, name: str) -> str:
    """A Content-Disposition (RFC 6266): images may be shown in place, everything else is a download."""
    kind = "inline" if content_type in IMAGES else "attachment"
    # Appendix D: a plain name for the old ones, without what they get wrong; the true one in UTF-8.
    plain = "".join(c if " " <= c <= "~" and c not in '"\\%' else "_" for c in name)
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
