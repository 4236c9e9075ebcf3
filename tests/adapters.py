"""What the tests of all model adapters share: vendors' behaviour as scripts, and what a stream came to.

Whatever fails here is checked for the key, the address and the vendor's words; the fixture `no_canary_in_logs` does the
same for everything that was logged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from providers.base import (
    FailureCode,
    Finish,
    GenerationRequest,
    PromptMessage,
    ProviderEvent,
    ProviderFailure,
    ReasoningDelta,
    TextDelta,
)
from providers.event_stream import Retries
from providers.http import Deadlines
from tests.vendor_server import Script, Wire

KEY = "sk-canary-7f3a91c2"
VENDOR_TEXT = "canary-words-of-the-vendor"
REQUEST = GenerationRequest(model="small-1", messages=(PromptMessage.of("user", "Hello"),))
PATIENT = Deadlines(connect_seconds=5, first_event_seconds=5, idle_seconds=5, total_seconds=10)
AT_ONCE = Retries(first_pause_seconds=0.001)
SOON = 0.15  # a deadline that is meant to pass
AT_LAST = 10.0  # by when every test has its outcome
PROMPTLY = 1.0  # within which the vendor must see the connection closed
SCRIPTS = "漢字かな 한글 👩‍👩‍👧‍👦 👍🏽 🇩🇪🇯🇵 é\u0302 Ω عربى\u200f"


@dataclass
class Outcome:
    """How one stream ended, and what it gave before."""

    events: list[ProviderEvent] = field(default_factory=list)
    failure: ProviderFailure | None = None

    @property
    def code(self) -> FailureCode | None:
        return self.failure.code if self.failure else None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def reasoning(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, ReasoningDelta))

    @property
    def finished(self) -> bool:
        return any(isinstance(event, Finish) for event in self.events)


async def outcome_of(events: AsyncGenerator[ProviderEvent, None]) -> Outcome:
    outcome = Outcome()
    try:
        async with contextlib.aclosing(events), asyncio.timeout(AT_LAST):
            async for event in events:
                outcome.events.append(event)
    except ProviderFailure as failure:
        outcome.failure = failure
        check_is_fit_for_users(failure)
    return outcome


def check_is_fit_for_users(failure: ProviderFailure) -> None:
    """One sentence without the key, the vendor's words or an address, here and in every exception it brings along."""
    assert failure.message.endswith(".")
    assert failure.message.count(". ") == 0
    error: BaseException | None = failure
    while error is not None:
        written = f"{error} {error!r} {error.args!r}"
        for forbidden in (KEY, VENDOR_TEXT, "127.0.0.1", "http:"):
            assert forbidden not in written
        error = error.__cause__ or error.__context__


def stream_of(*pieces: bytes) -> Script:
    """A script that sends these pieces of an event stream and ends the body properly."""

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(pieces)
        await wire.end()

    return script


def hung_up_after(*pieces: bytes, framing: Any = "chunked") -> Script:
    """A script that closes the connection behind these pieces without ending the body."""

    async def script(wire: Wire) -> None:
        await wire.head(framing=framing)
        await wire.pieces(pieces)

    return script


def silent_after(*pieces: bytes) -> Script:
    """A script that sends these pieces and then nothing more until the client leaves."""

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(pieces)
        await wire.gone()

    return script


def endlessly(piece: bytes, *before: bytes, pause: float = 0.0) -> Script:
    """A script that repeats a piece until the client leaves."""

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(before)
        while True:
            await wire.send(piece)
            await asyncio.sleep(pause)

    return script


def whole(body: bytes, content_type: str = "application/json", headers: dict[str, str] | None = None) -> Script:
    """A script that answers in one piece."""

    async def script(wire: Wire) -> None:
        await wire.whole(200, body, content_type=content_type, headers=headers)

    return script


def one_after_another(*scripts: Script) -> Script:
    """A script that follows one of these for each request, in their order."""
    left = iter(scripts)

    async def script(wire: Wire) -> None:
        await next(left)(wire)

    return script


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)


def fuzzed(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of these fields, some of them replaced by anything else."""
    return st.fixed_dictionaries({}, optional={name: values | JSON for name, values in fields.items()}) | JSON
