"""Budgets: what is reserved before an answer begins and settled when it ends; sends at once cannot overshoot."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from models.ids import IdKind, new_id, parse_id
from providers.base import Finish, FinishReason, TokenUsage
from server.runtime import Server
from tests.client import DEADLINE_SECONDS, Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.process import ServerProcess
from tests.scripts import SCRIPTS, TextDelta, ToolCall

ANSWER = 100
PROMPT = 8 // 4 + 4
"""Of a question of eight letters: a token for four bytes, and four for the message."""
TURN = PROMPT + ANSWER
PRICE = 2_000_000, 200_000, 8_000_000
USED = """
SELECT coalesce(sum(prompt_tokens + completion_tokens), 0)::bigint AS tokens,
    coalesce(sum(cost_micros), 0)::bigint AS cost, count(*) AS events
"""


@asynccontextmanager
async def serving(postgres_url: str, data_dir: Path, **budget: int | str) -> AsyncIterator[Server]:
    """A server with a budget and a database of its own."""
    database_url = await make_database(postgres_url)
    settings = test_settings(database_url, data_dir, budget_answer_tokens=ANSWER, **budget)
    server = Server(settings, providers=SCRIPTS.models())
    await server.start()
    try:
        yield server
    finally:
        await server.drain()
        await server.close()


@pytest.fixture(scope="module")
async def by_tokens(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with room for three turns a day, and a bit that is too little for a fourth."""
    folder = tmp_path_factory.mktemp("tokens")
    async with serving(postgres_url, folder, budget_tokens_per_day=3 * TURN + PROMPT) as server:
        yield server


@pytest.fixture(scope="module")
async def by_cost(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with a month's budget of cost, whose titles are made by a model without a price."""
    folder = tmp_path_factory.mktemp("cost")
    # 6 at 2 and 100 at 8 for a million: 812; 1.72 of them are used by each answer of "priced" that ends.
    async with serving(
        postgres_url, folder, budget_cost_micros_per_month=3 * 812 + 19, title_model="title-maker"
    ) as server:
        yield server


@pytest.fixture
async def user(by_tokens: Server) -> AsyncIterator[Client]:
    """A new user of the server that counts tokens."""
    async with connect(by_tokens.address) as client:
        await client.sign_in()
        yield client


@pytest.fixture
async def payer(by_cost: Server) -> AsyncIterator[Client]:
    """A new user of the server that counts cost."""
    async with connect(by_cost.address) as client:
        await client.sign_in()
        yield client


def question() -> str:
    """Eight letters that nobody else asks."""
    return uuid.uuid4().hex[:8]


async def fetch(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(query, *values)]
    finally:
        await connection.close()


def key(client: Client) -> UUID:
    return parse_id(IdKind.USER, client.id)


async def reserved(server: Server, client: Client) -> list[tuple[int, int]]:
    """What the user's live answers hold, in tokens and in cost."""
    query = "SELECT reserved_tokens, reserved_cost_micros FROM streams WHERE owner_id = $1"
    return [(tokens, cost) for tokens, cost in await fetch(server.database.url, query, key(client))]


async def used(server: Server, client: Client) -> tuple[int, int, int]:
    """What the user consumed: tokens, cost, events. The rollup that budgets read says the same as the events."""
    url, user_id = server.database.url, key(client)
    ((tokens, cost, events),) = await fetch(url, f"{USED} FROM usage_events WHERE owner_id = $1", user_id)
    rolled_up = USED.replace("count(*)", "coalesce(sum(requests), 0)::bigint")
    ((*kept, requests),) = await fetch(url, f"{rolled_up} FROM usage_quarters WHERE owner_id = $1", user_id)
    assert (kept, requests) == ([tokens, cost], events)
    return tokens, cost, events


def say(text: str, *events: Any) -> None:
    """Feed the driven model's answer to a question, to its end."""
    for event in (*events, None):
        SCRIPTS.driven.queue(text).put_nowait(event)


async def refusal(client: Client, text: str, **more: Any) -> dict[str, Any]:
    """The extensions of the error with which a send is refused for the budget."""
    with pytest.raises(GraphQLErrors) as refused:
        await client.send(text, **more)
    assert refused.value.code == "BUDGET_EXCEEDED"
    return refused.value.extensions


def midnight(days: int = 1) -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=days)


