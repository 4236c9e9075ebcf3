"""claimAnonymousData: what an anonymous session owns becomes the signed-in user's, once and whole."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import asyncpg
import jwt
import pytest

from models.ids import IdKind, parse_id
from server.runtime import Server
from services.claims import BY_SERVICES, FOLLOWING, LEFT, MERGED, MOVED
from services.custom_providers import MAX_PROVIDERS
from tests.client import Client, GraphQLErrors, connect
from tests.issuer import shared_secret_token
from tests.scripts import SCRIPTS, TextDelta

CLAIM = "mutation($token: String!) { claimAnonymousData(input: {token: $token}) { viewer { id } threadCount } }"


@pytest.fixture
async def rows(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """The server's database."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


async def claim(person: Client, token: str | None) -> dict[str, Any]:
    claimed: dict[str, Any] = (await person.run(CLAIM, {"token": token}))["claimAnonymousData"]
    return claimed


async def titles(client: Client) -> set[str]:
    nodes = (await client.run("{ threads(first: 100) { nodes { title } } }"))["threads"]["nodes"]
    return {node["title"] for node in nodes}


def key_of(client: Client) -> uuid.UUID:
    return parse_id(IdKind.USER, client.id)


async def owned_tables(rows: asyncpg.Connection) -> list[str]:
    found = await rows.fetch(
        "SELECT table_name FROM information_schema.columns WHERE column_name = 'owner_id' AND table_schema = 'public'"
    )
    return [row[0] for row in found]


async def holdings(rows: asyncpg.Connection, client: Client) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of a user, by table."""
    return {
        table: [tuple(row) for row in await rows.fetch(f"SELECT * FROM {table} WHERE owner_id = $1 ORDER BY 1", key)]
        for table in await owned_tables(rows)
        for key in (key_of(client),)
    }


async def refusal(attempt: Any) -> tuple[str, str | None]:
    with pytest.raises(GraphQLErrors) as refused:
        await attempt
    return refused.value.code, refused.value.extensions.get("field")


async def test_every_table_with_an_owner_is_moved_merged_or_left(rows: asyncpg.Connection) -> None:
    named = [*MOVED, *MERGED, *LEFT, *FOLLOWING, *BY_SERVICES]
    assert sorted(named) == sorted(await owned_tables(rows)), "say in services/claims.py what becomes of a new table"


async def test_threads_messages_and_keys_come_over_and_the_session_is_no_more(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    key = str(uuid.uuid4())
    first = await client.send("First", idempotencyKey=key)
    await client.finish(first["assistantMessage"]["id"])
    await client.finish((await client.edit(first["userMessage"]["id"], "Edited"))["assistantMessage"]["id"])
    second = await client.send("Second")
    await client.finish(second["assistantMessage"]["id"])
    await person.finish((await person.send("Mine"))["assistantMessage"]["id"])
    path = await client.path(first["thread"]["id"])
    used = await rows.fetchval("SELECT count(*) FROM usage_events WHERE owner_id = $1", key_of(client))
    assert used == 3

    assert await claim(person, client.token) == {"viewer": {"id": person.id}, "threadCount": 2}

    assert await titles(person) == {"First", "Second", "Mine"}
    assert await person.path(first["thread"]["id"]) == path
    siblings = await person.run(f'{{ message(id: "{first["userMessage"]["id"]}") {{ siblings {{ text }} }} }}')
    assert [node["text"] for node in siblings["message"]["siblings"]] == ["First", "Edited"]
    again = await person.send("First", idempotencyKey=key)
    assert again["assistantMessage"]["id"] == first["assistantMessage"]["id"], "a late repeat is no second question"
    went_on = await person.send("And on", threadId=second["thread"]["id"])
    assert (await person.finish(went_on["assistantMessage"]["id"]))["status"] == "COMPLETE"
    assert await refusal(client.run("{ viewer { id } }")) == ("UNAUTHENTICATED", None)
    assert not any((await holdings(rows, client)).values())
    assert not await rows.fetchval("SELECT count(*) FROM users WHERE id = $1", key_of(client))


async def test_projects_shares_settings_and_usage_come_over(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    turn = await client.send("Shared")
    await client.finish(turn["assistantMessage"]["id"])
    thread_id, me = parse_id(IdKind.THREAD, turn["thread"]["id"]), key_of(client)
    project_id = uuid.uuid4()
    await rows.execute("INSERT INTO projects (id, owner_id, name) VALUES ($1, $2, 'P')", project_id, me)
    await rows.execute("UPDATE threads SET project_id = $1 WHERE id = $2", project_id, thread_id)
    await rows.execute(
        "INSERT INTO shares (id, owner_id, thread_id, token, title, includes_attachments) "
        "VALUES ($1, $2, $3, $4, 'S', false)",
        *(uuid.uuid4(), me, thread_id, uuid.uuid4().hex),
    )
    await rows.execute(
        "INSERT INTO settings (id, owner_id, default_model) VALUES ($1, $2, 'two-words')", uuid.uuid4(), me
    )
    before = await holdings(rows, client)
    await claim(person, client.token)
    after = await holdings(rows, person)
    for table in ("projects", "shares", "settings", "usage_quarters", "usage_events", "messages", "threads", "turns"):
        assert len(after[table]) == len(before[table]) > 0, table
    count = await rows.fetchval("SELECT thread_count FROM projects WHERE owner_id = $1", key_of(person))
    assert count == 1


async def test_where_both_have_one_the_users_own_stays_and_usage_adds_up(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    key = str(uuid.uuid4())
    theirs = await client.send("Theirs", idempotencyKey=key)
    own = await person.send("Own", idempotencyKey=key)
    for who, turn in ((client, theirs), (person, own)):
        await who.finish(turn["assistantMessage"]["id"])
        await rows.execute(
            "INSERT INTO settings (id, owner_id, default_model) VALUES ($1, $2, $3)",
            *(uuid.uuid4(), key_of(who), "own" if who is person else "theirs"),
        )
    await claim(person, client.token)
    again = await person.send("Own", idempotencyKey=key)
    assert again["thread"]["id"] == own["thread"]["id"]
    chosen = await rows.fetch("SELECT default_model FROM settings WHERE owner_id = $1", key_of(person))
    assert [row[0] for row in chosen] == ["own"]
    summed = await rows.fetchrow(
        "SELECT sum(requests) AS requests, sum(prompt_tokens) AS prompt, sum(cached_tokens) AS cached "
        "FROM usage_quarters WHERE owner_id = $1",
        key_of(person),
    )
    assert tuple(summed) == (2, 14, 6)
    assert await titles(person) == {"Own", "Theirs"}


SET_KEY = "mutation($input: SetProviderKeyInput!) { setProviderKey(input: $input) { __typename } }"
SAVE_PROVIDER = "mutation($input: SaveCustomProviderInput!) { saveCustomProvider(input: $input) { __typename } }"
SAVE_MODEL = "mutation($input: SaveCustomModelInput!) { saveCustomModel(input: $input) { __typename } }"


async def set_key(client: Client, provider: str, key: str) -> None:
    await client.run(SET_KEY, {"input": {"provider": provider, "key": key}})


async def save_endpoint(client: Client, slug: str, host: str, **more: str) -> None:
    """An endpoint with a model `m` of that host's name."""
    given = {"slug": slug, "name": host, "baseUrl": f"https://{host}.example"} | more
    await client.run(SAVE_PROVIDER, {"input": given})
    await client.run(SAVE_MODEL, {"input": {"provider": slug, "vendorName": f"m-of-{host}", "name": "M"}})


