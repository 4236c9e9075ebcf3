"""Signed-in users over HTTP and sockets: a server that trusts an issuer, as a frontend meets it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest

from models.ids import IdKind, parse_id
from server.graphql_socket import SocketTimes
from server.runtime import Server
from tests.client import PROTOCOL, READ, Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.issuer import AUDIENCE, KeyServer, claims, signing_key
from tests.scripts import SCRIPTS, TextDelta


@pytest.fixture(scope="module")
async def issuer() -> AsyncIterator[KeyServer]:
    """An issuer."""
    async with KeyServer() as issuer:
        issuer.keys = [signing_key()]
        yield issuer


@asynccontextmanager
async def serving(
    postgres_url: str, data_dir: Path, issuer: KeyServer, socket_times: SocketTimes | None = None, **changes: Any
) -> AsyncIterator[Server]:
    """A server that trusts the issuer, without leeway."""
    settings = test_settings(
        await make_database(postgres_url),
        data_dir,
        **{
            "auth_shared_secret": None,
            "auth_jwks_url": (issuer.url,),
            "auth_issuer": (issuer.name,),
            "auth_audience": (AUDIENCE,),
            "auth_leeway_seconds": 0.0,
            **changes,
        },
    )
    server = Server(settings, providers=SCRIPTS.models(), socket_times=socket_times)
    await server.start()
    try:
        yield server
    finally:
        await server.drain()
        await server.close()


@pytest.fixture(scope="module")
async def server(
    postgres_url: str, issuer: KeyServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """The server of this module."""
    async with serving(postgres_url, tmp_path_factory.mktemp("data"), issuer) as server:
        yield server


@pytest.fixture
async def client(server: Server, issuer: KeyServer) -> AsyncIterator[Client]:
    """A new signed-in user."""
    async with connect(server.address) as client:
        await client.sign_in_with(issuer.token())
        yield client


async def say(ws: aiohttp.ClientWebSocketResponse, message: Any) -> None:
    await ws.send_str(orjson.dumps(message).decode())


async def hear(ws: aiohttp.ClientWebSocketResponse, kind: str) -> dict[str, Any]:
    """The next message of this type; others are passed over."""
    async with asyncio.timeout(20):
        while True:
            message: dict[str, Any] = orjson.loads((await ws.receive()).data)
            if message["type"] == kind:
                return message


async def closed_with(ws: aiohttp.ClientWebSocketResponse) -> int | None:
    async with asyncio.timeout(20):
        while (await ws.receive()).type is aiohttp.WSMsgType.TEXT:
            pass
    return ws.close_code


def refreshing(token: str) -> dict[str, Any]:
    return {"type": "ping", "payload": {"authorization": f"Bearer {token}"}}


async def test_a_signed_in_user_has_one_id_and_their_own_threads(server: Server, issuer: KeyServer) -> None:
    async with connect(server.address) as first, connect(server.address) as second, connect(server.address) as other:
        await first.sign_in_with(issuer.token("Ann"))
        await second.sign_in_with(issuer.token("Ann", iat=int(time.time()) - 60))
        await other.sign_in_with(issuer.token("Bob"))
        assert first.id == second.id != other.id
        assert (await first.run("{ viewer { anonymous } }"))["viewer"] == {"anonymous": False}
        turn = await first.send("Mine")
        assert (await second.finish(turn["assistantMessage"]["id"]))["text"] == "Hello world"
        with pytest.raises(GraphQLErrors, match="no such message"):
            await other.read(turn["assistantMessage"]["id"])
        assert (await other.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


async def test_anonymous_sessions_are_taken_beside_an_issuer(server: Server) -> None:
    async with connect(server.address) as client:
        await client.sign_in()
        assert (await client.run("{ viewer { anonymous } }"))["viewer"] == {"anonymous": True}


async def test_nobody_begins_more_anonymous_sessions_than_are_allowed(
    postgres_url: str, tmp_path: Path, issuer: KeyServer
) -> None:
    begin = "mutation { a: startAnonymousSession { token } b: startAnonymousSession { token } }"
    async with (
        serving(postgres_url, tmp_path, issuer, anonymous_sessions_per_minute=5) as server,
        connect(server.address) as client,
    ):
        # Aliases and operations of a socket count as much as requests.
        await client.run(begin)
        async with client.subscribe(begin, {}) as operation:
            await operation.next()
        with pytest.raises(GraphQLErrors) as refused:
            await client.run(begin, {})
        assert (refused.value.code, refused.value.errors[0]["path"]) == ("RATE_LIMITED", ["b"])
        assert 10 <= refused.value.extensions["retryAfter"] <= 12
        async with client.socket(init=None) as ws:
            await hear(ws, "connection_ack")
            await say(ws, {"id": "1", "type": "subscribe", "payload": {"query": begin}})
            assert "RATE_LIMITED" in str(await hear(ws, "next"))
        connection = await asyncpg.connect(server.database.url)
        assert await connection.fetchval("SELECT count(*) FROM users") == 5
        await connection.close()
        # Whoever signs in is not kept from it.
        await client.sign_in_with(issuer.token())


async def test_without_anonymous_sessions_only_the_issuers_tokens_are_good(
    postgres_url: str, tmp_path: Path, issuer: KeyServer
) -> None:
    async with (
        serving(postgres_url, tmp_path, issuer, anonymous_sessions=False) as server,
        connect(server.address) as client,
    ):
        with pytest.raises(GraphQLErrors) as refused:
            await client.sign_in()
        assert refused.value.code == "FORBIDDEN"
        await client.sign_in_with(issuer.token())


async def test_a_token_in_the_address_is_no_token(server: Server, issuer: KeyServer) -> None:
    async with connect(server.address) as client:
        token = issuer.token()
        params = {"query": "{ viewer { id } }", "access_token": token, "authorization": f"Bearer {token}"}
        async with client.http.get(client.url, params=params) as response:
            assert (await response.json())["errors"][0]["extensions"]["code"] == "UNAUTHENTICATED"


async def test_a_live_socket_ends_with_its_token(client: Client, issuer: KeyServer) -> None:
    now = time.time()
    token = issuer.token("Ann", exp=int(now) + 2)
    async with client.socket(init={"authorization": f"Bearer {token}"}) as ws:
        await hear(ws, "connection_ack")
        assert await closed_with(ws) == 4403
        assert time.time() >= int(now) + 2


async def test_a_token_that_has_expired_opens_no_socket(client: Client, issuer: KeyServer) -> None:
    token = issuer.token(exp=int(time.time()) - 1)
    async with client.socket(init={"authorization": f"Bearer {token}"}) as ws:
        assert await closed_with(ws) == 4403


async def test_a_new_token_in_a_ping_keeps_the_socket_and_its_subscriptions(client: Client, issuer: KeyServer) -> None:
    question = "A long evening"
    end = int(time.time()) + 2
    await client.sign_in_with(issuer.token("Cleo"))
    turn = await client.send(question, model="driven")
    async with client.socket(init={"authorization": f"Bearer {issuer.token('Cleo', exp=end)}"}) as ws:
        await hear(ws, "connection_ack")
        variables = {"id": turn["assistantMessage"]["id"]}
        await say(ws, {"id": "1", "type": "subscribe", "payload": {"query": READ, "variables": variables}})
        SCRIPTS.driven.queue(question).put_nowait(TextDelta("before "))
        await hear(ws, "next")
        later = int(time.time()) + 600
        await say(ws, refreshing(issuer.token("Cleo", exp=later)))
        pong = await hear(ws, "pong")
        assert datetime.fromisoformat(pong["payload"]["expiresAt"]).timestamp() == later
        # Past the end of the first token: what marks the moment is the socket of another who has the same end.
        async with client.socket(init={"authorization": f"Bearer {issuer.token('Dora', exp=end)}"}) as witness:
            assert await closed_with(witness) == 4403
        assert time.time() >= end
        SCRIPTS.driven.queue(question).put_nowait(TextDelta("after"))
        event = await hear(ws, "next")
        assert event["payload"]["data"]["messageStream"]["text"] == "after"
        await say(ws, {"id": "2", "type": "subscribe", "payload": {"query": "{ viewer { id } }"}})
        assert (await hear(ws, "next"))["payload"]["data"]["viewer"]["id"] == client.id
        # And it may be shortened: the last token counts.
        await say(ws, refreshing(issuer.token("Cleo", exp=int(time.time()) + 1)))
        assert await closed_with(ws) == 4403
    SCRIPTS.driven.queue(question).put_nowait(None)
    await client.finish(turn["assistantMessage"]["id"])


@pytest.mark.parametrize("whose", ["another user's", "an anonymous session's", "nobody's", "an expired one"])
async def test_a_token_in_a_ping_must_be_a_good_one_of_the_same_user(
    client: Client, issuer: KeyServer, whose: str
) -> None:
    if whose == "an anonymous session's":
        async with connect(client.address) as anonymous:
            await anonymous.sign_in()
            token = str(anonymous.token)
    else:
        token = {
            "another user's": issuer.token(),
            "nobody's": signing_key().sign(claims(issuer.name)),
            "an expired one": issuer.token(exp=int(time.time()) - 1),
        }[whose]
    async with client.socket() as ws:
        await hear(ws, "connection_ack")
        await say(ws, refreshing(token))
        assert await closed_with(ws) == 4403


async def test_a_socket_without_a_viewer_cannot_become_somebody(server: Server, issuer: KeyServer) -> None:
    async with connect(server.address) as nobody, nobody.socket() as ws:
        await hear(ws, "connection_ack")
        await say(ws, refreshing(issuer.token()))
        assert await closed_with(ws) == 4403


async def test_a_ping_before_the_acknowledgement_is_only_a_ping(server: Server, issuer: KeyServer) -> None:
    async with connect(server.address) as nobody, nobody.http.ws_connect(nobody.url, protocols=(PROTOCOL,)) as ws:
        await say(ws, refreshing(issuer.token()))
        assert await hear(ws, "pong") == {"type": "pong"}, "and the token is not repeated"
        await say(ws, {"id": "1", "type": "subscribe", "payload": {"query": "{ viewer { id } }"}})
        assert await closed_with(ws) == 4401


async def test_while_an_issuer_is_out_of_reach_from_the_start_callers_are_told_to_try_again(
    postgres_url: str, tmp_path: Path
) -> None:
    async with KeyServer() as issuer:
        issuer.keys = [signing_key()]
        issuer.answer = issuer.fail
        async with serving(postgres_url, tmp_path, issuer) as server, connect(server.address) as client:
            client.token = issuer.token()
            with pytest.raises(GraphQLErrors) as refused:
                await client.run("{ viewer { id } }")
            assert (refused.value.code, refused.value.extensions["retryAfter"] > 0) == ("UNAVAILABLE", True)
            async with client.socket() as ws:
                assert await closed_with(ws) == 1013
            assert (await client.run("{ __typename }"))["__typename"] == "Query"
            async with connect(server.address) as anonymous:
                await anonymous.sign_in()


async def test_a_refresh_that_cannot_be_verified_now_leaves_the_socket_as_it_was(
    postgres_url: str, tmp_path: Path
) -> None:
    async with KeyServer() as issuer:
        issuer.keys = [signing_key()]
        async with serving(postgres_url, tmp_path, issuer) as server, connect(server.address) as client:
            end = int(time.time()) + 300
            await client.sign_in_with(issuer.token("Ann", exp=end))
            issuer.answer = issuer.fail
            issuer.keys = [signing_key()]
            async with client.socket() as ws:
                await hear(ws, "connection_ack")
                await say(ws, refreshing(issuer.token("Ann", exp=end + 300)))
                pong = await hear(ws, "pong")
                assert datetime.fromisoformat(pong["payload"]["expiresAt"]).timestamp() == end


@pytest.mark.parametrize("deleting", ["UPDATE users SET deleted_at = now()", "DELETE FROM users"])
async def test_the_sockets_of_a_deleted_user_are_closed(
    postgres_url: str, tmp_path: Path, issuer: KeyServer, deleting: str
) -> None:
    often = SocketTimes(watch_seconds=0.05)
    async with serving(postgres_url, tmp_path, issuer, often) as server, connect(server.address) as client:
        await client.sign_in()
        async with connect(server.address) as stays:
            await stays.sign_in_with(issuer.token())
            async with client.socket() as ws, stays.socket() as untouched:
                await hear(ws, "connection_ack")
                await hear(untouched, "connection_ack")
                connection = await asyncpg.connect(server.database.url)
                await connection.execute(f"{deleting} WHERE id = $1", parse_id(IdKind.USER, client.id))
                await connection.close()
                assert await closed_with(ws) == 4403
                await say(untouched, {"type": "ping"})
                await hear(untouched, "pong")
            # Found once, it is known to requests as well, before they would look.
            with pytest.raises(GraphQLErrors) as refused:
                await client.run("{ viewer { id } }")
            assert refused.value.code == "UNAUTHENTICATED"
