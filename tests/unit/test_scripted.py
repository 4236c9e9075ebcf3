"""Scripted models: what a script says is what is streamed, and what cannot be played is refused by name."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    ImageOutput,
    PromptMessage,
    ProviderEvent,
    ProviderFailure,
    ReasoningDelta,
    ReasoningSignature,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.scripted import (
    BUILT_IN_SCRIPTS,
    Crash,
    Draw,
    Echo,
    Explain,
    Fail,
    HangUp,
    Pause,
    Say,
    Script,
    ScriptedProvider,
    ScriptError,
    Step,
    drawn,
    load_scripts,
    parse_script,
)
from services.file_types import facts_of_beginning

DEADLINE_SECONDS = 30.0
FAST = 1_000_000.0
FINISH = Finish(FinishReason.STOP)
QUESTION = "Why is 🦉  the sky\nblue?"


def asked(question: str, model: str = "m") -> GenerationRequest:
    history = (
        PromptMessage.of("system", "Be brief."),
        PromptMessage.of("user", "An older question"),
        PromptMessage.of("assistant", "An older answer"),
        PromptMessage.of("user", question),
    )
    return GenerationRequest(model, history)


async def play(script: Script, question: str = QUESTION) -> list[ProviderEvent]:
    """Every event of a script."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [event async for event in ScriptedProvider({"m": script}).stream(asked(question))]


async def play_until_raised(script: Script) -> tuple[list[ProviderEvent], BaseException]:
    """The events before a script's failure, and the failure."""
    events: list[ProviderEvent] = []
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            async for event in ScriptedProvider({"m": script}).stream(asked(QUESTION)):
                events.append(event)  # noqa: PERF401 - those before the failure are kept
    except (ProviderFailure, RuntimeError) as failure:
        return events, failure
    raise AssertionError("the script did not fail")


def said(events: list[ProviderEvent], kind: type[TextDelta] | type[ReasoningDelta] = TextDelta) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


@pytest.mark.parametrize("name", BUILT_IN_SCRIPTS)
async def test_a_built_in_model_answers_whole_and_the_same_every_time(name: str) -> None:
    fast = Script(BUILT_IN_SCRIPTS[name].steps, FAST)
    first, again = await play(fast), await play(fast)
    assert first == again
    assert isinstance(first[-2], TokenUsage)
    assert first[-1] == FINISH
    assert first.count(FINISH) == 1
    assert said(first)


async def test_the_first_built_in_model_answers_about_the_question_in_one_line_of_it() -> None:
    events = await play(Script(BUILT_IN_SCRIPTS["scripted"].steps))
    assert said(events).startswith("You asked: “Why is 🦉 the sky blue?”\n\n")
    assert said(events, ReasoningDelta) == ""


async def test_a_long_question_is_repeated_only_in_part() -> None:
    events = await play(Script((Explain(),)), "x" * 100_000)
    assert said(events).startswith(f"You asked: “{'x' * 200}…”")
    assert len(said(events)) < 2_000


async def test_the_reasoning_model_reasons_first_and_then_answers() -> None:
    events = await play(Script(BUILT_IN_SCRIPTS["scripted-reasoning"].steps))
    kinds = [type(event) for event in events[:-2]]
    assert kinds == sorted(kinds, key=lambda kind: kind is TextDelta)
    assert said(events, ReasoningDelta).endswith("will do.")
    assert said(events).startswith("You asked:")


async def test_the_echo_model_says_the_last_question_of_the_user() -> None:
    events = await play(Script(BUILT_IN_SCRIPTS["scripted-echo"].steps))
    assert said(events) == QUESTION


@given(st.text(max_size=40), st.integers(1, 12))
async def test_an_echo_is_cut_every_so_many_code_points_behind_an_empty_delta(text: str, size: int) -> None:
    *pieces, usage, finish = await play(Script((Echo(size),)), text)
    assert said(pieces) == text
    sizes = [len(piece.text) for piece in pieces if isinstance(piece, TextDelta)]
    assert sizes[0] == 0
    assert all(length == size for length in sizes[1:-1])
    assert all(1 <= length <= size for length in sizes[1:])
    assert (type(usage), finish) == (TokenUsage, FINISH)


