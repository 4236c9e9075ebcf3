"""Reading an answer: from anywhere, at any time, by anyone who may."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import socket
import struct
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from providers.base import FailureCode, ProviderFailure
from server.runtime import Server
from streams.buffer import MAX_DELTA_CHARS
from tests.client import READ, Client, GraphQLErrors, connect, text_of, transport_of
from tests.scripts import SCRIPTS, ReasoningDelta, TextDelta, ToolCall

DIFFICULT = (
    "Grüße, 世界! 👩‍👩‍👧‍👦 🇩🇪 e\u0301\u0327 ḱ שלום עולם \u202eabc\u202c नमस्ते 𝔘𝔫𝔦 \U0001f469\U0001f3fd‍\U0001f680 "
    "a\u0300\u0301\u0302\u0303 ﷽ \ufeff\u200b end"
)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=60).filter(str.strip)
property_settings = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Driven:
    """An answer that the test writes word by word."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.question = f"Driven {uuid.uuid4()}"
        self.queue = SCRIPTS.driven.queue(self.question)
        self.id = ""
        self.thread = ""

    async def begin(self) -> Driven:
        turn = await self.client.send(self.question, model="driven")
        self.id, self.thread = turn["assistantMessage"]["id"], turn["thread"]["id"]
        return self

    def say(self, *texts: str) -> None:
        for text in texts:
            self.queue.put_nowait(TextDelta(text))

    def end(self) -> None:
        self.queue.put_nowait(None)


async def gather_until(subscription: Any, count: int) -> list[dict[str, Any]]:
    """Events until the reader holds so many characters."""
    events: list[dict[str, Any]] = []
    while len(text_of(events)) < count:
        payload = await subscription.next()
        assert payload is not None
        events.append(payload["data"]["messageStream"])
    return events


@pytest.mark.parametrize("live", [True, False], ids=["while it is written", "after its end"])
async def test_every_cursor_gives_exactly_the_rest(client: Client, live: bool) -> None:
    driven = await Driven(client).begin()
    async with client.reading(driven.id) as subscription:
        seen: list[dict[str, Any]] = []
        for character in DIFFICULT:
            driven.say(character, "")
            seen += await gather_until(subscription, 1)
    assert text_of(seen) == DIFFICULT
    if not live:
        driven.end()
        await client.finish(driven.id)
    for index, event in enumerate(seen):
        held = text_of(seen[: index + 1])
        async with client.reading(driven.id, event["cursor"]) as subscription:
            rest = await gather_until(subscription, len(DIFFICULT) - len(held)) if held != DIFFICULT else []
        assert held + text_of(rest) == DIFFICULT, index
        assert len(rest) <= 1, "a late reader gets one merged delta"
    if live:
        driven.end()
    assert (await client.finish(driven.id))["text"] == DIFFICULT


@property_settings
@given(text=texts, data=st.data())
async def test_an_answer_cut_anywhere_any_number_of_times_is_read_whole(
    server: Server, text: str, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(1, len(text)), max_size=3, unique=True).map(sorted))
    async with connect(server.address) as client:
        await client.sign_in()
        turn = await client.send(text, model="scripted-echo")
        held, cursor = "", None
        for cut in cuts:
            async with client.reading(turn["assistantMessage"]["id"], cursor) as subscription:
                while len(held) < cut:
                    payload = await subscription.next()
                    event = payload["data"]["messageStream"]
                    cursor = event["cursor"]
                    if event["__typename"] == "MessageEnded":
                        break
                    held += event["text"]
        events = await client.read(turn["assistantMessage"]["id"], cursor)
        if cursor is None or not cursor.endswith("."):
            assert events[-1]["__typename"] == "MessageEnded"
            assert events[-1]["message"]["text"] == text
        assert held + text_of(events) == text
        assert (await client.message(turn["assistantMessage"]["id"]))["text"] == text