async def test_of_twenty_sends_at_once_those_begin_that_there_is_room_for(by_tokens: Server, user: Client) -> None:
    texts = [question() for _ in range(20)]
    outcomes = await asyncio.gather(*(user.send(text, model="driven") for text in texts), return_exceptions=True)
    begun = [(text, turn) for text, turn in zip(texts, outcomes, strict=True) if isinstance(turn, dict)]
    refused = [error for error in outcomes if isinstance(error, GraphQLErrors)]
    assert (len(begun), len(refused)) == (3, 17)
    for error in refused:
        assert error.code == "BUDGET_EXCEEDED"
        assert datetime.fromisoformat(error.extensions["resetsAt"]) == midnight()
        assert 0 < error.extensions["retryAfter"] <= 86_400
    assert await reserved(by_tokens, user) == [(TURN, 0)] * 3
    threads = await user.run("{ threads(first: 100) { nodes { id } } }")
    assert len(threads["threads"]["nodes"]) == 3, "what was refused wrote nothing"
    assert await fetch(by_tokens.database.url, "SELECT count(*) FROM turns WHERE owner_id = $1", key(user)) == [(3,)]
    for text, _ in begun:
        say(text, TextDelta("x"), TokenUsage(6, 10))
    for _, turn in begun:
        await user.finish(turn["assistantMessage"]["id"])
    assert await reserved(by_tokens, user) == []
    assert await used(by_tokens, user) == (48, 0, 3)


async def test_what_was_reserved_and_not_used_can_be_used_by_others(by_tokens: Server, user: Client) -> None:
    spent = 0
    while spent + TURN <= 3 * TURN + PROMPT:
        text = question()
        turn = await user.send(text, model="driven")
        assert await reserved(by_tokens, user) == [(TURN, 0)]
        say(text, TextDelta("x"), TokenUsage(PROMPT, 64))
        await user.finish(turn["assistantMessage"]["id"])
        spent += PROMPT + 64
        assert (await used(by_tokens, user))[0] == spent
    text = question()
    turn = await user.send(text, model="driven")
    ((tokens, _),) = await reserved(by_tokens, user)
    assert tokens == 3 * TURN + PROMPT - spent < TURN, "the rest of the budget"
    await refusal(user, question(), model="driven")
    say(text, TextDelta("x"), TokenUsage(PROMPT, tokens - PROMPT))
    await user.finish(turn["assistantMessage"]["id"])
    await refusal(user, question(), model="driven")
    assert (await used(by_tokens, user))[0] == 3 * TURN + PROMPT, "to the last token, and not one more"


async def test_other_users_have_budgets_of_their_own(by_tokens: Server, user: Client) -> None:
    turns = [await user.send(question(), model="hangs-at-once") for _ in range(3)]
    await refusal(user, question())
    async with connect(by_tokens.address) as other:
        await other.sign_in()
        turn = await other.send(question())
        await other.finish(turn["assistantMessage"]["id"])
    for turn in turns:
        await user.stop(turn["assistantMessage"]["id"])


@pytest.mark.parametrize("end", ["stop", "fail", "crash", "delete", "hang up"])
async def test_nothing_stays_reserved_however_an_answer_ends(by_tokens: Server, user: Client, end: str) -> None:
    models = {"fail": "fails-midway", "crash": "crashes", "hang up": "hangs-up"}
    turn = await user.send(question(), model=models.get(end, "hangs"))
    answer_id = turn["assistantMessage"]["id"]
    # Before the model is asked there is nothing to count.
    async with user.reading(answer_id) as reader:
        await reader.next()
    if end == "stop":
        await user.stop(answer_id)
    elif end == "delete":
        await user.run(
            "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }",
            {"id": turn["thread"]["id"]},
        )
    else:
        await user.finish(answer_id)
    assert await reserved(by_tokens, user) == []
    tokens, _, events = await used(by_tokens, user)
    assert events == 1
    assert 0 < tokens < TURN


