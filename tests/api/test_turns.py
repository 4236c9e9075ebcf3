"""A turn: a question, its answer, made once and whole."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import asyncpg
import pytest

from models.database import DatabaseUnavailableError
from models.ids import IdKind, parse_id
from server.runtime import Server
from services.history import history
from tests.client import SEND, Client, GraphQLErrors
from tests.scripts import SCRIPTS, TextDelta


async def test_a_question_in_no_thread_makes_a_thread_with_both_messages(client: Client) -> None:
    turn = await client.send("What is love?")
    answer = await client.finish(turn["assistantMessage"]["id"])
    assert (answer["status"], answer["text"]) == ("COMPLETE", "Hello world")
    path = await client.path(turn["thread"]["id"])
    assert [(message["role"], message["text"]) for message in path] == [
        ("USER", "What is love?"),
        ("ASSISTANT", "Hello world"),
    ]
    assert turn["thread"]["title"] == "What is love?"


async def test_the_end_of_an_answer_stores_usage_model_and_duration_and_one_usage_event(
    client: Client, server: Server
) -> None:
    turn = await client.send("Count")
    answer = await client.finish(turn["assistantMessage"]["id"])
    assert answer["model"] == {"id": "two-words"}
    assert answer["usage"] == {
        "promptTokens": 7,
        "completionTokens": 2,
        "reasoningTokens": 0,
        "cachedTokens": 3,
        "totalTokens": 9,
        "estimated": False,
    }
    assert answer["durationMs"] >= 0
    assert await usage_events(server, turn) == [("two-words", "COMPLETE", 7, 2, False)]
    assert await rows(server, "SELECT count(*) FROM streams WHERE message_id = $1", turn) == [(0,)]


async def test_the_same_key_again_returns_the_first_turn(client: Client, server: Server) -> None:
    key = str(uuid.uuid4())
    first = await client.send("Once", idempotencyKey=key)
    await client.finish(first["assistantMessage"]["id"])
    again = await client.send("Once", idempotencyKey=key)
    assert again["thread"] == first["thread"]
    assert again["userMessage"] == first["userMessage"]
    assert again["assistantMessage"] == {"id": first["assistantMessage"]["id"], "status": "COMPLETE"}
    assert len(await client.path(first["thread"]["id"])) == 2
    assert len(await usage_events(server, first)) == 1


async def test_twenty_equal_requests_at_once_make_one_turn(client: Client, server: Server) -> None:
    key = str(uuid.uuid4())
    turns = await asyncio.gather(*(client.send("At once", idempotencyKey=key) for _ in range(20)))
    assert len({(turn["thread"]["id"], turn["assistantMessage"]["id"]) for turn in turns}) == 1
    await client.finish(turns[0]["assistantMessage"]["id"])
    threads = await client.run("{ threads(first: 10) { nodes { id } } }")
    assert len(threads["threads"]["nodes"]) == 1
    assert len(await client.path(turns[0]["thread"]["id"])) == 2
    assert len(await usage_events(server, turns[0])) == 1


async def test_twenty_equal_requests_at_once_in_one_thread_make_one_turn(client: Client) -> None:
    thread = (await client.send("Begin"))["thread"]["id"]
    await client.finish((await client.path(thread))[1]["id"])
    key = str(uuid.uuid4())
    turns = await asyncio.gather(*(client.send("At once", idempotencyKey=key, threadId=thread) for _ in range(20)))
    assert len({turn["assistantMessage"]["id"] for turn in turns}) == 1
    assert len(await client.path(thread)) == 4


@pytest.mark.parametrize("change", [{"text": "Other"}, {"model": "slow"}, {"reasoningEffort": "HIGH"}])
async def test_the_same_key_with_other_input_is_a_conflict_and_writes_nothing(
    client: Client, change: dict[str, str]
) -> None:
    key = str(uuid.uuid4())
    await client.send("Mine", idempotencyKey=key)
    with pytest.raises(GraphQLErrors) as refused:
        await client.send(**({"text": "Mine", "idempotencyKey": key} | change))
    assert (refused.value.code, refused.value.extensions["field"]) == ("CONFLICT", "idempotencyKey")
    assert len((await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"]) == 1


async def test_the_same_key_of_another_user_is_another_turn(client: Client, other: Client) -> None:
    key = str(uuid.uuid4())
    mine = await client.send("Hello", idempotencyKey=key)
    theirs = await other.send("Different", idempotencyKey=key)
    assert mine["thread"]["id"] != theirs["thread"]["id"]


async def test_a_key_whose_thread_was_deleted_does_not_send_again(client: Client) -> None:
    key = str(uuid.uuid4())
    turn = await client.send("Gone", idempotencyKey=key)
    await client.finish(turn["assistantMessage"]["id"])
    await client.run("mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }", turn["thread"])
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Gone", idempotencyKey=key)
    assert refused.value.code == "NOT_FOUND"
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


async def test_a_second_send_while_the_thread_is_live_is_busy_and_writes_nothing(
    client: Client, server: Server
) -> None:
    turn = await client.send("First", model="hangs")
    thread = turn["thread"]["id"]
    key = str(uuid.uuid4())
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Second", threadId=thread, idempotencyKey=key)
    assert refused.value.code == "THREAD_BUSY"
    assert len(await client.path(thread)) == 2
    assert await rows(server, "SELECT count(*) FROM turns WHERE idempotency_key = $2", turn, key) == [(0,)]
    await client.stop(turn["assistantMessage"]["id"])
    after = await client.send("Second", threadId=thread, idempotencyKey=key)
    assert after["thread"]["id"] == thread


async def test_of_two_different_sends_at_once_one_wins(client: Client) -> None:
    turn = await client.send("Begin")
    await client.finish(turn["assistantMessage"]["id"])
    thread = turn["thread"]["id"]
    results = await asyncio.gather(
        *(client.send(f"Device {n}", threadId=thread, model="hangs") for n in range(8)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, dict)]
    lost = [result.code for result in results if isinstance(result, GraphQLErrors)]
    assert (len(won), lost) == (1, ["THREAD_BUSY"] * 7)
    assert len(await client.path(thread)) == 4
    await client.stop(won[0]["assistantMessage"]["id"])


async def test_a_model_that_is_not_offered_is_refused_before_anything_is_written(client: Client) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Hello", model="no-such-model")
    assert (refused.value.code, refused.value.extensions["field"]) == ("MODEL_UNAVAILABLE", "modelId")
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


BAD_TEXTS = [
    ("", "BAD_USER_INPUT"),
    (" \n\t ", "BAD_USER_INPUT"),
    ("a\x00b", "BAD_USER_INPUT"),
    ("é" * 131_073, "PAYLOAD_TOO_LARGE"),
    ("x" * 262_145, "PAYLOAD_TOO_LARGE"),
]


@pytest.mark.parametrize(("text", "code"), BAD_TEXTS, ids=["empty", "blank", "nul", "2-byte letters", "letters"])
async def test_a_text_that_cannot_be_kept_is_refused_with_its_field(client: Client, text: str, code: str) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.send(text)
    assert (refused.value.code, refused.value.extensions["field"]) == (code, "text")
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


async def test_a_text_of_exactly_the_limit_is_kept(client: Client) -> None:
    turn = await client.send("é" * 131_072)
    assert len(turn["userMessage"]["text"]) == 131_072


@pytest.mark.parametrize("key", ["", "x" * 201, "with space", "naïve", "a\nb", "a\x00b"])
async def test_a_key_that_is_none_is_refused(client: Client, key: str) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Hello", idempotencyKey=key)
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "idempotencyKey")


FAILURES = [
    ("fails-at-once", "FAILED", "", "RATE_LIMITED"),
    ("fails-midway", "FAILED", "one two ", "PROVIDER_UNAVAILABLE"),
    ("hangs-up", "INTERRUPTED", "one two ", "PROVIDER_HUNG_UP"),
    ("crashes", "FAILED", "one two ", "INTERNAL_SERVER_ERROR"),
    ("says-nothing", "FAILED", "", "EMPTY_ANSWER"),
]


@pytest.mark.parametrize(("model", "status", "text", "code"), FAILURES)
async def test_however_a_provider_fails_the_answer_ends_with_what_had_come(
    client: Client, server: Server, model: str, status: str, text: str, code: str
) -> None:
    turn = await client.send("Fail, please", model=model)
    answer = await client.finish(turn["assistantMessage"]["id"])
    assert (answer["status"], answer["text"], answer["error"]["code"]) == (status, text, code)
    assert answer == await client.message(answer["id"])
    assert len(await usage_events(server, turn)) == 1
    assert "script" not in answer["error"]["message"] or code != "INTERNAL_SERVER_ERROR"
    follow_up = await client.send("And now?", threadId=turn["thread"]["id"])
    assert (await client.finish(follow_up["assistantMessage"]["id"]))["status"] == "COMPLETE"


async def test_a_failure_tells_when_to_retry(client: Client) -> None:
    turn = await client.send("Too much", model="fails-at-once")
    assert (await client.finish(turn["assistantMessage"]["id"]))["error"]["retryAfter"] == 7


async def test_a_model_is_told_the_branch_that_leads_to_the_question_in_order(client: Client) -> None:
    turn = await client.send("First question")
    await client.finish(turn["assistantMessage"]["id"])
    question = f"Second {uuid.uuid4()}"
    SCRIPTS.driven.queue(question).put_nowait(TextDelta("x"))
    SCRIPTS.driven.queue(question).put_nowait(None)
    second = await client.send(question, threadId=turn["thread"]["id"], model="driven")
    await client.finish(second["assistantMessage"]["id"])
    request = SCRIPTS.driven.requests[question]
    assert [(message.role, message.text) for message in request.messages] == [
        ("user", "First question"),
        ("assistant", "Hello world"),
        ("user", question),
    ]


async def test_an_answer_is_written_though_its_asker_hung_up(client: Client, server: Server) -> None:
    question = f"Hang up {uuid.uuid4()}"
    turn = await client.send(question, model="driven")
    async with client.reading(turn["assistantMessage"]["id"]) as subscription:
        SCRIPTS.driven.queue(question).put_nowait(TextDelta("one "))
        assert (await subscription.next())["data"]["messageStream"]["text"] == "one "
        subscription.abort()
    SCRIPTS.driven.queue(question).put_nowait(TextDelta("two"))
    SCRIPTS.driven.queue(question).put_nowait(None)
    assert (await client.finish(turn["assistantMessage"]["id"]))["text"] == "one two"


async def test_an_edit_adds_a_sibling_and_overwrites_nothing(client: Client) -> None:
    turn = await client.send("Old words")
    await client.finish(turn["assistantMessage"]["id"])
    edited = await client.edit(turn["userMessage"]["id"], "New words")
    await client.finish(edited["assistantMessage"]["id"])
    assert [message["text"] for message in await client.path(turn["thread"]["id"])] == ["New words", "Hello world"]
    siblings = await client.run(
        "query($id: ID!) { message(id: $id) { siblings { text parent { id } } } }", {"id": turn["userMessage"]["id"]}
    )
    assert siblings["message"]["siblings"] == [
        {"text": "Old words", "parent": None},
        {"text": "New words", "parent": None},
    ]


async def test_a_retry_adds_an_answer_beside_the_first(client: Client) -> None:
    turn = await client.send("Again")
    first = await client.finish(turn["assistantMessage"]["id"])
    again = await client.retry(first["id"], model="thinks-and-calls")
    second = await client.finish(again["assistantMessage"]["id"])
    assert again["userMessage"]["id"] == turn["userMessage"]["id"]
    path = await client.path(turn["thread"]["id"])
    assert [message["id"] for message in path] == [turn["userMessage"]["id"], second["id"]]
    siblings = await client.run("query($id: ID!) { message(id: $id) { siblings { id } } }", {"id": first["id"]})
    assert [sibling["id"] for sibling in siblings["message"]["siblings"]] == [first["id"], second["id"]]


async def test_selecting_a_branch_finds_the_leaf_that_was_left(client: Client) -> None:
    turn = await client.send("Q1")
    a1 = await client.finish(turn["assistantMessage"]["id"])
    thread = turn["thread"]["id"]
    a2 = await client.finish((await client.retry(a1["id"]))["assistantMessage"]["id"])
    deep = await client.send("Q2 below A2", threadId=thread)
    await client.finish(deep["assistantMessage"]["id"])
    whole = [message["id"] for message in await client.path(thread)]
    await select(client, a1["id"])
    assert [message["id"] for message in await client.path(thread)] == [turn["userMessage"]["id"], a1["id"]]
    await select(client, a2["id"])
    assert [message["id"] for message in await client.path(thread)] == whole


async def test_a_message_below_another_branch_leads_the_whole_path_there(client: Client) -> None:
    turn = await client.send("Q1")
    await client.finish(turn["assistantMessage"]["id"])
    thread = turn["thread"]["id"]
    deep = await client.send("Q2", threadId=thread)
    await client.finish(deep["assistantMessage"]["id"])
    edited = await client.edit(turn["userMessage"]["id"], "Q1, edited")
    await client.finish(edited["assistantMessage"]["id"])
    retried = await client.retry(deep["assistantMessage"]["id"])
    await client.finish(retried["assistantMessage"]["id"])
    assert [message["id"] for message in await client.path(thread)] == [
        turn["userMessage"]["id"],
        turn["assistantMessage"]["id"],
        deep["userMessage"]["id"],
        retried["assistantMessage"]["id"],
    ]


async def test_an_edit_takes_a_users_message_and_a_retry_an_answer(client: Client) -> None:
    turn = await client.send("Mixed up")
    await client.finish(turn["assistantMessage"]["id"])
    for attempt in (
        client.edit(turn["assistantMessage"]["id"], "No"),
        client.retry(turn["userMessage"]["id"]),
        client.stop(turn["userMessage"]["id"]),
    ):
        with pytest.raises(GraphQLErrors) as refused:
            await attempt
        assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "messageId")
    assert len(await client.path(turn["thread"]["id"])) == 2


async def test_edit_and_retry_are_busy_too_while_the_thread_is_live(client: Client) -> None:
    turn = await client.send("Live", model="hangs")
    for attempt in (
        client.edit(turn["userMessage"]["id"], "No"),
        client.retry(turn["assistantMessage"]["id"]),
    ):
        with pytest.raises(GraphQLErrors) as refused:
            await attempt
        assert refused.value.code == "THREAD_BUSY"
    await client.stop(turn["assistantMessage"]["id"])


async def test_deleting_a_thread_ends_its_stream_and_leaves_usage_alone(client: Client, server: Server) -> None:
    turn = await client.send("Delete me", model="hangs")
    async with client.reading(turn["assistantMessage"]["id"]) as subscription:
        assert (await subscription.next())["data"]["messageStream"]["__typename"] == "MessageDelta"
        await client.run(
            "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }", turn["thread"]
        )
        events = [event async for event in subscription.events()]
    assert events[-1]["__typename"] == "MessageEnded"
    assert events[-1]["message"]["status"] == "STOPPED"
    assert len(server.generations) == 0
    assert await orphans(server, turn) == {}
    assert len(await usage_events(server, turn)) == 1
    with pytest.raises(GraphQLErrors) as gone:
        await client.read(turn["assistantMessage"]["id"])
    assert gone.value.code == "NOT_FOUND"


async def test_a_title_is_cut_at_a_word(client: Client) -> None:
    turn = await client.send("word " * 40 + "\nsecond line")
    title = turn["thread"]["title"]
    assert len(title) <= 80
    assert title.endswith("word…")


async def test_a_send_over_a_socket_is_the_same_send(client: Client) -> None:
    given = {"idempotencyKey": str(uuid.uuid4()), "text": "Over a socket", "modelId": "two-words"}
    async with client.subscribe(SEND, {"input": given}) as operation:
        payload = await operation.next()
        assert payload is not None
        assert await operation.next() is None
    again = await client.run(SEND, {"input": given})
    assert again["sendMessage"]["thread"] == payload["data"]["sendMessage"]["thread"]


async def select(client: Client, message_id: str) -> None:
    """Make a message's branch active."""
    query = "mutation($id: ID!) { selectMessage(input: {messageId: $id}) { message { id } } }"
    assert (await client.run(query, {"id": message_id}))["selectMessage"]["message"]["id"] == message_id


