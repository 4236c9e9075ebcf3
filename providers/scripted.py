"""Models that need no network: they play a script, word by word, as fast or as badly as it says.

They make the first minute work, let a frontend be built without a key, and let tests play every fault a provider has.
A script is a list of steps; `docs/scripted-models.md` shows them all. What a script says is exactly what is streamed:
nothing is random.
"""

from __future__ import annotations

import asyncio
import re
import struct
import zlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from models.prices import MAX_PRICE, ModelPrices
from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    ImageOutput,
    ProviderEvent,
    ProviderFailure,
    ReasoningDelta,
    ReasoningSignature,
    TextDelta,
    TokenUsage,
    ToolCall,
)

_MAX_SIDE = 1_000
_BEATS_A_SECOND = 1_000
_WOKEN_AT_ONCE = 16
_CHUNK = re.compile(r"\s*\S+|\s+")


class ScriptError(Exception):
    """A script cannot be played; the text says which step and what was expected."""


@dataclass(frozen=True, slots=True)
class Say:
    """Stream a text word by word, as answer or as reasoning."""

    text: str
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Echo:
    """Stream the user's last message back, cut every `size` code points (an empty delta first), to test any text."""

    size: int = 3


@dataclass(frozen=True, slots=True)
class Explain:
    """Answer about the question that was asked: what the built-in model says."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Send an image of this size: a plain PNG that fades from one colour into another."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Send nothing for this many seconds; None: for ever."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Fail:
    """Fail here, as a vendor would."""

    code: FailureCode
    retry_after: int | None = None


@dataclass(frozen=True, slots=True)
class HangUp:
    """End without saying that the answer is whole."""


@dataclass(frozen=True, slots=True)
class Crash:
    """Fail as a defect in an adapter would: with an exception that nobody expects."""


Step: TypeAlias = (
    Say
    | Echo
    | Explain
    | Draw
    | Pause
    | Fail
    | HangUp
    | Crash
    | ToolCall
    | TokenUsage
    | ReasoningSignature
    | ImageOutput
)


@dataclass(frozen=True, slots=True)
class Script:
    """What a scripted model plays. `words_per_second` 0: as fast as it is read. `prices` None: not known."""

    steps: tuple[Step, ...]
    words_per_second: float = 0.0
    prices: ModelPrices | None = None


BUILT_IN_SCRIPTS: Mapping[str, Script] = {
    "scripted": Script((Explain(),), words_per_second=10),
    "scripted-reasoning": Script(
        (Say("The question is short. A short answer with one example will do.", reasoning=True), Explain()),
        words_per_second=30,
    ),
    "scripted-echo": Script((Echo(),)),
    "scripted-image": Script((Say("Here is a picture. "), Draw(320, 200), Say("It was drawn just now.")), 10),
}


class Beat:
    """Wakes whoever waits for a moment, all by one timer: thirty moments a second of a thousand scripts are many.

    Beside `asyncio.sleep`, which has a timer for each, a thousand scripts cost 3 µs less a token. No part of what a
    server does: the benchmark's other servers by Python take their words' moments from here as well.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # By the millisecond that a moment is in, and those milliseconds in their order.
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        self._beats: list[int] = []
        self._timer: asyncio.Handle | None = None
        self._rings_at = 0

    def until(self, due: float) -> asyncio.Future[None]:
        """Done at a moment of the loop's clock, or up to a millisecond after."""
        woken = self.loop.create_future()
        beat = int(due * _BEATS_A_SECOND + 0.999)
        if (waiting := self._waiting.get(beat)) is None:
            self._waiting[beat] = [woken]
            heappush(self._beats, beat)
            if self._timer is None or beat < self._rings_at:
                self._set(beat)
        else:
            waiting.append(woken)
        return woken

    def _set(self, beat: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._rings_at = self.loop.call_at(beat / _BEATS_A_SECOND, self._ring), beat

    def _ring(self) -> None:
        self._timer = None
        beats, now = self._beats, round(self.loop.time() * _BEATS_A_SECOND)
        woken = 0
        while beats and beats[0] <= now:
            if woken >= _WOKEN_AT_ONCE:
                # Who was due first is through before others are woken, as if the words came over the network.
                self._timer, self._rings_at = self.loop.call_soon(self._ring), beats[0]
                return
            waiting = self._waiting.pop(heappop(beats))
            woken += len(waiting)
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)
        if beats:
            self._set(beats[0])