async def test_joining_before_midway_at_the_end_and_after_it_gives_the_whole(client: Client) -> None:
    driven = await Driven(client).begin()
    async with client.reading(driven.id) as before:
        driven.say("one ", "two ")
        first = await gather_until(before, 8)
        async with client.reading(driven.id) as midway:
            driven.say("three")
            second = await gather_until(midway, 13)
            async with client.reading(driven.id) as at_end:
                third = await gather_until(at_end, 13)
                driven.end()
                for events, subscription in ((first, before), (second, midway), (third, at_end)):
                    events += [event async for event in subscription.events()]
                    assert text_of(events) == "one two three"
                    assert [event["__typename"] for event in events].count("MessageEnded") == 1
                    assert events[-1]["message"]["text"] == "one two three"
    after = await client.read(driven.id)
    assert [event["__typename"] for event in after] == ["MessageDelta", "MessageEnded"]
    assert after[-1] == first[-1]


async def reset(client: Client, message_id: str, held: str, cursor: str | None, count: int) -> tuple[str, str | None]:
    """Read on until so many more characters are held, then lose the connection by a reset; what is held then."""
    async with client.reading(message_id, cursor) as subscription:
        until = len(held) + count
        while len(held) < until:
            payload = await subscription.next()
            assert payload is not None
            event = payload["data"]["messageStream"]
            cursor = event["cursor"]
            if event["__typename"] == "MessageEnded":
                break
            held += event["text"]
        with contextlib.suppress(OSError):
            connection = transport_of(subscription.ws).get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        subscription.abort()
    return held, cursor


async def test_two_tabs_that_are_reset_again_and_again_hold_the_whole_text(client: Client) -> None:
    """CHECKLIST R1, R9: 20 answers, two tabs each, five resets each, wherever they fall."""
    chance = random.Random(9)

    async def tab(message_id: str, counts: list[int]) -> str:
        held, cursor = "", None
        for count in counts:
            held, cursor = await reset(client, message_id, held, cursor, count)
        return held + text_of(await client.read(message_id, cursor))

    async def one() -> None:
        driven = await Driven(client).begin()
        words = [f"{DIFFICULT[n % len(DIFFICULT)]}{n} " for n in range(120)]
        tabs = [asyncio.create_task(tab(driven.id, [chance.randrange(1, 60) for _ in range(5)])) for _ in range(2)]
        for word in words:
            driven.say(word)
            await asyncio.sleep(0.002)
        driven.end()
        whole = "".join(words)
        assert await asyncio.gather(*tabs) == [whole, whole]
        assert (await client.message(driven.id))["text"] == whole

    for _ in range(4):
        await asyncio.gather(*(one() for _ in range(5)))


async def test_whoever_comes_after_the_last_reader_left_is_served(client: Client, server: Server) -> None:
    driven = await Driven(client).begin()
    held, cursor = "", None
    for n in range(100):
        async with client.reading(driven.id, cursor) as subscription:
            driven.say(f"{n} ")
            for event in await gather_until(subscription, len(f"{n} ")):
                held, cursor = held + event["text"], event["cursor"]
        if n % 2:
            # Not before the server knows that nobody reads any more.
            async with asyncio.timeout(10):
                while any(buffer.readers_waiting for buffer in server.hub):
                    await asyncio.sleep(0)
    driven.end()
    whole = "".join(f"{n} " for n in range(100))
    assert held == whole == (await client.finish(driven.id))["text"]


async def test_a_thousand_readers_that_come_back_at_once_all_catch_up(client: Client) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8_192)), hard))
    driven = await Driven(client).begin()
    words = [f"word{n} " for n in range(110)]
    driven.say(*words[:100])
    async with client.reading(driven.id) as subscription:
        seen = await gather_until(subscription, len("".join(words[:100])))
    cursors = [None, seen[-1]["cursor"]]
    begun = asyncio.Event()

    async def come_back(number: int) -> str:
        await begun.wait()
        return text_of(await client.read(driven.id, cursors[number % 2]))

    readers = [asyncio.create_task(come_back(number)) for number in range(1_000)]
    begun.set()
    for word in words[100:]:
        driven.say(word)
        await asyncio.sleep(0.05)
    driven.end()
    whole = "".join(words)
    rest = "".join(words[100:])
    assert await asyncio.gather(*readers) == [whole, rest] * 500