async def rows(server: Server, query: str, turn: dict[str, dict[str, str]], *more: object) -> list[tuple[object, ...]]:
    """The rows of a query about a turn's answer ($1)."""
    key = parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"])
    connection = await asyncpg.connect(server.database.url)
    try:
        arguments = [key, *more] if "$1" in query else list(more)
        query = query if "$1" in query else query.replace("$2", "$1")
        return [tuple(row) for row in await connection.fetch(query, *arguments)]
    finally:
        await connection.close()


async def usage_events(server: Server, turn: dict[str, dict[str, str]]) -> list[tuple[object, ...]]:
    """The usage events of a turn's answer."""
    query = """
    SELECT model, status, prompt_tokens, completion_tokens, estimated FROM usage_events
    WHERE message_id = $1 AND kind = 'ANSWER'
    """
    return await rows(server, query, turn)


async def orphans(server: Server, turn: dict[str, dict[str, str]]) -> dict[str, int]:
    """Rows anywhere, usage and the feed apart, that still hold the id of the thread or a message of the turn."""
    ids = [
        parse_id(IdKind.THREAD, turn["thread"]["id"]),
        parse_id(IdKind.MESSAGE, turn["userMessage"]["id"]),
        parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"]),
    ]
    connection = await asyncpg.connect(server.database.url)
    try:
        columns = await connection.fetch(
            "SELECT table_name, column_name FROM information_schema.columns "
            "WHERE table_schema = 'public' AND data_type = 'uuid' AND table_name NOT IN ('usage_events', 'changes')"
        )
        found = {}
        for table, column in columns:
            count = await connection.fetchval(f"SELECT count(*) FROM {table} WHERE {column} = ANY($1::uuid[])", ids)
            if count:
                found[f"{table}.{column}"] = count
        return found
    finally:
        await connection.close()


