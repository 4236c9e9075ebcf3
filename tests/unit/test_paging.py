"""Pages: what their arguments mean, and cursors that lead back to the very place they were made for."""

from __future__ import annotations

import string
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.errors import BadUserInputError, CursorInvalidError
from services.paging import DEFAULT_PAGE, MAX_PAGE, Page, PageRequest, PathPosition, ThreadPosition, page_request

PLACE = ThreadPosition(True, datetime(2026, 11, 5, 12, 30, 15, 123_456, tzinfo=UTC), UUID(int=2**127 + 5))
URL_SAFE = set(string.ascii_letters + string.digits + "-_")

thread_positions = st.builds(
    ThreadPosition, st.booleans(), st.datetimes(timezones=st.just(UTC)), st.uuids() | st.just(UUID(int=0))
)
path_positions = st.builds(PathPosition, st.integers(0, 2**31 - 1))


def number(text: str) -> int:
    """A parser of cursors that are numbers."""
    return int(text)


@given(thread_positions)
def test_a_cursor_of_the_list_of_threads_leads_back_to_its_place(position: ThreadPosition) -> None:
    cursor = position.cursor()
    assert ThreadPosition.parse(cursor) == position
    assert set(cursor) <= URL_SAFE
    assert len(cursor) <= 64


@given(path_positions)
def test_a_cursor_of_a_path_leads_back_to_its_place(position: PathPosition) -> None:
    cursor = position.cursor()
    assert PathPosition.parse(cursor) == position
    assert set(cursor) <= URL_SAFE


@given(thread_positions, thread_positions)
def test_two_places_have_two_cursors(one: ThreadPosition, other: ThreadPosition) -> None:
    assert (one.cursor() == other.cursor()) == (one == other)


def test_a_cursor_keeps_the_microseconds_that_the_database_has() -> None:
    later = ThreadPosition(PLACE.pinned, PLACE.updated_at + timedelta(microseconds=1), PLACE.id)
    assert ThreadPosition.parse(later.cursor()).updated_at - ThreadPosition.parse(PLACE.cursor()).updated_at == (
        timedelta(microseconds=1)
    )


@given(thread_positions, path_positions)
def test_a_cursor_of_one_list_is_none_of_the_other(thread: ThreadPosition, path: PathPosition) -> None:
    for parse, cursor in ((ThreadPosition.parse, path.cursor()), (PathPosition.parse, thread.cursor())):
        with pytest.raises(CursorInvalidError) as refused:
            page_request(parse, None, cursor, None, None)
        assert refused.value.field == "after"


