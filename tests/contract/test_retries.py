"""When a request is sent again: if the vendor put it off before the first event, within a bound, and not too soon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.anthropic import AnthropicProvider
from providers.base import FailureCode, ProviderFailure
from providers.chat_completions import ChatCompletionsProvider
from providers.event_stream import EventStreamProvider, Retries
from providers.http import Deadlines
from tests.adapters import (
    AT_ONCE,
    KEY,
    PATIENT,
    PROMPTLY,
    REQUEST,
    SOON,
    one_after_another,
    outcome_of,
    stream_of,
    whole,
)
from tests.anthropic_wire import answer, error, message_start, text_block
from tests.vendor_server import Script, VendorServer, Wire

pytestmark = pytest.mark.usefixtures("no_canary_in_logs")


def sse(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


@dataclass(frozen=True)
class Format:
    """A wire format: its adapter, an answer in it, and an error in place of the first word and behind one."""

    adapter: Callable[..., EventStreamProvider]
    hello: list[bytes]
    word: list[bytes]
    overloaded: bytes


WORD = sse({"choices": [{"delta": {"content": "Hi"}}]})
FORMATS = {
    "chat completions": Format(
        ChatCompletionsProvider,
        [WORD, sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}), b"data: [DONE]\n\n"],
        [WORD],
        sse({"error": {"code": 503, "message": "m"}}),
    ),
    "anthropic": Format(
        AnthropicProvider,
        answer(text_block("Hi")),
        [message_start(), *text_block("Hi")[:2]],
        error("overloaded_error"),
    ),
}


@pytest.fixture(params=FORMATS.values(), ids=list(FORMATS))
def wire_format(request: pytest.FixtureRequest) -> Format:
    wire_format: Format = request.param
    return wire_format


def provider_for(
    session: aiohttp.ClientSession, wire_format: Format, base_url: str, **options: Any
) -> EventStreamProvider:
    options = {"api_key": KEY, "deadlines": PATIENT, "retries": AT_ONCE, **options}
    return wire_format.adapter(session=session, base_url=base_url, **options)


def refused(status: int, **headers: str) -> Script:
    async def script(wire: Wire) -> None:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        await wire.whole(status, b'{"error": {"message": "m"}}', headers=sent)

    return script


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
async def test_a_request_that_was_put_off_twice_is_answered(
    session: aiohttp.ClientSession, wire_format: Format, status: int
) -> None:
    script = one_after_another(refused(status), refused(status), stream_of(*wire_format.hello))
    async with VendorServer(script) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.text, outcome.finished, len(vendor.requests)) == ("Hi", True, 3)
    assert len({request.body for request in vendor.requests}) == 1


@pytest.mark.parametrize(("status", "code"), [(429, FailureCode.RATE_LIMITED), (529, FailureCode.PROVIDER_UNAVAILABLE)])
async def test_a_vendor_who_puts_off_for_ever_is_asked_three_times(
    session: aiohttp.ClientSession, wire_format: Format, status: int, code: FailureCode
) -> None:
    async with VendorServer(refused(status)) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.events, outcome.code, len(vendor.requests)) == ([], code, 3)


@pytest.mark.parametrize("status", [302, 400, 401, 402, 403, 404, 408, 409, 413, 422])
async def test_what_would_be_refused_again_is_not_asked_again(
    session: aiohttp.ClientSession, wire_format: Format, status: int
) -> None:
    async with VendorServer(refused(status)) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert outcome.failure is not None
    assert len(vendor.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"code": "insufficient_quota"}}',
        b'{"error": {"details": {"error_code": "enforced_spend_limit_reached"}}}',
    ],
)
async def test_a_limit_that_is_no_matter_of_time_is_not_asked_again(
    session: aiohttp.ClientSession, wire_format: Format, body: bytes
) -> None:
    async def script(wire: Wire) -> None:
        await wire.whole(429, body)

    async with VendorServer(script) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.code, len(vendor.requests)) == (FailureCode.PROVIDER_REJECTED_REQUEST, 1)


async def test_a_vendor_who_says_not_to_ask_again_is_not(session: aiohttp.ClientSession, wire_format: Format) -> None:
    async with VendorServer(refused(529, x_should_retry="false")) as vendor:
        await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert len(vendor.requests) == 1


async def test_a_lost_connection_is_not_tried_again(session: aiohttp.ClientSession, wire_format: Format) -> None:
    async def script(wire: Wire) -> None:
        wire.reset()

    async with VendorServer(script) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.code, len(vendor.requests)) == (FailureCode.PROVIDER_UNAVAILABLE, 1)


async def test_an_error_as_the_first_word_is_a_putting_off(session: aiohttp.ClientSession, wire_format: Format) -> None:
    script = one_after_another(stream_of(wire_format.overloaded), stream_of(*wire_format.hello))
    async with VendorServer(script) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.text, outcome.finished, len(vendor.requests)) == ("Hi", True, 2)


@pytest.mark.parametrize("in_one_packet", [True, False])
async def test_behind_the_first_word_nothing_is_tried_again(
    session: aiohttp.ClientSession, wire_format: Format, in_one_packet: bool
) -> None:
    pieces = [*wire_format.word, wire_format.overloaded]
    async with VendorServer(stream_of(*([b"".join(pieces)] if in_one_packet else pieces))) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.text, outcome.code, len(vendor.requests)) == ("Hi", FailureCode.PROVIDER_UNAVAILABLE, 1)


async def test_a_whole_answer_that_is_an_error_is_a_putting_off_too(
    session: aiohttp.ClientSession, wire_format: Format
) -> None:
    failed = whole(b'{"error": {"type": "overloaded_error"}}')
    async with VendorServer(one_after_another(failed, stream_of(*wire_format.hello))) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert (outcome.text, len(vendor.requests)) == ("Hi", 2)


async def test_retry_after_is_waited_for(session: aiohttp.ClientSession, wire_format: Format) -> None:
    now, asked = asyncio.get_running_loop().time, []
    answers = iter([refused(429, retry_after="1"), stream_of(*wire_format.hello)])

    async def script(wire: Wire) -> None:
        asked.append(now())
        await next(answers)(wire)

    async with VendorServer(script) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert outcome.text == "Hi"
    assert asked[1] - asked[0] >= 1


async def test_a_retry_after_beyond_patience_is_told_at_once(
    session: aiohttp.ClientSession, wire_format: Format
) -> None:
    async with VendorServer(refused(429, retry_after="6")) as vendor:
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    assert outcome.failure is not None
    assert (outcome.failure.retry_after, len(vendor.requests)) == (6, 1)


async def test_there_is_no_pause_beyond_the_deadline(session: aiohttp.ClientSession, wire_format: Format) -> None:
    async with VendorServer(refused(429, retry_after="5")) as vendor:
        options = {"deadlines": Deadlines(first_event_seconds=5)}
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url, **options).stream(REQUEST))
    assert (outcome.code, len(vendor.requests)) == (FailureCode.RATE_LIMITED, 1)


async def test_all_requests_of_an_answer_have_one_deadline(session: aiohttp.ClientSession, wire_format: Format) -> None:
    async def silent(wire: Wire) -> None:
        await wire.gone()

    async def slowly_refused(wire: Wire) -> None:
        await asyncio.sleep(2 * SOON)
        await refused(503)(wire)

    now = asyncio.get_running_loop().time
    async with VendorServer(one_after_another(slowly_refused, silent)) as vendor:
        started, options = now(), {"deadlines": Deadlines(first_event_seconds=3 * SOON)}
        outcome = await outcome_of(provider_for(session, wire_format, vendor.base_url, **options).stream(REQUEST))
        assert now() - started < 4.5 * SOON, "not a deadline for each"
    assert outcome.code is FailureCode.PROVIDER_TIMEOUT
    assert len(vendor.requests) == 2


@pytest.mark.parametrize("leaves", ["close", "cancel"])
async def test_a_pause_ends_when_nobody_waits_any_more(
    session: aiohttp.ClientSession, wire_format: Format, leaves: str
) -> None:
    was_refused = asyncio.Event()

    async def script(wire: Wire) -> None:
        await refused(503)(wire)
        was_refused.set()

    async with VendorServer(script) as vendor:
        retries = Retries(first_pause_seconds=3)
        provider = provider_for(session, wire_format, vendor.base_url, retries=retries)
        task = asyncio.create_task(outcome_of(provider.stream(REQUEST)))
        await was_refused.wait()
        await asyncio.sleep(0.05)  # the refusal has to be read; nothing tells when
        if leaves == "close":
            await provider.close()
            outcome = await asyncio.wait_for(task, PROMPTLY)
            assert outcome.code is FailureCode.PROVIDER_UNAVAILABLE
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, PROMPTLY)
    assert len(vendor.requests) == 1


async def test_a_retry_is_logged_without_a_word_of_the_vendor(
    session: aiohttp.ClientSession, wire_format: Format, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with VendorServer(one_after_another(refused(529), stream_of(*wire_format.hello))) as vendor:
            await outcome_of(provider_for(session, wire_format, vendor.base_url).stream(REQUEST))
    told = [record.getMessage() for record in caplog.records if record.name == "providers.event_stream"]
    assert told == ["a model provider put a request off (PROVIDER_UNAVAILABLE); it is sent again in 0.0 s"]


@given(number=st.integers(1, 5), wanted=st.none() | st.integers(0, 3600), most=st.integers(0, 4))
def test_a_pause_is_as_long_as_was_asked_for_and_bounded(number: int, wanted: int | None, most: int) -> None:
    retries = Retries(most=most, first_pause_seconds=0.5, longest_wait_seconds=5)
    refusal = ProviderFailure(FailureCode.RATE_LIMITED, "Wait.", retry_after=wanted, passing=True)
    pause = retries.pause_before(number, refusal)
    if number > most or (wanted or 0) > 5:
        assert pause is None
    else:
        own = 0.5 * 2 ** (number - 1)
        assert pause is not None
        assert (wanted or 0) + own / 2 <= pause <= (wanted or 0) + own
    refusal.passing = False
    assert retries.pause_before(number, refusal) is None