@pytest.mark.parametrize("effort", ["LOW", "MEDIUM", "HIGH", None])
async def test_the_reasoning_effort_reaches_the_provider(client: Client, effort: str | None) -> None:
    question = f"Effort {uuid.uuid4()}"
    SCRIPTS.driven.queue(question).put_nowait(TextDelta("x"))
    SCRIPTS.driven.queue(question).put_nowait(None)
    turn = await client.send(question, model="driven", reasoningEffort=effort)
    await client.finish(turn["assistantMessage"]["id"])
    assert SCRIPTS.driven.requests[question].reasoning_effort == effort


async def test_a_database_that_is_away_when_a_question_is_read_is_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0

    async def away_at_first(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads <= 2:
            raise DatabaseUnavailableError("ConnectionResetError")
        return await history(*arguments)

    thread_id = (await client.send("Hello?", model="two-words"))["thread"]["id"]
    await client.finish((await client.path(thread_id))[1]["id"])
    monkeypatch.setattr("services.turns.history", away_at_first)
    turn = await client.send("Anybody there?", model="two-words", threadId=thread_id)
    ended = await client.finish(turn["assistantMessage"]["id"])
    assert (reads, ended["status"], ended["error"]) == (3, "COMPLETE", None)


async def asked(client: Client, text: str, **more: Any) -> dict[str, Any]:
    """A turn that has ended."""
    turn = await client.send(text, **more)
    await client.finish(turn["assistantMessage"]["id"])
    return turn


async def test_who_asked_before_asks_by_one_statement_in_a_new_thread_and_in_one_that_is_there(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = (await asked(client, "First"))["thread"]["id"]

    async def must_not(*_: Any, **__: Any) -> Any:
        raise AssertionError("the long way")

    monkeypatch.setattr("services.turns.Turns._once", must_not)
    monkeypatch.setattr("services.turns.Turns._read", must_not)
    await asked(client, "Second", threadId=thread_id)
    await asked(client, "Elsewhere")
    assert [message["text"] for message in await client.path(thread_id)][::2] == ["First", "Second"]


async def test_what_was_chosen_since_the_last_question_holds_for_the_next(client: Client) -> None:
    async def answered_by(**more: Any) -> str:
        turn = await asked(client, "Who?", modelId=None, **more)
        return str((await client.message(turn["assistantMessage"]["id"]))["model"]["id"])

    async def choose(model: str | None) -> None:
        chosen = "updateSettings(input: {defaultModelId: $model}) { settings { defaultModel { id } } }"
        await client.run(f"mutation($model: String) {{ {chosen} }}", {"model": model})

    thread_id = (await asked(client, "First"))["thread"]["id"]
    default = await answered_by()
    for model in ("two-words", None, "priced"):
        await choose(model)
        assert await answered_by(threadId=thread_id) == (model or default)
        assert await answered_by() == (model or default)
        # With a file it is no single statement, which would have checked it.
        file = await client.upload(b"a file")
        await choose("two-words" if model == "priced" else "priced")
        assert await answered_by(attachmentIds=[file["id"]]) == ("two-words" if model == "priced" else "priced")