async def test_an_answer_whose_server_was_killed_gives_back_what_it_held(postgres_url: str, tmp_path: Path) -> None:
    scripts = tmp_path / "scripts.json"
    prompt, cached, completion = PRICE
    script = {
        "wordsPerSecond": 200,
        "steps": [{"text": "word " * 4_000}],
        "prices": {"prompt": prompt, "cached": cached, "completion": completion},
    }
    scripts.write_bytes(orjson.dumps({"steady": script}))
    url = await make_database(postgres_url)
    environment = {
        "DATABASE_URL": url,
        "DATA_DIR": str(tmp_path / "data"),
        "SCRIPTED_MODELS_FILE": str(scripts),
        "CHECKPOINT_SECONDS": "0.1",
        "BUDGET_TOKENS_PER_MONTH": "1000",
        "BUDGET_ANSWER_TOKENS": "600",
    }
    killed = await ServerProcess(**environment).start()
    try:
        async with connect(killed.address) as client:
            await client.sign_in()
            turn = await client.send("question", model="steady")
            async with client.reading(turn["assistantMessage"]["id"]) as subscription:
                await subscription.next()
            query = "SELECT reserved_tokens, reserved_cost_micros FROM streams"
            assert await fetch(url, query) == [(606, 0)]
            saved = "SELECT count(*) FROM stream_checkpoints"
            async with asyncio.timeout(DEADLINE_SECONDS):
                while await fetch(url, saved) == [(0,)]:
                    await asyncio.sleep(0.02)
    finally:
        killed.process.kill()
        await killed.wait()
    again = Server(test_settings(url, tmp_path / "data", scripted_models_file=scripts))
    await again.start()
    try:
        assert await fetch(url, query) == []
        events = "SELECT status, completion_tokens, cost_micros, completion_price FROM usage_events"
        ((status, tokens, cost, price),) = await fetch(url, events)
        assert (status, price) == ("INTERRUPTED", completion)
        assert tokens > 0
        assert cost == tokens * 8
    finally:
        await again.close()


async def test_a_repeat_of_a_key_needs_no_room(user: Client) -> None:
    idempotency_key, text = str(uuid.uuid4()), question()
    turns = [await user.send(text, model="hangs-at-once", idempotencyKey=idempotency_key)]
    turns += [await user.send(question(), model="hangs-at-once") for _ in range(2)]
    await refusal(user, question())
    again = await user.send(text, model="hangs-at-once", idempotencyKey=idempotency_key)
    assert again["assistantMessage"]["id"] == turns[0]["assistantMessage"]["id"]
    for turn in turns:
        await user.stop(turn["assistantMessage"]["id"])