@given(st.text(max_size=60), st.booleans())
async def test_what_is_said_comes_word_by_word_and_whole(text: str, reasoning: bool) -> None:
    events = await play(Script((Say(text, reasoning=reasoning),)))
    kind, other = (ReasoningDelta, TextDelta) if reasoning else (TextDelta, ReasoningDelta)
    assert said(events, kind) == text
    assert said(events, other) == ""
    for event in events[:-2]:
        assert isinstance(event, kind)
        assert len(event.text.split()) <= 1


async def test_steps_are_played_in_their_order() -> None:
    call = ToolCall("c1", "search", {"q": [1, None]})
    events = await play(Script((Say("Hm.", reasoning=True), Say("One two"), call, Pause(0.0), Say(" three"))))
    assert events[:-2] == [
        ReasoningDelta("Hm."),
        TextDelta("One"),
        TextDelta(" two"),
        call,
        TextDelta(" three"),
    ]


async def test_images_and_signatures_are_played_as_they_stand() -> None:
    image = ImageOutput("image/png", b"x")
    events = await play(Script((Say("Hm.", reasoning=True), ReasoningSignature("s"), Draw(3, 2), image)))
    assert events[:2] == [ReasoningDelta("Hm."), ReasoningSignature("s")]
    assert events[2] == ImageOutput("image/png", drawn(3, 2))
    assert events[3] == image


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (320, 200)])
def test_what_is_drawn_is_a_png_of_that_size(width: int, height: int) -> None:
    facts = facts_of_beginning(drawn(width, height))
    assert (facts.content_type, facts.width, facts.height) == ("image/png", width, height)


async def test_usage_is_reported_once_at_the_end_as_the_script_says_or_as_words() -> None:
    reported = TokenUsage(1, 2, 3, 4)
    events = await play(Script((reported, Say("a b c"))))
    assert [event for event in events if isinstance(event, TokenUsage)] == [reported]
    assert events[-2:] == [reported, FINISH]
    counted = (await play(Script((Say("a b c"),)), "two words"))[-2]
    assert counted == TokenUsage(prompt=2 + 3 + 3 + 2, completion=3)


async def test_an_empty_script_ends_without_a_word() -> None:
    assert [type(event) for event in await play(Script(()))] == [TokenUsage, Finish]


async def test_a_failure_comes_behind_what_was_said_with_code_and_patience() -> None:
    events, failure = await play_until_raised(Script((Say("a b"), Fail(FailureCode.RATE_LIMITED, 7), Say("never"))))
    assert said(events) == "a b"
    assert isinstance(failure, ProviderFailure)
    assert (failure.code, failure.retry_after) == (FailureCode.RATE_LIMITED, 7)


async def test_a_crash_is_an_exception_that_no_adapter_promises() -> None:
    events, failure = await play_until_raised(Script((Say("a b"), Crash(), Say("never"))))
    assert said(events) == "a b"
    assert not isinstance(failure, ProviderFailure)


async def test_who_hangs_up_says_neither_usage_nor_finish() -> None:
    assert await play(Script((Say("a b"), HangUp(), Say("never")))) == [TextDelta("a"), TextDelta(" b")]


