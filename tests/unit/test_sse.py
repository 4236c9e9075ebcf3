"""The rules of the event stream format, for every way in which a stream can be cut into chunks."""

from __future__ import annotations

import itertools
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sse import EventParser, EventTooLargeError, ServerSentEvent

Events = list[tuple[str, bytes]]

CORPUS: dict[str, tuple[bytes, Events]] = {
    "nothing": (b"", []),
    "one event": (b"data: a\n\n", [("message", b"a")]),
    "two events": (b"data: a\n\ndata: b\n\n", [("message", b"a"), ("message", b"b")]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [("message", b"a"), ("message", b"b")]),
    "cr only": (b"data: a\r\rdata: b\r\r", [("message", b"a"), ("message", b"b")]),
    "mixed line ends": (b"data: a\r\ndata: b\rdata: c\n\r\n", [("message", b"a\nb\nc")]),
    "cr, then an empty line of lf": (b"data: a\r\n\n", [("message", b"a")]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [("message", b"a")]),
    "second byte order mark is part of a field": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    "half a byte order mark is part of a field": (b"\xef\xbbdata: a\n\ndata: b\n\n", [("message", b"b")]),
    "comments": (b": hello\n\n:\n:\n\ndata: a\n: between\ndata: b\n\n", [("message", b"a\nb")]),
    "many lines": (b"data: a\ndata:\ndata\ndata: b\n\n", [("message", b"a\n\n\nb")]),
    "empty data is an event": (b"data\n\ndata:\n\ndata: \n\n", [("message", b"")] * 3),
    "two empty lines of data": (b"data\ndata\n\n", [("message", b"\n")]),
    "no data is no event": (b"event: x\n\nid: 1\n\n\n\n", []),
    "an event name without data is forgotten": (b"event: x\n\ndata: a\n\n", [("message", b"a")]),
    "names": (b"event: x\ndata: a\n\ndata: b\n\n", [("x", b"a"), ("message", b"b")]),
    "the last name counts": (b"event: x\nevent: y\ndata: a\n\n", [("y", b"a")]),
    "an empty name is the default": (b"event: x\nevent\ndata: a\n\n", [("message", b"a")]),
    "a name that is no utf-8": (b"event: \xff\ndata: a\n\n", [("\N{REPLACEMENT CHARACTER}", b"a")]),
    "one space is dropped": (
        b"data:a\n\ndata:  a\n\ndata:\ta\n\n",
        [("message", b"a"), ("message", b" a"), ("message", b"\ta")],
    ),
    "a colon in the value": (b"data: a: b\n\n", [("message", b"a: b")]),
    "id and retry": (b"id: 1\nretry: 10\ndata: a\n\n", [("message", b"a")]),
    "unknown fields": (b"Data: x\n data: y\ndata : z\n{}\ndata: a\n\n", [("message", b"a")]),
    "bytes that are no utf-8": (b"data: \xff\xfe\x00\n\n", [("message", b"\xff\xfe\x00")]),
    "characters of four bytes": ("data: 👩‍💻🇩🇪漢\n\n".encode(), [("message", "👩‍💻🇩🇪漢".encode())]),
    "other line separators are text": (
        "data: a\x0b\x0c\x85\u2028b\n\n".encode(),
        [("message", "a\x0b\x0c\x85\u2028b".encode())],
    ),
    "an unfinished event is not dispatched": (b"data: a\n\ndata: b\n", [("message", b"a")]),
    "an unfinished line is not dispatched": (b"data: a\n\ndata: b", [("message", b"a")]),
}
CASES = [pytest.param(*case, id=name) for name, case in CORPUS.items()]


def parse(chunks: list[bytes], parser: EventParser | None = None) -> Events:
    parser = parser or EventParser()
    return [(event.name, event.data) for chunk in chunks for event in parser.feed(chunk)]


def parse_by_the_letter(stream: bytes) -> Events:
    """The standard's algorithm on a whole stream, as slow and as plain as it is written there."""
    lines = re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]
    events: Events = []
    name, data = b"", b""
    for line in lines:
        if not line:
            if data:
                events.append((name.decode("utf-8", "replace") or "message", data[:-1]))
            name, data = b"", b""
            continue
        field, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if field == b"event":
            name = value
        elif field == b"data":
            data += value + b"\n"
    return events


@pytest.mark.parametrize(("stream", "events"), CASES)
def test_a_stream_in_one_chunk_gives_its_events(stream: bytes, events: Events) -> None:
    assert parse([stream]) == events


