"""Pages of PDFs: counted where the file says them, within bounds whatever the file says."""

from __future__ import annotations

import io
import tempfile
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services import pdf

TRAILER = b"trailer << /Size 9 /Root 1 0 R >>\nstartxref\n0\n%%EOF\n"


def pages_of(content: bytes) -> int | None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        return pdf.count_pages(file)


def plain(number: int, body: bytes) -> bytes:
    return b"%d 0 obj\n%b\nendobj\n" % (number, body)


def packed(*objects: tuple[int, bytes], unpacked: bytes | None = None) -> bytes:
    """An object stream with these objects."""
    index, bodies = b"", b""
    for number, body in objects:
        index += b"%d %d " % (number, len(bodies))
        bodies += body + b" "
    stream = zlib.compress(index + bodies if unpacked is None else unpacked)
    said = b"/Type /ObjStm /N %d /First %d /Filter /FlateDecode /Length %d" % (len(objects), len(index), len(stream))
    return b"8 0 obj\n<< %b >>\nstream\r\n%b\nendstream\nendobj\n" % (said, stream)


CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"


def tree(count: int) -> bytes:
    return b"<< /Type /Pages /Kids [3 0 R 4 0 R] /Count %d >>" % count


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (plain(1, CATALOG) + plain(2, tree(7)) + TRAILER, 7),
        (plain(2, tree(7)) + plain(12, tree(8)) + plain(1, CATALOG) + TRAILER, 7),
        (plain(1, CATALOG) + plain(2, tree(7)) + TRAILER + plain(2, tree(9)) + TRAILER, 9),
        (packed((1, CATALOG), (5, b"<< >>"), (2, tree(12))) + TRAILER, 12),
        (plain(1, CATALOG) + packed((2, tree(3)), (1, b"no")) + TRAILER, None),
        (packed((1, CATALOG), (2, tree(3))) + TRAILER + plain(2, tree(4)) + TRAILER, 4),
        (plain(1, CATALOG) + plain(2, tree(10**8)) + TRAILER, None),
        (plain(1, CATALOG) + plain(2, b"<< >>") + TRAILER, None),
        (plain(1, CATALOG) + TRAILER, None),
        (plain(1, CATALOG) + plain(2, tree(1)), None),
        (b"", None),
        (b"/Root", None),
        (b"nothing of the kind", None),
    ],
)
def test_the_last_word_of_the_file_counts(content: bytes, expected: int | None) -> None:
    assert pages_of(b"%PDF-1.7\n" + content) == expected


def test_what_lies_across_two_pieces_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    content = plain(1, CATALOG) + plain(2, tree(7)) + b"%" * 50 + TRAILER
    for size in range(1, 200):
        monkeypatch.setattr(pdf, "_PIECE_BYTES", size)
        assert pages_of(content) == 7


@pytest.mark.parametrize(
    "content",
    [
        packed((1, CATALOG), unpacked=bytes(200 * 1024 * 1024)) * 20 + TRAILER,
        b"1 0 1 0 " * 2_000_000 + TRAILER,
        b"/ObjStm stream\n" * 300_000 + TRAILER,
        b"/ObjStm /N 999999999 /First 99999999 stream\n" * 100_000 + TRAILER,
    ],
    ids=["bomb", "numbers", "streams", "claims"],
)
def test_a_file_made_to_keep_us_busy_is_given_up(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "_SECONDS", 0.5)
    began = time.monotonic()
    assert pages_of(content) is None
    assert time.monotonic() - began < 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"1 0 obj", CATALOG, tree(2), TRAILER, b"/ObjStm", b"stream\n", b"2 0 obj", b"\xff"])))
def test_no_file_breaks_the_count(pieces: list[bytes]) -> None:
    assert pages_of(b"\n".join(pieces)) in (None, 2)


def test_a_file_that_is_too_large_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "MAX_BYTES", 10)
    assert pdf.count_pages(io.BytesIO(bytes(11))) is None