async def test_a_script_that_hangs_sends_nothing_more_and_can_be_closed() -> None:
    stream = ScriptedProvider({"m": Script((Say("a"), Pause(None), Say("never")))}).stream(asked(QUESTION))
    assert await anext(stream) == TextDelta("a")
    waiting = asyncio.create_task(anext(stream))
    for _ in range(1_000):
        await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    assert (await asyncio.gather(waiting, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    await stream.aclose()


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it, or a little behind it."""

    def __init__(self, late: float = 0.0) -> None:
        self._now = 0.0
        self._late = late
        super().__init__()

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0].when()) + self._late  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def times_of_words(script: Script, late: float = 0.0) -> list[float]:
    """When each word comes, in seconds from the begin, on a loop that is late by so much at every timer."""
    loop = JumpingLoop(late)

    async def listen() -> list[float]:
        stream = ScriptedProvider({"m": script}).stream(asked(QUESTION))
        return [loop.time() async for event in stream if isinstance(event, TextDelta)]

    try:
        return loop.run_until_complete(listen())
    finally:
        loop.close()


@pytest.mark.parametrize("late", [0.0, 0.03])
def test_a_word_comes_when_it_is_due_however_late_the_words_before_it_were(late: float) -> None:
    script = Script((Say(" ".join(f"w{n}" for n in range(100))),), words_per_second=10)
    times = times_of_words(script, late)
    assert len(times) == 100
    for number, at in enumerate(times, start=1):
        assert number / 10 - 1e-6 <= at <= number / 10 + late + 1e-6


def test_a_pause_is_not_caught_up_by_faster_words() -> None:
    script = Script((Say("a b"), Pause(5.0), Say("c d")), words_per_second=10)
    assert times_of_words(script) == pytest.approx([0.1, 0.2, 5.3, 5.4])


async def test_a_script_without_a_speed_lets_others_run() -> None:
    turns = 0
    stream = ScriptedProvider({"m": Script((Say("a " * 1_000),))}).stream(asked(QUESTION))

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    async for _ in stream:
        pass
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert turns >= 1_000 // 64


async def test_models_of_one_provider_play_at_once_and_do_not_mix() -> None:
    provider = ScriptedProvider({name: Script((Say(f"{name} " * 200),), FAST) for name in "abcdef"})

    async def one(name: str) -> str:
        return said([event async for event in provider.stream(asked(QUESTION, name))])

    async with asyncio.timeout(DEADLINE_SECONDS):
        answers = await asyncio.gather(*(one(name) for name in "abcdef" * 5))
    assert answers == [f"{name} " * 200 for name in "abcdef" * 5]


STEPS: list[tuple[Any, Step]] = [
    ({"text": "Hello"}, Say("Hello")),
    ({"text": ""}, Say("")),
    ({"reasoning": "Hm"}, Say("Hm", reasoning=True)),
    ({"echo": 3}, Echo(3)),
    ({"pause": 0}, Pause(0.0)),
    ({"pause": 2}, Pause(2.0)),
    ({"pause": 1.5}, Pause(1.5)),
    ({"pause": "forever"}, Pause(None)),
    ({"tool": "search", "arguments": {"q": 1}}, ToolCall("call_0", "search", {"q": 1})),
    ({"tool": "search", "arguments": None}, ToolCall("call_0", "search", None)),
    ({"signature": "EqQ="}, ReasoningSignature("EqQ=")),
    ({"image": [320, 200]}, Draw(320, 200)),
    ({"usage": {"prompt": 1, "completion": 2, "reasoning": 1, "cached": 1}}, TokenUsage(1, 2, 1, 1)),
    ({"usage": {"completion": 5}}, TokenUsage(0, 5, 0, 0)),
    ({"fail": "RATE_LIMITED", "retryAfter": 20}, Fail(FailureCode.RATE_LIMITED, 20)),
    *[({"fail": code.value}, Fail(code)) for code in FailureCode],
    ("hang up", HangUp()),
    ("crash", Crash()),
]
NO_STEPS: list[Any] = [
    None,
    7,
    [],
    {},
    "",
    "hangup",
    "text",
    {"say": "x"},
    {"text": 1},
    {"text": None},
    {"text": "x", "reasoning": "y"},
    {"text": "x", "speed": 1},
    {"reasoning": ["x"]},
    {"echo": 0},
    {"echo": -1},
    {"echo": 1.5},
    {"echo": "3"},
    {"pause": -0.1},
    {"pause": "1"},
    {"pause": None},
    {"pause": "for ever"},
    {"tool": "search"},
    {"signature": ""},
    {"signature": None},
    {"image": [1]},
    {"image": [0, 1]},
    {"image": [1, 1_001]},
    {"image": [True, 1]},
    {"image": [1.5, 1]},
    {"image": "aGk="},
    {"arguments": {}},
    {"tool": 1, "arguments": {}},
    {"tool": "search", "arguments": {}, "result": 1},
    {"usage": None},
    {"usage": 5},
    {"usage": [1, 2]},
    {"usage": {"total": 5}},
    {"usage": {"prompt": 1}, "text": "x"},
    {"fail": "NO_SUCH_CODE"},
    {"fail": "rate_limited"},
    {"fail": None},
    {"fail": "RATE_LIMITED", "retryAfter": "20"},
    {"fail": "RATE_LIMITED", "retryAfter": None},
    {"fail": "RATE_LIMITED", "after": 1},
    {"retryAfter": 1},
]


@pytest.mark.parametrize(("form", "step"), STEPS, ids=lambda value: str(value)[:40])
def test_every_form_of_a_step_is_read(form: Any, step: Step) -> None:
    script = parse_script("m", {"steps": [form], "wordsPerSecond": 30})
    assert script == Script((step,), 30.0)
    assert type(script.steps[0]) is type(step)


@pytest.mark.parametrize("form", NO_STEPS, ids=lambda value: str(value)[:40])
def test_what_is_no_step_is_refused_with_its_model_and_place(form: Any) -> None:
    with pytest.raises(ScriptError) as refused:
        parse_script("my-model", {"steps": [{"text": "fine"}, form]})
    assert "'my-model'" in str(refused.value)
    assert "step 1" in str(refused.value)


DEFECTS = [
    {"echo": True},
    {"pause": True},
    {"fail": "RATE_LIMITED", "retryAfter": True},
    {"fail": "RATE_LIMITED", "retryAfter": -1},
    {"fail": "RATE_LIMITED", "retryAfter": 2**31},
    {"usage": {"prompt": "many"}},
    {"usage": {"prompt": None}},
    {"usage": {"prompt": -1}},
    {"usage": {"prompt": 2**31}},
]


@pytest.mark.parametrize("form", DEFECTS, ids=str)
def test_a_number_that_cannot_be_stored_is_refused_too(form: Any) -> None:
    with pytest.raises(ScriptError, match="step 0"):
        parse_script("m", {"steps": [form]})


def test_a_pause_of_whole_seconds_is_a_pause() -> None:
    assert times_of_words(Script((Pause(1), Say("a")))) == [1.0]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, "expected steps"),
        ([], "expected steps"),
        ("text", "expected steps"),
        ({}, "expected steps"),
        ({"wordsPerSecond": 3}, "expected steps"),
        ({"steps": {"text": "x"}}, "expected steps"),
        ({"steps": [], "speed": 1}, "expected steps"),
        ({"steps": [], "wordsPerSecond": "30"}, "wordsPerSecond must be a number from 0"),
        ({"steps": [], "wordsPerSecond": None}, "wordsPerSecond must be a number from 0"),
        ({"steps": [], "wordsPerSecond": -1}, "wordsPerSecond must be a number from 0"),
    ],
)
def test_what_is_no_script_is_refused_with_its_model(script: Any, expected: str) -> None:
    with pytest.raises(ScriptError, match=f"'my-model'.*{expected}"):
        parse_script("my-model", script)


def test_a_script_without_a_speed_is_as_fast_as_it_is_read() -> None:
    assert parse_script("m", {"steps": []}) == Script((), 0.0)


def test_calls_of_one_script_have_ids_of_their_own() -> None:
    call = {"tool": "search", "arguments": {}}
    steps = parse_script("m", {"steps": [call, {"text": "x"}, call]}).steps
    assert [step.call_id for step in steps if isinstance(step, ToolCall)] == ["call_0", "call_2"]


def test_the_scripts_of_a_file_are_read_by_name(tmp_path: Path) -> None:
    file = tmp_path / "scripts.json"
    file.write_bytes(orjson.dumps({"one": {"steps": ["crash"]}, "two": {"wordsPerSecond": 0.5, "steps": []}}))
    assert load_scripts(file) == {"one": Script((Crash(),)), "two": Script((), 0.5)}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'"one"', b"null"])
def test_a_file_that_holds_no_scripts_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "scripts.json"
    file.write_bytes(content)
    with pytest.raises(ScriptError, match=re.escape(str(file))):
        load_scripts(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match=re.escape(str(tmp_path))):
        load_scripts(tmp_path)
    with pytest.raises(ScriptError, match=r"none\.json"):
        load_scripts(tmp_path / "none.json")


def test_the_example_of_the_documentation_can_be_played() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/scripted-models.md").read_text()
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert example
    for name, script in orjson.loads(example[1]).items():
        assert len(parse_script(name, script).steps) == 5