@pytest.mark.parametrize(("stream", "events"), CASES)
def test_a_stream_cut_at_any_byte_gives_the_same_events(stream: bytes, events: Events) -> None:
    for cut in range(len(stream) + 1):
        assert parse([stream[:cut], stream[cut:]]) == events
        assert parse([stream[:cut], b"", stream[cut:]]) == events


@pytest.mark.parametrize(("stream", "events"), CASES)
def test_a_stream_byte_by_byte_gives_the_same_events(stream: bytes, events: Events) -> None:
    assert parse([stream[at : at + 1] for at in range(len(stream))]) == events


@pytest.mark.parametrize(("stream", "events"), CASES)
def test_the_corpus_agrees_with_the_standard_taken_by_the_letter(stream: bytes, events: Events) -> None:
    assert parse_by_the_letter(stream) == events


STREAMS = st.lists(
    st.sampled_from(
        [
            b"data: ",
            b"data:",
            b"data",
            b"event: ",
            b"event",
            b"id: 1",
            b": c",
            b" ",
            b":",
            b"a",
            b"\xf0\x9f",
            b"\xef\xbb\xbf",
        ]
        + [b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n"] * 2
    ),
    max_size=40,
).map(b"".join)


@given(stream=STREAMS, data=st.data())
def test_any_stream_in_any_chunks_is_read_as_the_standard_says(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert parse(chunks) == parse_by_the_letter(stream)


@pytest.mark.parametrize("rest", [b"data: b", b"data: b\n", b"data: b\r", b"data: b\r\n"])
def test_an_event_without_its_blank_line_is_left_for_the_end(rest: bytes) -> None:
    parser = EventParser()
    assert parse([b"data: a\n\n", rest], parser) == [("message", b"a")]
    assert parser.finish() == ServerSentEvent("message", b"b")


@pytest.mark.parametrize("stream", [b"", b"data: a\n\n", b": comment", b"event: x\n", b"\xef\xbb"])
def test_nothing_is_left_for_the_end_where_no_data_is_pending(stream: bytes) -> None:
    parser = EventParser()
    parse([stream], parser)
    assert parser.finish() is None


TOO_LARGE = {
    "one line of data": b"data: " + b"x" * 200,
    "one line of data with its end": b"data: " + b"x" * 200 + b"\n\n",
    "many lines of data": b"data: x\n" * 200,
    "many empty lines of data": b"data\n" * 200,
    "a comment without end": b":" + b"x" * 200,
    "a field name without end": b"x" * 200,
    "an event name": b"event: " + b"x" * 200 + b"\n",
    "name and data together": b"event: " + b"x" * 60 + b"\ndata: " + b"x" * 60,
}


@pytest.mark.parametrize("stream", [pytest.param(stream, id=name) for name, stream in TOO_LARGE.items()])
def test_an_event_beyond_the_bound_is_refused_however_it_is_cut(stream: bytes) -> None:
    for size in (1, 7, len(stream)):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        with pytest.raises(EventTooLargeError):
            parse(chunks, EventParser(max_event_bytes=100))


def test_the_events_before_one_that_is_too_large_are_delivered() -> None:
    feed = EventParser(max_event_bytes=100).feed(b"data: a\n\ndata: b\n\ndata: " + b"x" * 200)
    assert [next(feed).data, next(feed).data] == [b"a", b"b"]
    with pytest.raises(EventTooLargeError):
        next(feed)


def test_an_event_as_large_as_the_bound_is_accepted() -> None:
    # The bound covers the line while it is incomplete, so it includes the field name.
    stream = b"data: " + b"x" * 94 + b"\n\n"
    assert parse([stream[at : at + 1] for at in range(len(stream))], EventParser(max_event_bytes=100))


def test_small_events_and_comments_never_add_up() -> None:
    parser = EventParser(max_event_bytes=100)
    assert len(parse([b": keep-alive\n" * 20 + b"event: x\ndata: y\n\n"] * 50, parser)) == 50


def test_an_endless_line_takes_no_more_memory_than_the_bound() -> None:
    parser = EventParser(max_event_bytes=256 * 1024)
    chunk = b"x" * 1024
    tracemalloc.start()
    try:
        with pytest.raises(EventTooLargeError):
            parse([chunk] * 10_000, parser)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024


def test_tiny_lines_of_one_event_take_no_more_memory_than_a_few_bounds() -> None:
    parser = EventParser(max_event_bytes=256 * 1024)
    tracemalloc.start()
    try:
        with pytest.raises(EventTooLargeError):
            parse([b"data:xy\n" * 1000] * 1_000, parser)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024