class ScriptedProvider:
    """Plays scripts by model name. Needs no key and no network."""

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self.scripts = dict(scripts)
        self._beat: Beat | None = None

    async def close(self) -> None:
        """Nothing to release."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Play the script of the model. Reports what the script says was used, else a count of words."""
        script = self.scripts[request.model]
        loop = asyncio.get_running_loop()
        if self._beat is None or self._beat.loop is not loop:
            self._beat = Beat(loop)
        beat = self._beat
        pause = 1 / script.words_per_second if script.words_per_second else 0.0
        question = next((message.text for message in reversed(request.messages) if message.role == "user"), "")
        prompt = sum(len(message.text.split()) for message in request.messages)
        # What was asked is not held for as long as the answer takes.
        del request
        due = loop.time()
        words = 0
        usage: TokenUsage | None = None
        for step in script.steps:
            match step:
                case Say() | Echo() | Explain():
                    for event in _spoken(step, question):
                        words += 1
                        # Due times, not pauses in a row: the speed holds however late the loop wakes us.
                        due += pause
                        if pause and due > loop.time():
                            await beat.until(due)
                        elif words % 64 == 0:
                            await asyncio.sleep(0)
                        yield event
                case Pause(None):
                    await asyncio.Event().wait()
                case Pause(float() | int() as seconds):
                    await asyncio.sleep(seconds)
                    due = loop.time()
                case Fail(code, retry_after):
                    raise ProviderFailure(
                        code, "The script says that the provider fails here.", retry_after=retry_after
                    )
                case HangUp():
                    return
                case Crash():
                    raise RuntimeError("the script says that the adapter has a defect")
                case Draw(width, height):
                    yield ImageOutput("image/png", drawn(width, height))
                case ToolCall() | ReasoningSignature() | ImageOutput():
                    yield step
                case TokenUsage():
                    usage = step
        yield usage or TokenUsage(prompt=prompt, completion=words)
        yield Finish(FinishReason.STOP)


def _spoken(step: Say | Echo | Explain, question: str) -> Iterator[ProviderEvent]:
    match step:
        case Say(text, reasoning):
            return iter(_said(text, reasoning))
        case Echo(size):
            pieces = (question[at : at + size] for at in range(0, len(question), size))
            return map(TextDelta, chain([""], pieces))
        case Explain():
            return map(TextDelta, _CHUNK.findall(_explanation(question)))


@lru_cache(maxsize=64)
def _said(text: str, reasoning: bool) -> tuple[ProviderEvent, ...]:
    """The events of a text. Made once: they were half of what a word of a script cost."""
    return tuple(map(ReasoningDelta if reasoning else TextDelta, _CHUNK.findall(text)))