async def opened(server: Server, client: Client) -> dict[str, str | None]:
    """The client's keys as turns would use them; those of endpoints by slug and host."""
    async with server.database.acquire() as connection:
        keys = await server.provider_keys.of(connection, key_of(client))
        own = await server.custom_providers.of(connection, key_of(client))
    found = {name: key.key for name, key in keys.items() if not name.startswith("custom:")}
    return found | {f"{one.slug} {one.base_url}": one.key.key if one.key else None for one in own.providers}


async def test_keys_come_over_encrypted_for_their_new_owner_and_the_users_own_stay(
    client: Client, person: Client, server: Server, rows: asyncpg.Connection
) -> None:
    await set_key(client, "openai", "openai-key-of-session")
    await set_key(client, "groq", "groq-key-of-session")
    await set_key(client, "google", "google-key-of-session")
    await set_key(person, "openai", "openai-key-of-person")
    await rows.execute(
        "UPDATE provider_keys SET ciphertext = '' WHERE owner_id = $1 AND provider = 'google'", key_of(client)
    )
    await claim(person, client.token)
    assert await opened(server, person) == {
        "openai": "openai-key-of-person",
        "groq": "groq-key-of-session",
        "google": None,
    }
    shown = (await person.run("{ settings { providerKeys { provider lastFour usable } } }"))["settings"]["providerKeys"]
    assert [(key["provider"], key["lastFour"], key["usable"]) for key in shown] == [
        ("google", "sion", False),
        ("groq", "sion", True),
        ("openai", "rson", True),
    ]
    assert not any((await holdings(rows, client)).values())