def packed(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


MALFORMED = [
    "",
    "x",
    "Ω",
    "\x00",
    "\ud800",
    "====",
    "a" * 65,
    "a" * 1_000_000,
    PLACE.cursor() + "=",
    PLACE.cursor() + "\n",
    PLACE.cursor()[:-1],
    PLACE.cursor() + "AA",
    PLACE.cursor().replace("V", "+", 1),
    packed(b"X" + bytes(25)),  # of the right length and no kind
    packed(b"T\x02" + bytes(24)),  # pinned is 0 or 1
    packed(b"T\x00" + b"\x7f" + b"\xff" * 7 + bytes(16)),  # behind the last day there is
    packed(b"T\x00" + b"\x80" + bytes(7) + bytes(16)),  # before the first
    packed(b"M\xff\xff\xff\xff"),  # deeper than the column can hold
    packed(b"m\x00\x00\x00\x01"),
]


@pytest.mark.parametrize("field", ["after", "before"])
@pytest.mark.parametrize("parse", [ThreadPosition.parse, PathPosition.parse], ids=["threads", "path"])
@pytest.mark.parametrize("cursor", MALFORMED, ids=lambda cursor: repr(cursor[:40]))
def test_what_is_no_cursor_is_refused_with_its_argument(parse: Any, cursor: str, field: str) -> None:
    with pytest.raises(CursorInvalidError) as refused:
        page_request(parse, None, cursor if field == "after" else None, None, cursor if field == "before" else None)
    assert refused.value.field == field


@given(st.text(max_size=70) | st.binary(max_size=40).map(packed), st.sampled_from([ThreadPosition, PathPosition]))
def test_any_text_is_a_cursor_in_its_one_spelling_or_is_refused(text: str, kind: Any) -> None:
    try:
        position = page_request(kind.parse, None, text, None, None).after
    except CursorInvalidError:
        return
    assert position is not None
    assert position.cursor() == text


def test_without_arguments_a_page_is_the_first_of_the_default_size() -> None:
    assert page_request(number, None, None, None, None) == PageRequest(DEFAULT_PAGE, None, None, backwards=False)


def test_first_walks_forwards_and_last_backwards() -> None:
    assert page_request(number, 3, "7", None, "9") == PageRequest(3, 7, 9, backwards=False)
    assert page_request(number, None, "7", 3, "9") == PageRequest(3, 7, 9, backwards=True)
    assert page_request(number, None, None, None, "9") == PageRequest(DEFAULT_PAGE, None, 9, backwards=False)


@pytest.mark.parametrize("size", [1, MAX_PAGE])
def test_a_page_has_from_one_entry_to_the_limit(size: int) -> None:
    assert page_request(number, size, None, None, None).limit == size
    assert page_request(number, None, None, size, None).limit == size


@pytest.mark.parametrize("size", [0, -1, MAX_PAGE + 1, 2**31 - 1])
def test_another_size_is_refused_with_its_argument(size: int) -> None:
    for field, arguments in (("first", (size, None)), ("last", (None, size))):
        with pytest.raises(BadUserInputError) as refused:
            page_request(number, arguments[0], None, arguments[1], None)
        assert refused.value.field == field


def test_first_and_last_together_are_refused() -> None:
    with pytest.raises(BadUserInputError) as refused:
        page_request(number, 1, None, 1, None)
    assert refused.value.field == "last"


def fetch(rows: list[int], request: PageRequest[int]) -> list[int]:
    """What a list's query gives: rows between the cursors in walking order, one more than the limit."""
    inside = [
        row
        for row in rows
        if (request.after is None or row > request.after) and (request.before is None or row < request.before)
    ]
    return (inside[::-1] if request.backwards else inside)[: request.limit + 1]


@given(st.integers(0, 30), st.integers(1, 12), st.booleans())
def test_pages_one_after_another_are_the_whole_list_in_its_order(count: int, size: int, backwards: bool) -> None:
    rows = list(range(count))
    walked: list[int] = []
    cursor: str | None = None
    while True:
        arguments = (None, None, size, cursor) if backwards else (size, cursor, None, None)
        request = page_request(number, *arguments)
        page = Page.of(request, fetch(rows, request))
        assert page.records == sorted(page.records), "in the order of the list, whichever way they were fetched"
        assert len(page.records) <= size
        walked = page.records + walked if backwards else walked + page.records
        behind, ahead = (page.has_next, page.has_previous) if backwards else (page.has_previous, page.has_next)
        assert behind == (cursor is not None)
        if not ahead:
            break
        cursor = str(page.records[0] if backwards else page.records[-1])
    assert walked == rows


@pytest.mark.parametrize("backwards", [False, True])
def test_a_page_that_is_just_full_has_no_more_ahead(backwards: bool) -> None:
    request: PageRequest[int] = PageRequest(3, None, None, backwards=backwards)
    walking = [3, 2, 1] if backwards else [1, 2, 3]
    assert Page.of(request, walking) == Page([1, 2, 3], has_next=False, has_previous=False)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_row_beyond_the_limit_is_told_of_and_not_given(backwards: bool) -> None:
    request: PageRequest[int] = PageRequest(2, None, None, backwards=backwards)
    page = Page.of(request, [3, 2, 1] if backwards else [1, 2, 3])
    assert page == (
        Page([2, 3], has_next=False, has_previous=True)
        if backwards
        else Page([1, 2], has_next=True, has_previous=False)
    )


def test_an_empty_page_behind_a_cursor_knows_that_there_was_something_before() -> None:
    request = page_request(number, 5, "9", None, None)
    page: Page[int] = Page.of(request, [])
    assert (page.records, page.has_next, page.has_previous) == ([], False, True)
