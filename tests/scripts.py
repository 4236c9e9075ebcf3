"""Models for tests: each plays one behaviour of a provider; and one that a test drives word by word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from models.prices import ModelPrices
from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    PromptText,
    Provider,
    ProviderEvent,
    ProviderFailure,
    ReasoningDelta,
    ReasoningSignature,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.catalog import Ability
from providers.registry import ModelRecord
from providers.scripted import Crash, Draw, Fail, HangUp, Pause, Say, Script, ScriptedProvider

_SCRIPTS = {
    "two-words": Script((Say("Hello world"), TokenUsage(7, 2, 0, 3))),
    "priced": Script(
        (Say("Hello world"), TokenUsage(1_000, 100, 40, 600)), prices=ModelPrices(2_000_000, 200_000, 8_000_000)
    ),
    "priced-and-hangs": Script((Say("one two "), Pause(None)), prices=ModelPrices(2_000_000, 200_000, 8_000_000)),
    "slow": Script((Say(" ".join(f"word{n}" for n in range(2_000))),), words_per_second=100),
    "fails-at-once": Script((Fail(FailureCode.RATE_LIMITED, 7),)),
    "fails-midway": Script((Say("one two "), Fail(FailureCode.PROVIDER_UNAVAILABLE))),
    "hangs": Script((Say("one two "), Pause(None))),
    "hangs-at-once": Script((Pause(None),)),
    "hangs-up": Script((Say("one two "), HangUp())),
    "crashes": Script((Say("one two "), Crash())),
    "says-nothing": Script(()),
    "thinks-and-calls": Script(
        (
            Say("Let me see.", reasoning=True),
            Say("Looking it up. "),
            ToolCall("c1", "search", {"q": "🦉"}),
            Say("Done."),
        )
    ),
    "draws": Script((Say("Here: "), Draw(64, 48), Say("Nice?"), TokenUsage(7, 1_300))),
    "draws-uncounted": Script((Draw(64, 48),)),
    "thinks-signed": Script((Say("Let me see.", reasoning=True), ReasoningSignature("EqQ="), Say("Done."))),
    "title-maker": Script((Say("“A short title”\nand more"), TokenUsage(11, 4))),
    "title-breaker": Script((Crash(),)),
}


# They play whatever they are told, and are shown all there is.
_ABILITIES = frozenset(Ability)


class DrivenProvider:
    """A provider that says what a test puts in, and nothing before.

    Each request waits in `asked`; `events(model_id)` is the queue the test feeds: events, an exception, or None to end.
    """

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[ProviderEvent | BaseException | None]] = {}
        self.requests: dict[str, GenerationRequest] = {}
        self.closed: dict[str, asyncio.Event] = {}

    def queue(self, question: str) -> asyncio.Queue[ProviderEvent | BaseException | None]:
        """The queue of the answer to this question."""
        return self.queues.setdefault(question, asyncio.Queue())

    def closing(self, question: str) -> asyncio.Event:
        """Set when the answer to this question is closed, however."""
        return self.closed.setdefault(question, asyncio.Event())

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Play the queue of the request's last question: what was asked, without the files that stand before it."""
        asked = request.messages[-1].content[-1]
        assert isinstance(asked, PromptText)
        question = asked.text
        self.requests[question] = request
        queue = self.queue(question)
        try:
            while True:
                event = await queue.get()
                if event is None:
                    yield Finish(FinishReason.STOP)
                    return
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.closing(question).set()

    async def close(self) -> None:
        """Nothing to release."""


class _Scripts:
    """All models of the tests, for `Server(providers=…)`."""

    def __init__(self) -> None:
        self.driven = DrivenProvider()

    def models(self) -> list[tuple[ModelRecord, Provider]]:
        """Each model with its provider."""
        scripted = ScriptedProvider(_SCRIPTS)
        models: list[tuple[ModelRecord, Provider]] = [
            (ModelRecord(name, name, "test", name, script.prices, _ABILITIES), scripted)
            for name, script in _SCRIPTS.items()
        ]
        models.append((ModelRecord("driven", "driven", "test", "driven", None, _ABILITIES), self.driven))
        return models


SCRIPTS = _Scripts()

__all__ = ["SCRIPTS", "ProviderFailure", "ReasoningDelta", "TextDelta", "ToolCall"]