def drawn(width: int, height: int) -> bytes:
    """A PNG of this size: red grows to the right, blue to the bottom."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    reds = [255 * x // width for x in range(width)]
    rows = (
        b"\x00" + b"".join(bytes((red, 96, 255 * y // height)) for red in reds)  # 0: the row is not filtered
        for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits for each of red, green and blue
    pixels = zlib.compress(b"".join(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _explanation(question: str) -> str:
    asked = " ".join(question.split())
    shown = asked if len(asked) <= 200 else asked[:200] + "…"
    return (
        f"You asked: “{shown}”\n\n"
        "I am the scripted model: I need no network and no key, and I always answer like this, one word at a time, so "
        "that you can watch a stream and break it.\n\n"
        "Each piece of text reaches you as a MessageDelta with a cursor. Close the connection in the middle of this "
        "sentence, subscribe again with `after` set to the last cursor you saw, and you will read exactly the rest: "
        "nothing twice, nothing missing. Open the same message in a second tab and both tabs follow. Reload after I "
        "have finished and the whole answer is there, because it is stored and not only streamed.\n\n"
        "Set OPENAI_API_KEY (and OPENAI_BASE_URL for any compatible server) to talk to a real model. ✨"
    )


def load_scripts(file: Path) -> dict[str, Script]:
    """The scripts of a JSON file: `{"name": {"wordsPerSecond": 30, "steps": [{"text": "…"}, …]}}`.

    Raises:
        ScriptError: the file cannot be read, or a step is not one of those in docs/scripted-models.md.
    """
    try:
        models = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ScriptError(f"{file} is not a readable JSON file") from error
    if not isinstance(models, dict):
        raise ScriptError(f"{file} must hold an object of models by name")
    return {name: parse_script(name, script) for name, script in models.items()}


def parse_script(name: str, script: Any) -> Script:
    """One script from its JSON form.

    Raises:
        ScriptError: naming the model and the step.
    """
    match script:
        case {"steps": list(steps), **rest} if not rest.keys() - {"wordsPerSecond", "prices"}:
            speed, prices = rest.get("wordsPerSecond", 0), rest.get("prices")
        case _:
            raise ScriptError(f"model {name!r}: expected steps and, if you like, wordsPerSecond and prices")
    if not isinstance(speed, int | float) or speed < 0:
        raise ScriptError(f"model {name!r}: wordsPerSecond must be a number from 0")
    played = tuple(_parse_step(name, index, step) for index, step in enumerate(steps))
    return Script(played, float(speed), None if prices is None else _parse_prices(name, prices))


def _parse_prices(name: str, prices: Any) -> ModelPrices:
    match prices:
        case {"prompt": int(), "cached": int(), "completion": int(), **rest} if not rest and all(
            not isinstance(price, bool) and 0 <= price <= MAX_PRICE for price in prices.values()
        ):
            return ModelPrices(**prices)
    raise ScriptError(
        f"model {name!r}: prices are prompt, cached and completion, each a whole number from 0 to {MAX_PRICE}"
    )


def _parse_step(name: str, index: int, step: Any) -> Step:
    match step:
        case {"text": str(text), **rest} if not rest:
            return Say(text)
        case {"reasoning": str(text), **rest} if not rest:
            return Say(text, reasoning=True)
        case {"echo": int(size), **rest} if not rest and _is_count(size) and size > 0:
            return Echo(size)
        case {"pause": int(seconds) | float(seconds), **rest} if (
            not rest and not isinstance(seconds, bool) and seconds >= 0
        ):
            return Pause(float(seconds))
        case {"pause": "forever", **rest} if not rest:
            return Pause(None)
        case {"signature": str(signature), **rest} if not rest and signature:
            return ReasoningSignature(signature)
        case {"image": [int(width), int(height)], **rest} if not rest and all(
            _is_count(side) and 0 < side <= _MAX_SIDE for side in (width, height)
        ):
            return Draw(width, height)
        case {"tool": str(tool), "arguments": arguments, **rest} if not rest:
            return ToolCall(f"call_{index}", tool, arguments)
        case {"usage": dict(usage), **rest} if not rest and all(map(_is_count, usage.values())):
            try:
                return TokenUsage(**usage)
            except TypeError as error:
                raise ScriptError(
                    f"model {name!r}, step {index}: usage has prompt, completion, reasoning, cached"
                ) from error
        case {"fail": str(code), **rest} if code in FailureCode.__members__ and not rest:
            return Fail(FailureCode(code))
        case {"fail": str(code), "retryAfter": int(seconds), **rest} if (
            code in FailureCode.__members__ and not rest and _is_count(seconds)
        ):
            return Fail(FailureCode(code), seconds)
        case "hang up":
            return HangUp()
        case "crash":
            return Crash()
    raise ScriptError(f"model {name!r}, step {index}: not a step that docs/scripted-models.md lists")


def _is_count(value: Any) -> bool:
    """Whether it can be stored as a number of something: a whole number from 0 to 2^31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