async def test_a_new_answer_is_another_stream_than_the_old_one(client: Client) -> None:
    driven = await Driven(client).begin()
    driven.say("old words")
    async with client.reading(driven.id) as tab:
        seen = await gather_until(tab, 9)
        with pytest.raises(GraphQLErrors) as busy:
            await client.retry(driven.id, model="driven")
        assert busy.value.code == "THREAD_BUSY"
        driven.end()
        assert [event["__typename"] async for event in tab.events()] == ["MessageEnded"]
    # The same question again: the tab of before is told of another message, and its cursor is none of that one.
    turn = await client.retry(driven.id, model="driven")
    new = turn["assistantMessage"]["id"]
    assert new != driven.id
    with pytest.raises(GraphQLErrors) as mismatch:
        await client.read(new, seen[-1]["cursor"])
    assert mismatch.value.code == "CURSOR_MISMATCH"
    driven.say("new ")
    async with client.reading(new) as other_tab:
        assert text_of(await gather_until(other_tab, 4)) == "new "
        assert text_of(await client.read(driven.id)) == "old words"
        assert await client.read(driven.id, seen[-1]["cursor"]) == (await client.read(driven.id))[1:]
    driven.end()
    assert (await client.finish(new))["text"] == "new "


@pytest.mark.parametrize(
    "texts",
    [["x"] * 50_000, ["\U0001f989"] * 5_000, ["y" * 1_000_000], []],
    ids=["50,000 characters one by one", "wide characters one by one", "a megabyte at once", "nothing at all"],
)
async def test_an_answer_in_pieces_of_any_size_is_read_whole_in_bounded_frames(
    client: Client, texts: list[str]
) -> None:
    driven = await Driven(client).begin()
    whole = "".join(texts)
    async with client.reading(driven.id) as early:
        driven.say(*texts)
        driven.end()
        events = [event async for event in early.events()]
        late = await client.read(driven.id)
    for read in (events, late):
        assert text_of(read) == whole
        assert all(0 < len(event["text"]) <= MAX_DELTA_CHARS for event in read[:-1])
        assert (read[-1]["__typename"], read[-1]["message"]["text"]) == ("MessageEnded", whole)
        # An answer of nothing has failed, and says so.
        assert read[-1]["message"]["status"] == ("COMPLETE" if whole else "FAILED")


async def test_behind_its_end_a_stream_has_nothing_more(client: Client) -> None:
    turn = await client.send("End")
    events = await client.read(turn["assistantMessage"]["id"])
    assert await client.read(turn["assistantMessage"]["id"], events[-1]["cursor"]) == []
    assert await client.read(turn["assistantMessage"]["id"], events[-2]["cursor"]) == [events[-1]]


async def test_twenty_readers_read_the_same_though_one_does_not_read(client: Client) -> None:
    driven = await Driven(client).begin()
    async with client.socket() as lazy:
        # It subscribes and never receives again: its socket fills up.
        await lazy.receive()
        await lazy.send_json(
            {
                "id": "1",
                "type": "subscribe",
                "payload": {
                    "query": READ,
                    "variables": {"id": driven.id},
                },
            }
        )
        transport = transport_of(lazy)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        transport.pause_reading()
        readers = [asyncio.create_task(client.read(driven.id)) for _ in range(19)]
        words = [f"{'x' * 1_000} {number} " for number in range(600)]
        for start in range(0, len(words), 50):
            driven.say(*words[start : start + 50])
            await asyncio.sleep(0)
        driven.end()
        whole = "".join(words)
        for events in await asyncio.wait_for(asyncio.gather(*readers), 60):
            assert text_of(events) == whole
    assert (await client.message(driven.id))["text"] == whole


