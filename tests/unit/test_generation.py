"""One answer while it is written: what is held meanwhile, and who is waited for."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable
from typing import cast
from uuid import uuid4

import pytest

from models.records import MessageStatus
from providers.base import Finish, FinishReason, GenerationRequest, ProviderEvent, TextDelta
from services import generation
from services.generated_images import GeneratedImages
from services.generation import Generation, GenerationLimits, RequestMaker
from streams.buffer import StreamBuffer
from streams.ending import StreamHold

REQUEST = GenerationRequest("a model", ())


class Model:
    """A provider that says a word, and ends when it is let.

    Args:
        stubborn: it goes on where it is cancelled.
    """

    def __init__(self, *, stubborn: bool = False) -> None:
        self.ending = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._stubborn = stubborn

    async def close(self) -> None:
        """Nothing to release."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """A word, and the end."""
        yield TextDelta("word")
        try:
            await self.ending.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            if not self._stubborn:
                raise
            await self.ending.wait()
        yield Finish(FinishReason.STOP)


async def asked() -> GenerationRequest:
    """What is asked, without reading any history."""
    return REQUEST


def answer(
    model: Model,
    request: RequestMaker = asked,
    *,
    idle_seconds: float = 60,
    total_seconds: float = 60,
) -> Generation:
    """An answer of a model that makes no images."""
    message_id, owner_id = uuid4(), uuid4()
    hold = StreamHold(message_id, uuid4(), owner_id, 1, "a model")
    limits = GenerationLimits(idle_seconds, total_seconds, 1_000)
    images = cast("GeneratedImages", None)
    return Generation(hold, StreamBuffer(message_id, owner_id), request, model, limits, images)


async def test_what_is_asked_is_not_held_while_the_answer_is_written() -> None:
    model = Model()
    question = asyncio.Event()  # anything that can be referred to weakly

    async def request(question: asyncio.Event = question) -> GenerationRequest:
        return REQUEST

    written = answer(model, request)
    held = weakref.ref(question)
    reading = asyncio.create_task(written.read())
    del request, question
    await written.buffer.wait(0)
    assert held() is None
    model.ending.set()
    assert (await reading).status is MessageStatus.COMPLETE


@pytest.mark.parametrize("limit", ["idle_seconds", "total_seconds"])
async def test_a_model_that_is_silent_for_too_long_is_left(limit: str) -> None:
    model = Model()
    end = await answer(model, **{limit: 0.01}).read()  # type: ignore[arg-type]
    assert model.cancelled.is_set()
    assert end.failure is not None
    assert (end.status, end.failure.code) == (MessageStatus.FAILED, "PROVIDER_TIMEOUT")
    assert [part.text for part in end.parts] == ["word"]  # type: ignore[union-attr]


async def test_what_came_in_time_is_heard_though_the_process_was_held_meanwhile() -> None:
    model = Model()
    written = answer(model, idle_seconds=0.05)
    reading = asyncio.create_task(written.read())
    await written.buffer.wait(0)
    asyncio.get_running_loop().call_later(0.02, model.ending.set)
    time.sleep(0.1)  # the fault
    assert (await reading).status is MessageStatus.COMPLETE


@pytest.mark.parametrize("late", [False, True], ids=["while it is written", "when it has ended"])
async def test_an_answer_that_was_stopped_is_freed_without_the_garbage_collector(late: bool) -> None:
    model = Model()
    gc.collect()
    gc.disable()
    try:
        written = answer(model)
        reading = asyncio.create_task(written.read())
        await written.buffer.wait(0)
        if late:
            model.ending.set()
            await reading
        written.end_early(MessageStatus.STOPPED, None)
        end = await reading
        held = weakref.ref(written), weakref.ref(written.buffer)
        del written, reading
        await asyncio.sleep(0)
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
    assert end.status is (MessageStatus.COMPLETE if late else MessageStatus.STOPPED)


async def test_an_answer_that_is_stopped_before_its_model_is_asked_asks_nobody() -> None:
    def unasked() -> Awaitable[GenerationRequest]:
        raise AssertionError("asked")

    written = answer(Model(), unasked)
    written.end_early(MessageStatus.STOPPED, None)
    end = await written.read()
    assert (end.status, end.parts, end.called_provider) == (MessageStatus.STOPPED, [], False)


async def test_a_model_that_does_not_let_go_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its silence may be much longer: who stopped the answer does not wait for that.
    monkeypatch.setattr(generation, "_CLOSE_DEADLINE_SECONDS", 0.01)
    model = Model(stubborn=True)
    written = answer(model)
    reading = asyncio.create_task(written.read())
    await written.buffer.wait(0)
    written.end_early(MessageStatus.STOPPED, None)
    end = await reading
    assert model.cancelled.is_set()
    assert (end.status, end.failure) == (MessageStatus.STOPPED, None)
    model.ending.set()
    left = [task for task in asyncio.all_tasks() if task.get_name() == f"provider {written.hold.message_id}"]
    await asyncio.wait_for(asyncio.gather(*left), 10)
