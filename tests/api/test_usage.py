"""Usage: what each finished message consumed, its report in anybody's time zone, and the report that follows."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from models.ids import IdKind, new_id, parse_id
from providers.base import FailureCode, ProviderFailure, TokenUsage
from server.runtime import Server
from streams.recovery import MAX_ATTEMPTS
from tests.accounts import download, upload
from tests.client import DEADLINE_SECONDS, Client, GraphQLErrors
from tests.scripts import SCRIPTS, TextDelta

TOTALS = "{ requests promptTokens completionTokens reasoningTokens cachedTokens totalTokens costMicros }"
REPORT = f"""
{{ timeframe from to totals {TOTALS} byModel {{ id name totals {TOTALS} }} buckets {{ from to totals {TOTALS} }} }}
"""
QUERY = f'query($t: UsageTimeframe!, $z: String = "UTC") {{ usage(timeframe: $t, timezone: $z) {REPORT} }}'
FOLLOW = f'subscription($t: UsageTimeframe!, $z: String = "UTC") {{ usage(timeframe: $t, timezone: $z) {REPORT} }}'
NOTHING = {
    **dict.fromkeys(("requests", "promptTokens", "completionTokens", "reasoningTokens", "cachedTokens"), 0),
    "totalTokens": 0,
    "costMicros": None,
}
# 400 at 2, 600 at 0.2 and 100 at 8 for a million tokens.
PRICED = {
    "requests": 1,
    "promptTokens": 1_000,
    "completionTokens": 100,
    "reasoningTokens": 40,
    "cachedTokens": 600,
    "totalTokens": 1_100,
    "costMicros": 1_720,
}
UNPRICED = {
    "requests": 1,
    "promptTokens": 7,
    "completionTokens": 2,
    "reasoningTokens": 0,
    "cachedTokens": 3,
    "totalTokens": 9,
    "costMicros": None,
}


def added(*totals: dict[str, Any]) -> dict[str, Any]:
    """The sum of totals; a cost that is not known adds nothing to one that is."""
    whole: dict[str, Any] = {name: sum(each[name] for each in totals) for name in NOTHING if name != "costMicros"}
    costs = [each["costMicros"] for each in totals if each["costMicros"] is not None]
    return whole | {"costMicros": sum(costs) if costs else None}


async def report(client: Client, timeframe: str = "DAY", zone: str | None = "UTC") -> dict[str, Any]:
    """The report now, which must agree with itself."""
    found: dict[str, Any] = (await client.run(QUERY, {"t": timeframe, "z": zone}))["usage"]
    assert added(NOTHING, *(bucket["totals"] for bucket in found["buckets"])) == found["totals"]
    assert added(NOTHING, *(model["totals"] for model in found["byModel"])) == found["totals"]
    return found


async def finished(client: Client, model: str, text: str = "Hi") -> dict[str, Any]:
    """A turn whose answer has ended."""
    turn = await client.send(text, model=model)
    await client.finish(turn["assistantMessage"]["id"])
    return turn


async def events_of(server: Server, turn: dict[str, Any]) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(server.database.url)
    try:
        rows = await connection.fetch(
            "SELECT * FROM usage_events WHERE message_id = $1", parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"])
        )
        return [dict(row) for row in rows]
    finally:
        await connection.close()


async def test_nothing_used_is_a_report_of_zeros_with_every_bucket(client: Client) -> None:
    for timeframe, buckets in (("DAY", 24), ("WEEK", 7), ("MONTH", 30)):
        found = await report(client, timeframe)
        assert (found["timeframe"], found["totals"], found["byModel"]) == (timeframe, NOTHING, [])
        assert [bucket["totals"] for bucket in found["buckets"]] == [NOTHING] * buckets


async def test_the_buckets_lie_side_by_side_and_the_last_one_is_now(client: Client) -> None:
    for timeframe in ("DAY", "WEEK", "MONTH"):
        for zone in ("UTC", "Asia/Kathmandu", "America/Los_Angeles"):
            found = await report(client, timeframe, zone)
            edges = [(bucket["from"], bucket["to"]) for bucket in found["buckets"]]
            assert [end for _, end in edges[:-1]] == [begin for begin, _ in edges[1:]]
            assert (edges[0][0], edges[-1][1]) == (found["from"], found["to"])
            begins, ends = (datetime.fromisoformat(edge) for edge in edges[-1])
            assert begins - timedelta(seconds=30) <= datetime.now(UTC) < ends + timedelta(seconds=30)
            assert begins.utcoffset() == timedelta(0)


async def test_a_finished_message_is_in_the_current_bucket_of_every_report(client: Client) -> None:
    await finished(client, "priced")
    await finished(client, "two-words")
    await finished(client, "priced")
    for timeframe in ("DAY", "WEEK", "MONTH"):
        found = await report(client, timeframe, "Europe/Berlin")
        assert found["totals"] == added(PRICED, PRICED, UNPRICED)
        assert found["byModel"] == [
            {"id": "priced", "name": "priced", "totals": added(PRICED, PRICED)},
            {"id": "two-words", "name": "two-words", "totals": UNPRICED},
        ]


async def test_models_that_are_not_offered_any_more_are_in_it(server: Server, client: Client) -> None:
    turn = await finished(client, "priced")
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute(
            """
            INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
                reasoning_tokens, cached_tokens, estimated)
            VALUES ($1, $2, $3, 'ANSWER', 'custom/gone', 'COMPLETE', 7, 2, 0, 3, false)
            """,
            *(new_id(), parse_id(IdKind.USER, client.id), new_id()),
        )
    finally:
        await connection.close()
    found = await report(client)
    assert {"id": "custom/gone", "name": "custom/gone", "totals": UNPRICED} in found["byModel"]
    assert found["totals"] == added(PRICED, UNPRICED)
    assert turn


async def test_an_event_keeps_its_thread_its_prices_and_its_cost(server: Server, client: Client) -> None:
    turn = await finished(client, "priced")
    (event,) = await events_of(server, turn)
    assert event["thread_id"] == parse_id(IdKind.THREAD, turn["thread"]["id"])
    assert (event["prompt_price"], event["cached_price"], event["completion_price"]) == (2_000_000, 200_000, 8_000_000)
    assert event["cost_micros"] == 1_720
    (event,) = await events_of(server, await finished(client, "two-words"))
    assert [event[name] for name in ("prompt_price", "cached_price", "completion_price", "cost_micros")] == [None] * 4


async def test_the_usage_of_a_temporary_thread_is_counted_and_leads_nowhere(server: Server, client: Client) -> None:
    turn = await client.send("Secret", model="hangs")
    thread_id = parse_id(IdKind.THREAD, turn["thread"]["id"])
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute("UPDATE threads SET temporary = true WHERE id = $1", thread_id)
    finally:
        await connection.close()
    await client.stop(turn["assistantMessage"]["id"])
    (event,) = await events_of(server, turn)
    assert event["thread_id"] is None
    assert (await report(client))["totals"]["requests"] == 1


@pytest.mark.parametrize(
    ("model", "status"), [("hangs", "STOPPED"), ("fails-midway", "FAILED"), ("hangs-up", "INTERRUPTED")]
)
async def test_a_message_that_is_not_whole_is_counted_once(
    server: Server, client: Client, model: str, status: str
) -> None:
    turn = await client.send("Hi", model=model)
    answer_id = turn["assistantMessage"]["id"]
    if status == "STOPPED":
        # Before the model is asked there is nothing to count.
        async with client.reading(answer_id) as reader:
            await reader.next()
        await client.stop(answer_id)
        await client.stop(answer_id)
    answer = await client.finish(answer_id)
    assert answer["status"] == status
    (event,) = await events_of(server, turn)
    assert event["status"] == status
    totals = (await report(client))["totals"]
    assert totals["requests"] == 1
    assert {name: totals[name] for name in ("promptTokens", "completionTokens")} == {
        name: answer["usage"][name] for name in ("promptTokens", "completionTokens")
    }
    assert event["estimated"]


async def test_what_a_provider_reported_before_it_failed_is_what_is_counted(client: Client) -> None:
    text = f"fails {uuid.uuid4()}"
    turn = await client.send(text, model="driven")
    for event in (TextDelta("x"), TokenUsage(500, 60, 7, 8), ProviderFailure(FailureCode.RATE_LIMITED, "Later.")):
        SCRIPTS.driven.queue(text).put_nowait(event)
    assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "FAILED"
    assert (await report(client))["totals"] == {
        **UNPRICED,
        "promptTokens": 500,
        "completionTokens": 60,
        "reasoningTokens": 7,
        "cachedTokens": 8,
        "totalTokens": 560,
    }


async def test_what_was_used_outlives_its_thread(client: Client) -> None:
    turn = await finished(client, "priced")
    before = await report(client)
    await client.run(
        "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }", {"id": turn["thread"]["id"]}
    )
    assert await report(client) == before


async def test_threads_and_messages_tell_what_they_cost(client: Client, other: Client) -> None:
    turn = await finished(client, "priced")
    thread_id, answer_id = turn["thread"]["id"], turn["assistantMessage"]["id"]
    again = await client.retry(answer_id, model="two-words")
    await client.finish(again["assistantMessage"]["id"])
    empty = await client.send("Hi", model="hangs-at-once")
    query = f"""
        {{ threads {{ nodes {{ id usage {TOTALS} messages {{ nodes {{ id usage {{ costMicros }} }} }} }} }} }}
    """
    nodes = {node["id"]: node for node in (await client.run(query))["threads"]["nodes"]}
    assert nodes[thread_id]["usage"] == added(PRICED, UNPRICED), "of all branches"
    assert nodes[empty["thread"]["id"]]["usage"] == NOTHING
    assert [message["usage"] for message in nodes[thread_id]["messages"]["nodes"]] == [None, {"costMicros": None}]
    cost = "query($id: ID!) { message(id: $id) { usage { costMicros } } }"
    assert (await client.run(cost, {"id": answer_id}))["message"]["usage"] == {"costMicros": 1_720}
    assert (await other.run(query))["threads"]["nodes"] == []
    await client.stop(empty["assistantMessage"]["id"])


async def test_the_end_of_a_stream_tells_the_cost(client: Client) -> None:
    turn = await client.send("Hi", model="priced")
    query = """
        subscription($id: ID!) {
          messageStream(messageId: $id) { ... on MessageEnded { message { usage { costMicros } } } }
        }
    """
    async with client.subscribe(query, {"id": turn["assistantMessage"]["id"]}) as subscription:
        events = [event async for event in subscription.events()]
    assert events[-1] == {"message": {"usage": {"costMicros": 1_720}}}


async def test_users_see_their_own_usage_only(client: Client, other: Client) -> None:
    await finished(client, "priced")
    assert (await report(other))["totals"] == NOTHING


NO_ZONES = [
    *("", "utc", "Europe", "../UTC", "/usr/share/zoneinfo/UTC", "Europe/../UTC", "localtime", "UTC\x00", "+01:00"),
    "Europe/Berlin" * 1_000,
]


@pytest.mark.parametrize("zone", NO_ZONES, ids=lambda zone: ascii(zone[:24]))
@pytest.mark.parametrize("transport", ["http", "socket"])
async def test_what_is_no_time_zone_is_refused_by_name(client: Client, zone: str, transport: str) -> None:
    async def attempt() -> None:
        if transport == "http":
            await client.run(QUERY, {"t": "DAY", "z": zone})
        else:
            async with client.subscribe(FOLLOW, {"t": "DAY", "z": zone}) as subscription:
                await subscription.next()

    with pytest.raises(GraphQLErrors) as refused:
        await attempt()
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "timezone")


@pytest.mark.parametrize(
    ("timeframe", "code"), [("YEAR", "BAD_USER_INPUT"), ("day", "BAD_USER_INPUT"), (None, "BAD_USER_INPUT")]
)
async def test_what_is_no_timeframe_is_refused(client: Client, timeframe: str | None, code: str) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(QUERY, {"t": timeframe})
    assert refused.value.code == code


async def test_no_zone_is_utc(client: Client) -> None:
    query = "{ a: usage(timeframe: MONTH) { from to } b: usage(timeframe: MONTH, timezone: null) { from to } }"
    found = await client.run(query)
    assert found["a"] == found["b"]
    assert found["a"]["to"].endswith("T00:00:00+00:00")


async def next_report(subscription: Any) -> dict[str, Any]:
    payload = await subscription.next()
    found: dict[str, Any] = payload["data"]["usage"]
    assert added(NOTHING, *(bucket["totals"] for bucket in found["buckets"])) == found["totals"]
    return found


async def test_the_report_comes_now_and_again_after_each_finished_message(client: Client, other: Client) -> None:
    async with client.subscribe(FOLLOW, {"t": "DAY"}) as subscription:
        assert (await next_report(subscription))["totals"] == NOTHING
        await finished(other, "priced")
        await finished(client, "priced")
        assert (await next_report(subscription))["totals"] == PRICED
        await finished(client, "two-words")
        assert (await next_report(subscription))["totals"] == added(PRICED, UNPRICED)
        hanging = await client.send("Hi", model="hangs")
        # One that is stopped before its model was asked has consumed nothing, and is not told of.
        async with client.reading(hanging["assistantMessage"]["id"]) as reading:
            await reading.next()
        await client.stop(hanging["assistantMessage"]["id"])
        assert (await next_report(subscription))["totals"]["requests"] == 3


async def test_a_burst_of_ends_is_few_reports_and_the_last_one_tells_of_all(client: Client) -> None:
    texts = [f"burst {uuid.uuid4()}" for _ in range(20)]
    turns = await asyncio.gather(*(client.send(text, model="driven") for text in texts))
    async with client.subscribe(FOLLOW, {"t": "DAY"}) as one, client.subscribe(FOLLOW, {"t": "MONTH"}) as two:
        for subscription in (one, two):
            assert (await next_report(subscription))["totals"] == NOTHING
        for text in texts:
            SCRIPTS.driven.queue(text).put_nowait(TextDelta("x"))
            SCRIPTS.driven.queue(text).put_nowait(None)
        await asyncio.gather(*(client.finish(turn["assistantMessage"]["id"]) for turn in turns))
        for subscription in (one, two):
            told = [0]
            while told[-1] < 20:
                told.append((await next_report(subscription))["totals"]["requests"])
            assert told == sorted(set(told))
            assert len(told) < 15


async def test_an_answer_that_a_reaper_ended_is_told_of(server: Server, client: Client) -> None:
    turn = await finished(client, "priced")
    async with client.subscribe(FOLLOW, {"t": "WEEK"}) as subscription:
        assert (await next_report(subscription))["totals"] == PRICED
        connection = await asyncpg.connect(server.database.url)
        try:
            # As a server leaves it that was killed while it wrote another answer beside the first, begun as often as
            # an answer may be.
            await connection.execute(
                """
                WITH answer AS (
                    INSERT INTO messages
                        (id, owner_id, thread_id, parent_id, depth, active, role, status, parts, model, attempt)
                    SELECT $1, owner_id, thread_id, parent_id, depth, false, role, 'STREAMING', '[]', 'priced', $3
                    FROM messages WHERE id = $2 RETURNING owner_id
                )
                INSERT INTO streams (message_id, owner_id, holder, lease_expires_at, reserved_tokens)
                SELECT $1, owner_id, $1, now() - interval '1 hour', 1000 FROM answer
                """,
                *(new_id(), parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"]), MAX_ATTEMPTS),
            )
        finally:
            await connection.close()
        told = await next_report(subscription)
        assert told["totals"]["requests"] == 2
        assert told["totals"]["costMicros"] == 1_720, "nothing was saved of it, so it cost nothing, by a known price"


async def test_what_no_message_told_of_is_found_by_a_slow_look(server: Server, client: Client) -> None:
    async with client.subscribe(FOLLOW, {"t": "DAY"}) as subscription:
        assert (await next_report(subscription))["totals"] == NOTHING
        connection = await asyncpg.connect(server.database.url)
        try:
            for requests in (1, 2):
                await connection.execute(
                    """
                    INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens,
                        completion_tokens, reasoning_tokens, cached_tokens, estimated)
                    VALUES ($1, $2, $1, 'ANSWER', 'm', 'COMPLETE', 1, 1, 0, 0, false)
                    """,
                    *(new_id(), parse_id(IdKind.USER, client.id)),
                )
                assert (await next_report(subscription))["totals"]["requests"] == requests
        finally:
            await connection.close()


@pytest.mark.parametrize("how", ["import", "claim"])
async def test_older_usage_that_is_brought_along_is_told_when_it_comes(
    server: Server, client: Client, person: Client, how: str
) -> None:
    await finished(client, "priced")
    connection = await asyncpg.connect(server.database.url)
    try:
        for table, column in (("usage_events", "created_at"), ("usage_quarters", "began_at")):
            await connection.execute(
                f"UPDATE {table} SET {column} = {column} - interval '10 days' WHERE owner_id = $1",
                parse_id(IdKind.USER, client.id),
            )
    finally:
        await connection.close()
    async with person.subscribe(FOLLOW, {"t": "MONTH"}) as subscription:
        assert (await next_report(subscription))["totals"] == NOTHING
        if how == "import":
            assert (await upload(person, await download(client)))[0] == 200
        else:
            claim = "mutation($token: String!) { claimAnonymousData(input: {token: $token}) { threadCount } }"
            await person.run(claim, {"token": client.token})
        assert (await next_report(subscription))["totals"] == PRICED


async def test_who_follows_no_more_leaves_nothing_behind(server: Server, client: Client) -> None:
    user_id = parse_id(IdKind.USER, client.id)
    async with client.subscribe(FOLLOW, {"t": "DAY"}) as subscription:
        await next_report(subscription)
        assert len(server.wakeups._watches[user_id]) == 1
    async with asyncio.timeout(DEADLINE_SECONDS):
        while user_id in server.wakeups._watches:
            await asyncio.sleep(0.01)