async def test_parts_of_every_kind_reach_the_reader_and_the_row(client: Client) -> None:
    turn = await client.send("Think", model="thinks-and-calls")
    events = await client.read(turn["assistantMessage"]["id"])
    answer = events[-1]["message"]
    assert text_of(events, "REASONING") == "Let me see."
    assert text_of(events) == answer["text"] == "Looking it up. Done."
    assert [part["__typename"] for part in answer["parts"]] == ["ReasoningPart", "TextPart", "ToolPart", "TextPart"]
    assert answer["parts"][2] == {
        "__typename": "ToolPart",
        "callId": "c1",
        "name": "search",
        "arguments": {"q": "🦉"},
        "result": None,
    }
    again = await client.read(answer["id"])
    assert [(event["__typename"], event.get("partIndex")) for event in again] == [
        ("MessageDelta", 0),
        ("MessageDelta", 1),
        ("MessagePartAdded", 2),
        ("MessageDelta", 3),
        ("MessageEnded", None),
    ]


async def test_from_every_cursor_of_mixed_parts_the_rest_follows(client: Client) -> None:
    driven = await Driven(client).begin()
    for event in (
        ReasoningDelta("hm"),
        TextDelta("ab"),
        ToolCall("1", "t", None),
        ToolCall("2", "t", []),
        TextDelta("c"),
    ):
        driven.queue.put_nowait(event)
    driven.end()
    whole = await client.read(driven.id)
    for index, seen in enumerate(whole):
        assert await client.read(driven.id, seen["cursor"]) == whole[index + 1 :]


async def test_what_a_provider_sends_that_cannot_be_stored_is_replaced_not_lost(client: Client) -> None:
    driven = await Driven(client).begin()
    driven.say("a\x00b", "\ud83d", "c")
    driven.end()
    answer = await client.finish(driven.id)
    assert (answer["status"], answer["text"]) == ("COMPLETE", "a\ufffdb\ufffdc")


CURSOR_ERRORS = [
    ("", "CURSOR_INVALID"),
    ("nonsense", "CURSOR_INVALID"),
    ("'; DROP TABLE messages; --", "CURSOR_INVALID"),
    ("x" * 100_000, "CURSOR_INVALID"),
]


@pytest.mark.parametrize(("cursor", "code"), CURSOR_ERRORS, ids=["empty", "nonsense", "sql", "long"])
async def test_a_malformed_cursor_is_its_own_error(client: Client, cursor: str, code: str) -> None:
    turn = await client.send("Cursor")
    with pytest.raises(GraphQLErrors) as refused:
        await client.read(turn["assistantMessage"]["id"], cursor)
    assert (refused.value.code, refused.value.extensions["field"]) == (code, "after")


@pytest.mark.parametrize("live", [True, False])
async def test_a_cursor_of_another_stream_or_from_the_future_is_its_own_error(client: Client, live: bool) -> None:
    driven = await Driven(client).begin()
    driven.say("abc")
    async with client.reading(driven.id) as subscription:
        seen = await gather_until(subscription, 3)
    if not live:
        driven.end()
        await client.finish(driven.id)
    other = await client.send("Other stream")
    with pytest.raises(GraphQLErrors) as foreign:
        await client.read(other["assistantMessage"]["id"], seen[-1]["cursor"])
    assert foreign.value.code == "CURSOR_MISMATCH"
    prefix = seen[-1]["cursor"].rsplit(".", 1)[0]
    for future in (f"{prefix}.4", f"{prefix}.999999999999999", f"{prefix}.2.", f"{prefix}.4."):
        with pytest.raises(GraphQLErrors) as ahead:
            await client.read(driven.id, future)
        assert ahead.value.code == "CURSOR_AHEAD", future
    driven.end()