async def test_endpoints_come_over_with_keys_and_models_but_no_key_goes_to_another_endpoint(
    client: Client, person: Client, server: Server
) -> None:
    await save_endpoint(client, "mine", "session", key="mine-key-of-session")
    await save_endpoint(client, "both", "session", key="both-key-of-session")
    await save_endpoint(person, "both", "person")
    await claim(person, client.token)
    assert await opened(server, person) == {
        "both https://person.example": None,
        "mine https://session.example": "mine-key-of-session",
    }
    models = (await person.run("{ settings { customModels { modelId } } }"))["settings"]["customModels"]
    assert {model["modelId"] for model in models} == {"custom:both/m-of-person", "custom:mine/m-of-session"}


async def test_a_claim_stops_at_the_limit_of_endpoints(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    for who, letter in ((client, "a"), (person, "b")):
        await rows.execute(
            "INSERT INTO custom_providers (id, owner_id, slug, name, base_url, format) "
            "SELECT gen_random_uuid(), $1, $2 || n, 'x', 'https://a.example', 'CHAT_COMPLETIONS' "
            "FROM generate_series(1, $3::int) n",
            *(key_of(who), letter, MAX_PROVIDERS - 5),
        )
    await claim(person, client.token)
    assert (
        await rows.fetchval("SELECT count(*) FROM custom_providers WHERE owner_id = $1", key_of(person))
        == MAX_PROVIDERS
    )
    assert not any((await holdings(rows, client)).values())


async def test_what_was_chosen_in_the_session_alone_is_kept(client: Client, person: Client) -> None:
    update = "mutation($p: PersonalizationInput) { updateSettings(input: {personalization: $p}) { __typename } }"
    await client.run(update, {"p": {"name": "Session", "traits": "brief"}})
    await person.run(update, {"p": {"name": "Person", "context": "COBOL"}})
    await claim(person, client.token)
    chosen = (await person.run("{ settings { personalization { name traits context } } }"))["settings"]
    assert chosen["personalization"] == {"name": "Person", "traits": "brief", "context": "COBOL"}


async def test_the_feed_is_told_once_that_all_is_to_be_read_anew(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    for text in ("One", "Two"):
        await client.finish((await client.send(text))["assistantMessage"]["id"])
    await person.finish((await person.send("Mine"))["assistantMessage"]["id"])
    last = await rows.fetchval("SELECT max(id) FROM changes WHERE owner_id = $1", key_of(person))
    await claim(person, client.token)
    told = await rows.fetch("SELECT kind, object_id FROM changes WHERE owner_id = $1 AND id > $2", key_of(person), last)
    assert [tuple(row) for row in told] == [("RESET", None)]
    # And it is loud again afterwards.
    await person.send("More")
    kinds = await rows.fetch("SELECT kind FROM changes WHERE owner_id = $1 AND id > $2", key_of(person), last)
    assert len(kinds) > 1


async def test_a_second_claim_finds_nothing_and_changes_nothing(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    await client.finish((await client.send("Once"))["assistantMessage"]["id"])
    await claim(person, client.token)
    before = await holdings(rows, person)
    assert await refusal(claim(person, client.token)) == ("NOT_FOUND", "token")
    async with connect(person.address) as another:
        await another.sign_in_with(shared_secret_token())
        assert await refusal(claim(another, client.token)) == ("NOT_FOUND", "token")
        assert await titles(another) == set()
    assert await holdings(rows, person) == before


async def test_of_many_claims_at_once_one_wins(
    client: Client, person: Client, server: Server, rows: asyncpg.Connection
) -> None:
    await client.finish((await client.send("Contested"))["assistantMessage"]["id"])
    async with connect(server.address) as another:
        await another.sign_in_with(shared_secret_token())
        attempts = [claim(who, client.token) for who in (person, another) * 5]
        outcomes = await asyncio.gather(*attempts, return_exceptions=True)
        won = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        lost = [outcome.code for outcome in outcomes if isinstance(outcome, GraphQLErrors)]
        assert (len(won), lost) == (1, ["NOT_FOUND"] * 9)
        winner, loser = (person, another) if won[0]["viewer"]["id"] == person.id else (another, person)
        assert await titles(winner) == {"Contested"}
        assert await titles(loser) == set()


async def test_an_answer_that_is_being_written_is_stopped_first_and_kept(client: Client, person: Client) -> None:
    question = f"Live {uuid.uuid4()}"
    turn = await client.send(question, model="driven")
    SCRIPTS.driven.queue(question).put_nowait(TextDelta("as far as this"))
    answer = turn["assistantMessage"]["id"]
    async with client.reading(answer) as reading:
        assert await reading.next()
        assert (await claim(person, client.token))["threadCount"] == 1
        event = await reading.next()
        assert event
        assert event["data"]["messageStream"]["__typename"] == "MessageEnded"
    message = await person.message(answer)
    assert (message["status"], message["text"]) == ("STOPPED", "as far as this")


async def test_the_sockets_of_the_session_are_closed(client: Client, person: Client) -> None:
    async with client.socket() as ws, asyncio.timeout(20):
        assert (await ws.receive_json())["type"] == "connection_ack"
        await claim(person, client.token)
        assert (await ws.receive()).type is aiohttp.WSMsgType.CLOSE
        assert ws.close_code == 4403


async def test_an_anonymous_session_cannot_claim(client: Client, other: Client, rows: asyncpg.Connection) -> None:
    await client.finish((await client.send("Mine"))["assistantMessage"]["id"])
    before = await holdings(rows, client)
    assert await refusal(claim(other, client.token)) == ("FORBIDDEN", None)
    assert await refusal(claim(client, client.token)) == ("FORBIDDEN", None)
    assert await holdings(rows, client) == before


def session_token(user_id: str, **changes: Any) -> str:
    now = int(time.time())
    return jwt.encode({"iss": "threadgraph", "sub": user_id, "iat": now, "exp": now + 60} | changes, "s" * 32, "HS256")


@pytest.mark.parametrize(
    "name", ["nothing", "no token", "too long", "a NUL", "half a character", "expired", "another key", "signed in"]
)
async def test_what_is_no_token_of_a_session_is_refused(client: Client, person: Client, name: str) -> None:
    tokens = {
        "nothing": "",
        "no token": "a.b.c",
        "too long": "x" * 100_000,
        "a NUL": "\0",
        "half a character": "\ud800",
        "expired": session_token(client.id, exp=int(time.time()) - 1),
        "another key": jwt.encode({"iss": "threadgraph", "sub": client.id, "iat": 1, "exp": 2**31}, "t" * 32, "HS256"),
        "signed in": shared_secret_token(),
    }
    attempt = person.run(CLAIM, {"token": tokens[name]})
    if name == "half a character":
        with pytest.raises((GraphQLErrors, TypeError)):
            await attempt
    else:
        assert await refusal(attempt) == ("BAD_USER_INPUT", "token")
    await client.run("{ viewer { id } }")


async def test_a_session_of_somebody_who_never_was_is_not_found(person: Client) -> None:
    token = session_token(f"user_{uuid.uuid4().hex}")
    assert await refusal(claim(person, token)) == ("NOT_FOUND", "token")


async def test_a_signed_in_users_id_in_a_sessions_token_moves_nothing(
    person: Client, server: Server, rows: asyncpg.Connection
) -> None:
    """Only our own key can make such a token; were it ever to leak, this is one thing less it opens."""
    async with connect(server.address) as another:
        await another.sign_in_with(shared_secret_token())
        await another.finish((await another.send("Theirs"))["assistantMessage"]["id"])
        before = await holdings(rows, another)
        assert await refusal(claim(person, session_token(another.id))) == ("NOT_FOUND", "token")
        assert await holdings(rows, another) == before


async def test_whoever_writes_meanwhile_is_refused_by_name_or_served_and_nothing_is_left_behind(
    client: Client, person: Client, rows: asyncpg.Connection
) -> None:
    turn = await client.send("Busy")
    await client.finish(turn["assistantMessage"]["id"])
    codes: set[str] = set()

    async def write() -> None:
        number = 0
        while "UNAUTHENTICATED" not in codes:
            number += 1
            rename = f'mutation {{ renameThread(input: {{threadId: "{turn["thread"]["id"]}", title: "{number}"}}) '
            for attempt in (client.run(rename + "{ thread { id } } }"), client.send(f"Busy {number}")):
                try:
                    await attempt
                except GraphQLErrors as refused:
                    codes.add(refused.code)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(write())
        await asyncio.sleep(0.2)
        claimed = await claim(person, client.token)
    assert codes <= {"UNAUTHENTICATED", "NOT_FOUND", "UNAVAILABLE"}
    mine = await rows.fetchval("SELECT count(*) FROM threads WHERE owner_id = $1", key_of(person))
    assert mine == claimed["threadCount"]
    assert not any((await holdings(rows, client)).values())
    assert not await rows.fetchval("SELECT count(*) FROM users WHERE id = $1", key_of(client))