async def test_a_refused_send_can_be_repeated_with_its_key_when_there_is_room(user: Client) -> None:
    turns = [await user.send(question(), model="hangs-at-once") for _ in range(3)]
    idempotency_key, text = str(uuid.uuid4()), question()
    await refusal(user, text, idempotencyKey=idempotency_key)
    for turn in turns:
        await user.stop(turn["assistantMessage"]["id"])
    turn = await user.send(text, idempotencyKey=idempotency_key)
    assert (await user.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"


async def test_edits_and_retries_need_room_and_change_nothing_without(by_tokens: Server, user: Client) -> None:
    turn = await user.send(question())
    await user.finish(turn["assistantMessage"]["id"])
    before = await user.path(turn["thread"]["id"])
    # The prompt alone is more than the budget.
    with pytest.raises(GraphQLErrors) as refused:
        await user.edit(turn["userMessage"]["id"], "x" * 4 * 4 * TURN)
    assert refused.value.code == "BUDGET_EXCEEDED"
    held = [await user.send(question(), model="hangs-at-once") for _ in range(3)]
    with pytest.raises(GraphQLErrors) as refused:
        await user.retry(turn["assistantMessage"]["id"])
    assert refused.value.code == "BUDGET_EXCEEDED"
    assert await user.path(turn["thread"]["id"]) == before
    for each in held:
        await user.stop(each["assistantMessage"]["id"])
    again = await user.retry(turn["assistantMessage"]["id"])
    assert (await user.finish(again["assistantMessage"]["id"]))["status"] == "COMPLETE"
    assert await reserved(by_tokens, user) == []


async def test_the_whole_branch_is_what_is_reserved(by_tokens: Server, user: Client) -> None:
    text = question()
    turn = await user.send(text, model="driven")
    say(text, TextDelta("a" * 40), TokenUsage(6, 10))
    await user.finish(turn["assistantMessage"]["id"])
    more = await user.send(question(), model="hangs-at-once", threadId=turn["thread"]["id"])
    assert await reserved(by_tokens, user) == [(PROMPT + (40 // 4 + 4) + TURN, 0)]
    await user.stop(more["assistantMessage"]["id"])


async def test_the_model_is_told_what_its_answer_may_have(user: Client, client: Client) -> None:
    text = question()
    turn = await user.send(text, model="driven")
    say(text, TextDelta("x"))
    await user.finish(turn["assistantMessage"]["id"])
    assert SCRIPTS.driven.requests[text].max_output_tokens == ANSWER
    text = question()
    turn = await client.send(text, model="driven")
    say(text, TextDelta("x"))
    await client.finish(turn["assistantMessage"]["id"])
    assert SCRIPTS.driven.requests[text].max_output_tokens is None, "where there is no budget"


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([TextDelta("word ")] * 1_000, "word " * 80),
        ([TextDelta("x" * 100_000)], "x" * 400),
        ([TextDelta("é" * 1_000)], "é" * 200),
        ([TextDelta("x" * 400), TextDelta(""), TextDelta("y")], "x" * 400),
        ([TextDelta("x" * 200), ToolCall("c", "f", {"q": "y" * 400})], "x" * 200),
    ],
    ids=["many words", "one piece", "other scripts", "one too many", "a tool call"],
)
async def test_an_answer_that_is_longer_than_it_may_be_is_ended_with_what_fits(
    by_tokens: Server, user: Client, events: list[Any], text: str
) -> None:
    asked = question()
    turn = await user.send(asked, model="driven")
    for event in events:
        SCRIPTS.driven.queue(asked).put_nowait(event)
    answer = await user.finish(turn["assistantMessage"]["id"])
    assert (answer["status"], answer["error"]["code"]) == ("INTERRUPTED", "BUDGET_EXCEEDED")
    assert answer["text"] == text
    async with asyncio.timeout(DEADLINE_SECONDS):
        await SCRIPTS.driven.closing(asked).wait()
    assert (await used(by_tokens, user))[0] <= TURN
    assert await reserved(by_tokens, user) == []


@pytest.mark.parametrize(("completion", "status"), [(ANSWER, "INTERRUPTED"), (50, "COMPLETE")])
async def test_an_answer_that_its_provider_ended_by_our_limit_says_so_and_by_its_own_does_not(
    user: Client, completion: int, status: str
) -> None:
    text = question()
    turn = await user.send(text, model="driven")
    for event in (TextDelta("x"), TokenUsage(6, completion), Finish(FinishReason.LENGTH)):
        SCRIPTS.driven.queue(text).put_nowait(event)
    answer = await user.finish(turn["assistantMessage"]["id"])
    assert answer["status"] == status
    assert (answer["error"] or {}).get("code") == ("BUDGET_EXCEEDED" if status == "INTERRUPTED" else None)
    say(text)


async def test_an_answer_that_fits_to_the_last_byte_is_whole(user: Client) -> None:
    text = question()
    turn = await user.send(text, model="driven")
    say(text, TextDelta("x" * 200), TextDelta("x" * 200))
    answer = await user.finish(turn["assistantMessage"]["id"])
    assert (answer["status"], answer["text"]) == ("COMPLETE", "x" * 400)


async def test_a_budget_of_cost_holds_sends_at_once_too(by_cost: Server, payer: Client) -> None:
    outcomes = await asyncio.gather(
        *(payer.send(question(), model="priced-and-hangs") for _ in range(20)), return_exceptions=True
    )
    begun = [turn for turn in outcomes if isinstance(turn, dict)]
    refused = [error for error in outcomes if isinstance(error, GraphQLErrors)]
    assert (len(begun), len(refused)) == (3, 17)
    resets_at = datetime.fromisoformat(refused[0].extensions["resetsAt"])
    assert resets_at == (midnight(0).replace(day=1) + timedelta(days=32)).replace(day=1)
    assert await reserved(by_cost, payer) == [(TURN, 812)] * 3
    for turn in begun:
        await payer.stop(turn["assistantMessage"]["id"])
    assert await reserved(by_cost, payer) == []
    _, cost, _ = await used(by_cost, payer)
    assert cost == 3 * (2 * 2 + 2 * 8), "of each: two tokens of a question, two of an answer"
    turn = await payer.send(question(), model="priced-and-hangs")
    await payer.stop(turn["assistantMessage"]["id"])


async def test_a_model_without_a_price_is_free_of_the_limits_of_cost(by_cost: Server, payer: Client) -> None:
    await fetch(
        by_cost.database.url,
        """
        INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
            reasoning_tokens, cached_tokens, estimated, cost_micros)
        VALUES ($1, $2, $1, 'ANSWER', 'm', 'COMPLETE', 1, 1, 0, 0, false, 5000)
        """,
        *(new_id(), key(payer)),
    )
    await refusal(payer, question(), model="priced")
    text = question()
    turn = await payer.send(text, model="driven")
    assert await reserved(by_cost, payer) == [(0, 0)]
    say(text, TextDelta("x" * 10_000))
    assert (await payer.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"


async def test_titles_are_counted_with_their_thread_and_never_refused(by_cost: Server, payer: Client) -> None:
    turn = await payer.send(question(), model="two-words")
    await payer.finish(turn["assistantMessage"]["id"])
    query = "SELECT thread_id, prompt_tokens FROM usage_events WHERE owner_id = $1 AND kind = 'TITLE'"
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (found := await fetch(by_cost.database.url, query, key(payer))):
            await asyncio.sleep(0.01)
    assert found == [(parse_id(IdKind.THREAD, turn["thread"]["id"]), 11)]
    usage = "query($id: ID!) { thread(id: $id) { usage { requests totalTokens } } }"
    thread = (await payer.run(usage, {"id": turn["thread"]["id"]}))["thread"]
    assert thread["usage"] == {"requests": 2, "totalTokens": 9 + 15}


async def test_without_a_budget_nothing_is_reserved(server: Server, client: Client) -> None:
    turn = await client.send(question(), model="hangs-at-once")
    assert await reserved(server, client) == [(0, 0)]
    await client.stop(turn["assistantMessage"]["id"])


async def test_a_month_is_more_than_its_days(postgres_url: str, tmp_path: Path) -> None:
    """What was used on days before counts in the month; what was used in months before does not."""
    async with (
        serving(postgres_url, tmp_path, budget_tokens_per_month=1_000, budget_tokens_per_day=2_000) as server,
        connect(server.address) as client,
    ):
        await client.sign_in()
        first = midnight(0).replace(day=1)
        add = """
            INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
                reasoning_tokens, cached_tokens, estimated, created_at)
            VALUES ($1, $2, $1, 'ANSWER', 'm', 'COMPLETE', 900, 96, 0, 0, false, $3)
        """
        await fetch(server.database.url, add, new_id(), key(client), first - timedelta(microseconds=1))
        turn = await client.send(question())
        await client.finish(turn["assistantMessage"]["id"])
        await fetch(server.database.url, add, new_id(), key(client), first)
        extensions = await refusal(client, question())
        resets_at = datetime.fromisoformat(extensions["resetsAt"])
        assert resets_at == (first + timedelta(days=32)).replace(day=1)
        assert abs(extensions["retryAfter"] - (resets_at - datetime.now(UTC)).total_seconds()) < 60


async def test_sends_stops_and_deletions_at_once_never_wait_for_one_another_in_a_circle(user: Client) -> None:
    refused: set[str] = set()

    async def live() -> None:
        for _ in range(6):
            try:
                turn = await user.send(question(), model="hangs")
            except GraphQLErrors as error:
                refused.add(error.code)
                continue
            answer = user.stop(turn["assistantMessage"]["id"])
            gone = user.run(
                "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }",
                {"id": turn["thread"]["id"]},
            )
            await asyncio.gather(answer, gone, return_exceptions=True)

    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*(live() for _ in range(6)))
    assert refused <= {"BUDGET_EXCEEDED"}