async def test_a_stop_keeps_what_had_come_and_closes_the_provider(client: Client, server: Server) -> None:
    driven = await Driven(client).begin()
    driven.say("kept ")
    async with client.reading(driven.id) as subscription:
        events = await gather_until(subscription, 5)
        stopped = await client.stop(driven.id)
        events += [event async for event in subscription.events()]
    assert (stopped["status"], stopped["text"], stopped["error"]) == ("STOPPED", "kept ", None)
    assert events[-1]["message"] == stopped == await client.message(driven.id)
    assert SCRIPTS.driven.closing(driven.question).is_set()
    assert stopped["usage"]["estimated"] is True
    assert stopped["usage"]["completionTokens"] == 2
    assert await client.stop(driven.id) == stopped


async def test_a_stop_before_the_first_word_ends_an_empty_answer(client: Client) -> None:
    turn = await client.send("Wait", model="hangs-at-once")
    stopped = await client.stop(turn["assistantMessage"]["id"])
    assert (stopped["status"], stopped["text"], stopped["parts"]) == ("STOPPED", "", [])


async def test_a_stop_that_races_the_finish_has_one_winner(client: Client, server: Server) -> None:
    for n in range(25):
        driven = await Driven(client).begin()
        async with client.reading(driven.id) as subscription:
            driven.say("all")
            events = await gather_until(subscription, 3)
            stopping = [asyncio.create_task(client.stop(driven.id)) for _ in range(2)]
            for _ in range(n % 7):
                await asyncio.sleep(0)
            driven.end()
            events += [event async for event in subscription.events()]
        messages = await asyncio.gather(*stopping)
        stored = await client.message(driven.id)
        assert stored["status"] in ("STOPPED", "COMPLETE")
        assert stored["text"] == text_of(events) == "all"
        assert all(message == stored for message in messages)
        assert [event["__typename"] for event in events].count("MessageEnded") == 1


async def test_a_failure_midway_reaches_the_reader_as_the_end(client: Client) -> None:
    driven = await Driven(client).begin()
    driven.say("half")
    async with client.reading(driven.id) as subscription:
        events = await gather_until(subscription, 4)
        driven.queue.put_nowait(ProviderFailure(FailureCode.PROVIDER_UNAVAILABLE, "The provider is down."))
        events += [event async for event in subscription.events()]
    message = events[-1]["message"]
    assert (message["status"], message["text"]) == ("FAILED", "half")
    assert message["error"] == {
        "code": "PROVIDER_UNAVAILABLE",
        "message": "The provider is down.",
        "retryAfter": None,
    }


async def test_a_thread_shows_the_answer_being_written_until_it_ends(client: Client) -> None:
    driven = await Driven(client).begin()
    query = "query($id: ID!) { thread(id: $id) { liveMessage { id status text } } }"
    live = (await client.run(query, {"id": driven.thread}))["thread"]["liveMessage"]
    assert live == {"id": driven.id, "status": "STREAMING", "text": ""}
    driven.say("x")
    driven.end()
    await client.finish(driven.id)
    assert (await client.run(query, {"id": driven.thread}))["thread"]["liveMessage"] is None


async def test_a_users_message_can_be_read_as_a_stream_that_has_ended(client: Client) -> None:
    turn = await client.send("Mine")
    events = await client.read(turn["userMessage"]["id"])
    assert [event["__typename"] for event in events] == ["MessageDelta", "MessageEnded"]
    assert text_of(events) == "Mine"


async def test_nothing_is_left_behind_by_two_hundred_short_streams(client: Client, server: Server) -> None:
    tasks_before = len(asyncio.all_tasks())

    async def one(number: int) -> None:
        turn = await client.send(f"Question {number}")
        await client.read(turn["assistantMessage"]["id"])

    for start in range(0, 200, 20):
        await asyncio.gather(*(one(start + n) for n in range(20)))
    assert len(server.generations) == 0
    assert len(server.hub) == 0
    assert len(server.leases._buffers) == 0
    async with asyncio.timeout(10):
        while len(server.application.sockets) > 0 or len(asyncio.all_tasks()) > tasks_before + 5:
            await asyncio.sleep(0.01)
