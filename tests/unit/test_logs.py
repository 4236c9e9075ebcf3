"""The log: one line an event, whatever was put into it; traces that can be read; no token of anybody's."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from urllib.parse import urlsplit

import pytest
from asyncpg.exceptions import UniqueViolationError
from asyncpg.exceptions._base import DataError
from hypothesis import given
from hypothesis import strategies as st

from models.log_fields import log_fields, log_note, log_scope
from server.logs import _QUIET, configure_logging
from server.runtime import Server

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) ([\w.]+) (.*)")
# What begins a new line somewhere, moves a cursor, hides text, or cannot be written at all.
CONTROLS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x00\x08\x1b\x7f\x9b\u202e\u200b\ufeff\ud800"
FORGED = "2026-11-05 12:00:00,000 INFO server.runtime the database was deleted"


@contextmanager
def server_log(level: str = "DEBUG", style: str = "TEXT") -> Iterator[io.StringIO]:
    """What is logged in the block, by the very configuration of the server; undone afterwards."""
    refusing = logging.getLogger("aiohttp.server")
    changed = [logging.getLogger(name) for name in (None, *_QUIET)]
    levels, filters, handlers = [logger.level for logger in changed], refusing.filters[:], changed[0].handlers
    # Those of pytest are set aside: they would be closed, and xdist cannot carry every character they catch.
    changed[0].handlers = []
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            configure_logging(level, style)
        yield written
    finally:
        changed[0].handlers, refusing.filters = handlers, filters
        for logger, before in zip(changed, levels, strict=True):
            logger.setLevel(before)


def fail(text: str) -> None:
    raise ValueError(text)


def raised(text: str) -> Exception:
    """An exception with a trace."""
    try:
        fail(text)
    except ValueError as error:
        return error
    raise AssertionError


def test_an_event_is_one_line_of_time_level_logger_message_and_extras() -> None:
    extras = {"message_id": "abc", "status": "COMPLETE", "seconds": 1.5, "none": None}
    with server_log() as written:
        logging.getLogger("services.generation").info("answer %s", "ended", extra=extras)
    found = LINE.fullmatch(written.getvalue().rstrip("\n"))
    assert found
    assert found.groups() == (
        "INFO",
        "services.generation",
        "answer ended message_id=abc status=COMPLETE seconds=1.5 none=None",
    )
    assert written.getvalue().endswith("none=None\n")


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"U+{ord(control):04X}")
def test_no_control_character_reaches_the_log(control: str) -> None:
    text = f"a{control}{FORGED}"
    with server_log() as written:
        logging.getLogger("x").warning(text)
        logging.getLogger("x").warning("asked by %s", text)
        logging.getLogger("x").warning("extra", extra={"title": text})
    lines = written.getvalue().split("\n")
    assert len(lines) == 4
    assert control not in "".join(lines)
    for line in lines[:3]:
        assert repr(control)[1:-1] in line, "what was there can still be told"
        assert not line.startswith(FORGED)


@given(st.text(st.characters()), st.text(st.characters()))
def test_whatever_is_logged_is_one_line_of_printable_characters(said: str, extra: str) -> None:
    with server_log() as written:
        logging.getLogger("x").warning("%s", said, extra={"extra": extra})
    logged = written.getvalue()
    assert logged.endswith("\n")
    assert logged[:-1].isprintable()
    if said.isprintable() and extra.isprintable():
        assert logged.endswith(f" WARNING x {said} extra={extra}\n")


def test_an_object_in_a_message_or_an_extra_is_escaped_as_well() -> None:
    class Sly:
        def __str__(self) -> str:
            return f"a\n{FORGED}"

    with server_log() as written:
        logging.getLogger("x").warning("%s", Sly(), extra={"sly": Sly()})
    assert written.getvalue().count("\n") == 1


def test_a_trace_can_be_read_line_by_line() -> None:
    try:
        try:
            fail("the cause")
        except ValueError as cause:
            raise KeyError("no such thing") from cause
    except KeyError:
        with server_log() as written:
            logging.getLogger("x").exception("a request failed", extra={"error_id": "e1"})
    first, *marked = written.getvalue().rstrip("\n").split("\n")
    assert all(line.startswith("  | ") for line in marked)
    trace = [line.removeprefix("  | ") for line in marked]
    assert first.endswith(" ERROR x a request failed error_id=e1")
    assert trace[0] == "Traceback (most recent call last):"
    assert "ValueError: the cause" in trace
    assert "The above exception was the direct cause of the following exception:" in trace
    assert trace[-1] == "KeyError: 'no such thing'"
    assert any(__file__ in line for line in trace)


def test_a_message_with_a_trace_forges_no_line() -> None:
    with server_log() as written:
        logging.getLogger("x").error("error at %s", f"a\n{FORGED}", exc_info=raised("x"))
    assert FORGED not in written.getvalue().split("\n")


@pytest.mark.parametrize("text", [f"a\n{FORGED}", f"a\r{FORGED}", f"a\x1b[2K\x1b[1A{FORGED}"])
def test_the_text_of_an_exception_forges_no_line(text: str) -> None:
    with server_log() as written:
        logging.getLogger("x").error("a request failed", exc_info=raised(text))
    assert FORGED not in re.split(r"[\n\r]", written.getvalue())
    assert "\x1b" not in written.getvalue()


def test_a_level_below_the_one_asked_for_is_not_written() -> None:
    with server_log("WARNING") as written:
        logging.getLogger("x").info("quiet")
        logging.getLogger("x").warning("loud")
    assert written.getvalue().count("\n") == 1
    assert "loud" in written.getvalue()


def test_requests_and_statements_are_no_events_of_ours_even_for_debugging() -> None:
    with server_log("DEBUG") as written:
        logging.getLogger("aiohttp.access").info("GET /graphql")
        logging.getLogger("tortoise.db_client").debug("SELECT 'text of a user'")
    assert written.getvalue() == ""


def test_a_defect_in_a_handler_of_requests_is_still_logged() -> None:
    with server_log() as written:
        logging.getLogger("aiohttp.server").error("Error handling request", exc_info=raised("a defect"))
    assert "ValueError: a defect" in written.getvalue()


@given(st.text(st.characters()), st.text(st.characters()), st.floats())
def test_in_json_whatever_is_logged_is_one_line_of_printable_ascii(said: str, extra: str, number: float) -> None:
    with server_log(style="JSON") as written:
        logging.getLogger("x").warning("%s", said, extra={"extra": extra, "number": number, "level": "FORGED"})
    logged = written.getvalue()
    assert logged.endswith("\n")
    assert logged[:-1].isascii()
    assert logged[:-1].isprintable()
    line = json.loads(logged, parse_constant=fail)
    assert (line["message"], line["extra"]) == (said, extra)
    assert (line["level"], line["logger"]) == ("WARNING", "x"), "no field can pass for another"
    assert line["number"] in (number, str(number))


def test_in_json_a_trace_is_a_field_and_times_are_in_utc() -> None:
    with server_log(style="JSON") as written:
        logging.getLogger("x").error("a request failed", exc_info=raised(f"a\n{FORGED}"))
    (text,) = written.getvalue().splitlines()
    line = json.loads(text)
    assert line["exception"].startswith("Traceback")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["ts"])


@pytest.mark.parametrize("style", ["TEXT", "JSON"])
def test_lines_of_a_scope_have_its_ids_and_those_after_it_have_not(style: str) -> None:
    with server_log(style=style) as written:
        with log_scope(request_id="r-1"):
            with log_scope(message_id="m-1"):
                log_note(thread_id="t-1")
                logging.getLogger("x").info("inner", extra={"message_id": "m-2"})
            logging.getLogger("x").info("outer")
        log_note(request_id="nobody's")
        logging.getLogger("x").info("outside")
    inner, outer, outside = written.getvalue().splitlines()
    assert all(name in inner for name in ("r-1", "m-2", "t-1"))
    assert "m-1" not in inner, "what the line says itself is what holds"
    assert "r-1" in outer
    assert "t-1" not in outer
    assert "request_id" not in outside


async def test_a_task_takes_the_ids_of_where_it_was_started_along() -> None:
    async def fields() -> dict[str, str]:
        await asyncio.sleep(0)
        return dict(log_fields())

    with log_scope(request_id="r-1"):
        task = asyncio.create_task(fields())
    assert await task == {"request_id": "r-1"}
    assert log_fields() == {}


CANARY = "what the user wrote"


@pytest.mark.parametrize(
    "error",
    [
        UniqueViolationError(f"duplicate key ({CANARY})"),
        DataError(f"invalid input for query argument $1: '{CANARY}'"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("style", ["TEXT", "JSON"])
def test_values_that_the_database_refuses_are_not_quoted(error: Exception, style: str) -> None:
    failure = raised("storing failed")
    failure.__cause__ = error
    with server_log(style=style) as written:
        logging.getLogger("x").error("a defect", exc_info=failure)
    assert CANARY not in written.getvalue()
    assert "storing failed" in written.getvalue()
    assert type(error).__name__ in written.getvalue()


def test_libraries_that_log_bodies_and_keys_for_debugging_are_quiet() -> None:
    with server_log("DEBUG") as written:
        for name in ("botocore.auth", "botocore.endpoint", "urllib3.connectionpool", "s3transfer.tasks"):
            logging.getLogger(name).debug("CanonicalRequest: a body and a key")
    assert written.getvalue() == ""


async def send_raw(server: Server, header: bytes) -> bytes:
    """Send a request with this header, byte for byte; all that the server answers until it closes."""
    where = urlsplit(server.address)
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(b"POST /graphql HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n")
        await writer.drain()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


TOKEN = "eyJhbGciOiJIUzI1NiJ9"
# None is longer than what a server reads at once: closed with more unread, a connection is reset, and the answer lost.
REFUSED = {
    "too long": f"Authorization: Bearer {TOKEN}{'x' * 20_000}\r\n".encode(),
    "with a NUL": f"Authorization: Bearer {TOKEN}\x00\r\n".encode(),
    "over two lines": f"Authorization: Bearer {TOKEN}\n {TOKEN}\r\n".encode(),
    "without a name": f"Authorization {TOKEN}: Bearer\r\n".encode(),
    "among too many": f"Authorization: Bearer {TOKEN}\r\n".encode() + b"X: 1\r\n" * 2_000,
    "of two lengths": f"Authorization: Bearer {TOKEN}\r\nContent-Length: 1\r\nContent-Length: 2\r\n".encode(),
}


@pytest.mark.parametrize("header", REFUSED.values(), ids=list(REFUSED))
async def test_a_token_in_a_header_that_is_refused_is_not_logged(server: Server, header: bytes) -> None:
    with server_log() as written:
        answer = await send_raw(server, header)
    assert re.match(rb"HTTP/1\.[01] 4\d\d ", answer)
    assert TOKEN not in written.getvalue()


async def test_the_filter_is_needed_because_aiohttp_logs_what_it_refuses(server: Server) -> None:
    with server_log() as written:
        logging.getLogger("aiohttp.server").filters = []
        await send_raw(server, REFUSED["too long"])
    assert TOKEN in written.getvalue(), "aiohttp has mended it: the filter in server/logs.py can go"
