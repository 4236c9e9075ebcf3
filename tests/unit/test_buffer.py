"""The shared buffer: from every offset, exactly the rest; the same from a stored message."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.parts import (
    DeltaKind,
    Part,
    ReasoningPart,
    SourcePart,
    TextPart,
    ToolPart,
    parts_from_json,
    parts_length,
    parts_to_json,
)
from streams.buffer import (
    JOINED_PIECES,
    MAX_DELTA_CHARS,
    ContentEvent,
    Delta,
    PartAdded,
    StreamBuffer,
    join_parts,
    parts_of,
    replay,
)
from streams.cursor import (
    CursorAheadError,
    ForeignCursorError,
    MalformedCursorError,
    StreamPosition,
    cursor_prefix,
    end_cursor,
    parse_cursor,
)

storable = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
chunks = st.lists(
    st.one_of(
        st.tuples(st.just("TEXT"), storable),
        st.tuples(st.just("REASONING"), storable),
        st.tuples(st.just("PART"), st.just("")),
    ),
    max_size=30,
)


def filled(script: list[tuple[str, str]]) -> StreamBuffer:
    buffer = StreamBuffer(uuid4(), uuid4())
    for kind, text in script:
        if kind == "PART":
            buffer.append_part(ToolPart("id", "name", {"a": [1]}))
        else:
            buffer.append_text(kind, text)  # type: ignore[arg-type]
    return buffer


def fold(events: list[ContentEvent]) -> list[Part]:
    """What a client holds that follows the protocol: parts by index."""
    parts: dict[int, Part] = {}
    for event in events:
        if isinstance(event, PartAdded):
            parts[event.part_index] = event.part
        else:
            held = parts.get(event.part_index)
            text = held.text if isinstance(held, TextPart | ReasoningPart) else ""
            kind = TextPart if event.kind == "TEXT" else ReasoningPart
            parts[event.part_index] = kind(text + event.text)
    return [parts[index] for index in sorted(parts)]


@given(chunks, st.data())
def test_from_every_offset_a_reader_gets_exactly_the_rest(script: list[tuple[str, str]], data: st.DataObject) -> None:
    buffer = filled(script)
    whole = buffer.since(0)
    parts = fold(whole)
    cut = data.draw(st.integers(0, buffer.length))
    before: list[ContentEvent] = []
    for event in whole:
        end = parse_cursor(event.cursor, buffer.message_id).offset
        if end <= cut:
            before.append(event)
        elif isinstance(event, Delta) and end - len(event.text) < cut:
            before.append(Delta("", event.part_index, event.kind, event.text[: cut - end]))
    assert fold(before + buffer.since(cut)) == parts
    assert list(replay(buffer.message_id, parts, cut)) == buffer.since(cut)


@given(chunks, st.data())
def test_readers_that_follow_at_any_pace_hold_the_same_parts(
    script: list[tuple[str, str]], data: st.DataObject
) -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    offset, seen = 0, []
    for kind, text in script:
        if kind == "PART":
            buffer.append_part(SourcePart("https://example.org"))
        else:
            buffer.append_text(kind, text)  # type: ignore[arg-type]
        if data.draw(st.booleans()):
            seen += buffer.since(offset)
            offset = buffer.length
    seen += buffer.since(offset)
    assert fold(seen) == buffer.parts() == fold(buffer.since(0))
    assert all(event.text for event in seen if isinstance(event, Delta))


@given(chunks)
def test_the_last_cursor_of_every_event_is_where_the_next_begins(script: list[tuple[str, str]]) -> None:
    buffer = filled(script)
    for index, event in enumerate(whole := buffer.since(0)):
        offset = parse_cursor(event.cursor, buffer.message_id).offset
        assert buffer.since(offset) == whole[index + 1 :]


@given(chunks, st.lists(st.integers(0, 200), max_size=6))
def test_checkpoints_of_any_stretches_fold_to_the_same_parts(script: list[tuple[str, str]], cuts: list[int]) -> None:
    buffer = filled(script)
    places = sorted({0, buffer.length, *(cut for cut in cuts if cut <= buffer.length)})
    stretches = [parts_of(_until(buffer, start, end)) for start, end in pairwise(places)]
    assert join_parts(stretches) == buffer.parts()


def _until(buffer: StreamBuffer, start: int, end: int) -> list[ContentEvent]:
    events: list[ContentEvent] = []
    for event in buffer.since(start):
        at = parse_cursor(event.cursor, buffer.message_id).offset
        if at <= end:
            events.append(event)
        elif isinstance(event, Delta) and at - len(event.text) < end:
            events.append(Delta("", event.part_index, event.kind, event.text[: end - at]))
    return events


@given(chunks)
def test_parts_survive_their_stored_form(script: list[tuple[str, str]]) -> None:
    parts = filled(script).parts()
    assert parts_from_json(parts_to_json(parts)) == parts


signed_chunks = st.lists(
    st.one_of(
        st.tuples(st.just("TEXT"), storable),
        st.tuples(st.just("REASONING"), storable),
        st.tuples(st.just("PART"), st.just("")),
        st.tuples(st.just("SIGN"), st.sampled_from(["a", "b", ""])),
    ),
    max_size=12,
)


@given(signed_chunks, st.data())
def test_a_signature_holds_for_exactly_the_text_it_was_given_with_and_all_have_one_or_none(
    script: list[tuple[str, str]], data: st.DataObject
) -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    given_with: list[tuple[str, str]] = []
    for kind, text in script:
        match kind:
            case "SIGN":
                parts = buffer.parts()
                if parts and isinstance(parts[-1], ReasoningPart):
                    given_with.append((parts[-1].text, text))
                buffer.sign(text or None)
            case "PART":
                buffer.append_part(ToolPart("id", "name"))
            case _:
                buffer.append_text(kind, text)  # type: ignore[arg-type]
    parts = buffer.parts()
    thoughts = [part for part in parts if isinstance(part, ReasoningPart)]
    signed = [(part.text, part.signature) for part in thoughts if part.signature is not None]
    assert len(signed) in (0, len(thoughts))
    assert all(one in given_with for one in signed)
    assert parts_from_json(parts_to_json(parts)) == parts
    # No reader sees one: not on the line of offsets, and not in what is saved on the way.
    unsigned = [ReasoningPart(part.text) if isinstance(part, ReasoningPart) else part for part in parts]
    assert fold(buffer.since(0)) == parts_of(buffer.since(0)) == unsigned
    cut = data.draw(st.integers(0, buffer.length))
    assert list(replay(buffer.message_id, parts, cut)) == buffer.since(cut)
    assert parts_length(parts) == buffer.length


def test_a_signature_is_kept_and_text_that_follows_voids_it() -> None:
    buffer = filled([("REASONING", "Let me "), ("REASONING", "see.")])
    buffer.sign("s")
    buffer.append_text("TEXT", "Hi")
    assert buffer.parts() == [ReasoningPart("Let me see.", "s"), TextPart("Hi")]
    buffer.append_text("REASONING", "And")
    assert buffer.parts()[0] == ReasoningPart("Let me see."), "all of it is signed, or nothing"
    buffer.sign("t")
    assert [part.signature for part in buffer.parts() if isinstance(part, ReasoningPart)] == ["s", "t"]
    buffer.append_text("REASONING", " more")
    buffer.sign("u")
    assert [part.signature for part in buffer.parts() if isinstance(part, ReasoningPart)] == [None, None]


@pytest.mark.parametrize("told", [[("TEXT", "a")], [("PART", "")], []])
def test_a_signature_of_what_was_not_shown_signs_nothing_else(told: list[tuple[str, str]]) -> None:
    buffer = filled([("REASONING", "hm")])
    buffer.sign("s")
    for kind, text in told:
        buffer.append_part(ToolPart("i", "n")) if kind == "PART" else buffer.append_text(kind, text)  # type: ignore[arg-type]
    buffer.sign("t")
    assert buffer.parts()[0] == ReasoningPart("hm")


def test_fifty_thousand_chunks_are_one_delta_for_a_late_reader_and_little_memory() -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    for number in range(50_000):
        buffer.append_text("TEXT", f"{number} ")
    (delta,) = buffer.since(0)[:1]
    assert isinstance(delta, Delta)
    assert fold(buffer.since(0)) == [TextPart("".join(f"{number} " for number in range(50_000)))]
    assert len(buffer._entries) <= 50_000 / JOINED_PIECES + JOINED_PIECES


def test_a_delta_is_never_longer_than_a_frame_may_be() -> None:
    text = "ab" * MAX_DELTA_CHARS
    buffer = filled([("TEXT", text)])
    events = buffer.since(0)
    assert [len(event.text) for event in events if isinstance(event, Delta)] == [MAX_DELTA_CHARS] * 2
    assert fold(events) == [TextPart(text)]
    assert list(replay(buffer.message_id, [TextPart(text)], 0)) == events


def test_an_offset_behind_the_end_is_ahead() -> None:
    buffer = filled([("TEXT", "abc")])
    with pytest.raises(CursorAheadError):
        buffer.since(4)
    with pytest.raises(CursorAheadError):
        list(replay(buffer.message_id, buffer.parts(), 4))


async def test_a_reader_that_waits_is_woken_by_growth_and_by_the_end() -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    waiting = asyncio.create_task(buffer.wait(0))
    await asyncio.sleep(0)
    assert buffer.readers_waiting == 1
    buffer.append_text("TEXT", "a")
    await asyncio.wait_for(waiting, 5)
    waiting = asyncio.create_task(buffer.wait(1))
    await asyncio.sleep(0)
    buffer.close()
    await asyncio.wait_for(waiting, 5)


async def test_a_reader_that_leaves_is_forgotten() -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    waiting = asyncio.create_task(buffer.wait(0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert buffer.readers_waiting == 0


@given(st.text(max_size=80))
def test_no_text_breaks_the_cursor_parser(text: str) -> None:
    with pytest.raises((MalformedCursorError, ForeignCursorError)):
        parse_cursor(text, uuid4())


def test_a_cursor_has_one_spelling_and_names_its_message() -> None:
    message_id = uuid4()
    assert parse_cursor(end_cursor(message_id, 7), message_id).ended
    with pytest.raises(ForeignCursorError):
        parse_cursor(end_cursor(uuid4(), 7), message_id)
    prefix = cursor_prefix(message_id)
    for wrong in (
        "",
        "7",
        f"{prefix}",
        f"{prefix}07",
        f"{prefix}-1",
        f"{prefix}1e3",
        f"{prefix}٣",
        f"{prefix}7..",
        f"{prefix}1-7",
        f"{prefix}0-7",
        f"{prefix}2-",
        f"{prefix}2-07",
        "x" * 9999,
    ):
        with pytest.raises(MalformedCursorError):
            parse_cursor(wrong, message_id)


def test_a_cursor_names_the_attempt_it_is_of() -> None:
    message_id = uuid4()
    for attempt in (1, 2, 3):
        buffer = StreamBuffer(message_id, uuid4(), attempt)
        buffer.append_text("TEXT", "seven")
        cursor = buffer.since(0)[0].cursor
        assert parse_cursor(cursor, message_id) == StreamPosition(message_id, 5, attempt=attempt)
        ended = StreamPosition(message_id, 5, ended=True, attempt=attempt)
        assert parse_cursor(end_cursor(message_id, 5, attempt), message_id) == ended
        assert list(replay(message_id, buffer.parts(), 0, attempt)) == buffer.since(0)


def test_a_tool_part_is_one_long() -> None:
    assert parts_length([TextPart("ab"), ToolPart("i", "n"), ReasoningPart("c")]) == 4


@given(st.lists(st.sampled_from(["TEXT", "REASONING"]), max_size=1_500))
def test_every_append_is_counted_however_entries_are_joined(kinds: list[DeltaKind]) -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    for kind in kinds:
        buffer.append_text(kind, "x")
    for _ in range(2 * JOINED_PIECES):
        buffer.append_text("TEXT", "y")
    assert buffer.appends == len(kinds) + 2 * JOINED_PIECES
    assert buffer.begun_at is not None
    assert buffer.begun_at <= buffer.timed_at


async def test_who_is_attached_is_told_once_of_what_grew_at_once_and_of_the_close() -> None:
    buffer = StreamBuffer(uuid4(), uuid4())
    told: list[tuple[int, bool]] = []

    def tell() -> None:
        told.append((buffer.length, buffer.closed))

    buffer.append_text("TEXT", "before")
    buffer.attach(tell)
    assert buffer.readers_waiting == 1
    buffer.append_text("TEXT", " a")
    buffer.append_text("TEXT", " b")
    assert told == [], "not from within the append"
    await asyncio.sleep(0)
    buffer.append_text("TEXT", " c")
    await asyncio.sleep(0)
    buffer.close()
    await asyncio.sleep(0)
    assert told == [(10, False), (12, False), (12, True)]
    buffer.detach(tell)
    buffer.detach(tell)
    buffer.close()
    await asyncio.sleep(0)
    assert len(told) == 3
    assert buffer.readers_waiting == 0
