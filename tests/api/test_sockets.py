"""graphql-transport-ws, as its protocol document has it, and what a socket may not do."""

from __future__ import annotations

import asyncio
import gc
import struct
import time
import uuid
import weakref
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import orjson
import pytest

from graph.event_executor import EventExecutor
from server.graphql_socket import SocketTimes
from server.runtime import Server
from tests.client import PROTOCOL, READ, Client, connect, transport_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, ReasoningDelta, TextDelta, ToolCall


async def closed_with(ws: aiohttp.ClientWebSocketResponse) -> int | None:
    """The code with which the server closes the socket, whatever it says before."""
    async with asyncio.timeout(20):
        while True:
            frame = await ws.receive()
            if frame.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING):
                return ws.close_code


def socket(client: Client, **options: Any) -> Any:
    return client.http.ws_connect(client.url, protocols=(PROTOCOL,), **options)


async def say(ws: aiohttp.ClientWebSocketResponse, message: Any) -> None:
    await ws.send_str(orjson.dumps(message).decode())


async def hear(ws: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    message: dict[str, Any] = orjson.loads((await ws.receive(timeout=20)).data)
    return message


async def initialised(client: Client, ws: aiohttp.ClientWebSocketResponse) -> None:
    payload = {"authorization": f"Bearer {client.token}"} if client.token else {}
    await say(ws, {"type": "connection_init", "payload": payload})
    assert await hear(ws) == {"type": "connection_ack"}


def subscribe(query: str, operation_id: str = "1", **variables: Any) -> dict[str, Any]:
    return {"id": operation_id, "type": "subscribe", "payload": {"query": query, "variables": variables}}


NO_MESSAGES = [
    "null",
    "5",
    '""',
    "[]",
    "{}",
    "{",
    "\\",
    '{"type":5}',
    '{"type":"nope"}',
    '{"type":"start"}',
    "[" * 50_000,
]


@pytest.mark.parametrize("text", NO_MESSAGES, ids=lambda text: text[:10])
async def test_a_message_that_is_none_closes_with_4400(client: Client, text: str) -> None:
    async with socket(client) as ws:
        await ws.send_str(text)
        assert await closed_with(ws) == 4400


async def test_a_binary_message_closes_with_4400(client: Client) -> None:
    async with socket(client) as ws:
        await ws.send_bytes(b'{"type":"connection_init"}')
        assert await closed_with(ws) == 4400


@pytest.mark.parametrize("payload", [[], 5, "x"])
async def test_an_init_payload_that_is_no_object_closes_with_4400(client: Client, payload: Any) -> None:
    async with socket(client) as ws:
        await say(ws, {"type": "connection_init", "payload": payload})
        assert await closed_with(ws) == 4400


@pytest.mark.parametrize("operation_id", [None, 5, "", "x" * 201])
async def test_an_operation_without_an_id_closes_with_4400(client: Client, operation_id: Any) -> None:
    async with socket(client) as ws:
        await initialised(client, ws)
        await say(ws, subscribe("{ __typename }") | {"id": operation_id})
        assert await closed_with(ws) == 4400


@pytest.mark.parametrize("payload", [None, 5, [], {}, {"query": None}, {"query": "{ __typename }", "variables": []}])
async def test_an_operation_that_is_none_is_an_error_of_that_operation(client: Client, payload: Any) -> None:
    async with socket(client) as ws:
        await initialised(client, ws)
        await say(ws, {"id": "1", "type": "subscribe", "payload": payload})
        answer = await hear(ws)
        assert (answer["type"], answer["id"]) == ("error", "1")
        assert answer["payload"][0]["extensions"]["code"] == "BAD_USER_INPUT"
        await say(ws, subscribe("{ __typename }"))
        assert (await hear(ws))["type"] == "next"


async def test_subscribing_before_the_acknowledgement_closes_with_4401(client: Client) -> None:
    async with socket(client) as ws:
        await say(ws, subscribe("{ __typename }"))
        assert await closed_with(ws) == 4401


async def test_a_second_init_closes_with_4429(client: Client) -> None:
    async with socket(client) as ws:
        await initialised(client, ws)
        await say(ws, {"type": "connection_init"})
        assert await closed_with(ws) == 4429


async def test_an_id_in_use_closes_with_4409(client: Client) -> None:
    turn = await client.send("Id", model="hangs")
    async with socket(client) as ws:
        await initialised(client, ws)
        for _ in range(2):
            await say(ws, subscribe(READ, id=turn["assistantMessage"]["id"]))
        assert await closed_with(ws) == 4409
    await client.stop(turn["assistantMessage"]["id"])


async def test_another_subprotocol_closes_with_4406(client: Client) -> None:
    for protocols in ((), ("graphql-ws",), ("x",)):
        async with client.http.ws_connect(client.url, protocols=protocols) as ws:
            assert await closed_with(ws) == 4406


async def test_silence_instead_of_an_init_closes_with_4408(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.application.sockets.limits, "times", SocketTimes(init_seconds=0.05))
    async with socket(client) as ws:
        assert await closed_with(ws) == 4408


async def test_a_message_over_the_limit_closes_with_1009(client: Client) -> None:
    async with socket(client) as ws:
        await ws.send_str(" " * 1_100_000)
        assert await closed_with(ws) == 1009


def frame(opcode: int, payload: bytes, *, first_bits: int = 0) -> bytes:
    """A frame of a client, with a mask that changes nothing."""
    length = struct.pack("!B", 0x80 | len(payload)) if len(payload) < 126 else struct.pack("!BQ", 0xFF, len(payload))
    return struct.pack("!B", first_bits | opcode) + length + bytes(4) + payload


FIN, RSV1, CONTINUATION, TEXT, PING = 0x80, 0x40, 0, 1, 9
COMPRESSED = frame(TEXT, zlib.compress(bytes(10_000_000)), first_bits=FIN | RSV1)
HUGE = struct.pack("!BBQ", FIN | TEXT, 0xFF, 1 << 40) + bytes(4)
# What is sent first, what follows how often, and with what the socket is closed.
FLOODS = {
    "fragments without end": (frame(TEXT, b"x" * 100_000), frame(CONTINUATION, b"x" * 100_000), 200, 1009),
    "tiny fragments without end": (frame(TEXT, b"x"), frame(CONTINUATION, b"x") * 10_000, 200, 1009),
    "compressed, though nobody agreed to it": (COMPRESSED, b"", 0, 1002),
    "a frame that says it is huge": (HUGE, b"x" * 100_000, 1, 1009),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_frames_that_would_fill_the_memory_close_the_socket(client: Client, flood: str) -> None:
    first, following, times, code = FLOODS[flood]
    async with socket(client) as ws:
        await initialised(client, ws)
        transport = transport_of(ws)
        closing = asyncio.create_task(closed_with(ws))
        transport.write(first)
        for _ in range(times):
            if closing.done() or transport.is_closing():
                break
            transport.write(following)
            await asyncio.sleep(0.001)
        # Whoever is still sending may find the connection reset before they read why.
        assert await closing in (code, 1006)


async def test_a_flood_of_pings_keeps_no_other_from_its_answers(client: Client) -> None:
    async with socket(client) as flooding:
        await initialised(client, flooding)
        reading = asyncio.create_task(flooding.receive())
        for _ in range(50):
            transport_of(flooding).write(frame(PING, b"x" * 100, first_bits=FIN) * 500)
            assert await client.run("{ __typename }") == {"__typename": "Query"}
        reading.cancel()


async def test_ping_is_answered_with_its_payload_and_pong_is_taken(client: Client) -> None:
    async with socket(client) as ws:
        await say(ws, {"type": "ping"})
        assert await hear(ws) == {"type": "pong"}
        await say(ws, {"type": "pong", "payload": {}})
        await say(ws, {"type": "ping", "payload": {"a": 1}})
        assert await hear(ws) == {"type": "pong", "payload": {"a": 1}}


@pytest.mark.parametrize("depth", [100, 300, 900, 100_000])
async def test_a_deep_message_is_answered_or_closes_with_4400(client: Client, depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    for message in (
        f'{{"type":"ping","payload":{nested}}}',
        f'{{"type":"connection_init","payload":{nested}}}',
        f'{{"type":"subscribe","id":"1","payload":{{"query":"{{__typename}}","variables":{nested}}}}}',
    ):
        async with socket(client) as ws:
            if "subscribe" in message:
                await initialised(client, ws)
            await ws.send_str(message)
            async with asyncio.timeout(20):
                frame = await ws.receive()
            if frame.type is aiohttp.WSMsgType.TEXT:
                assert orjson.loads(frame.data)["type"] in ("pong", "connection_ack", "next")
            else:
                assert ws.close_code == 4400


async def test_nothing_is_left_of_operations_that_were_begun_and_completed(client: Client, server: Server) -> None:
    turn = await client.send("A thousand times", model="hangs")
    read = READ, turn["assistantMessage"]["id"]
    tasks = len(asyncio.all_tasks())
    async with socket(client) as ws:
        await initialised(client, ws)
        await say(ws, {"type": "complete", "id": "of nobody"})
        for n in range(1_000):
            await say(ws, subscribe(read[0], str(n), id=read[1]))
            await say(ws, {"type": "complete", "id": str(n)})
        await say(ws, subscribe("{ __typename }", "last"))
        while (await hear(ws))["id"] != "last":
            pass
        async with asyncio.timeout(10):
            while server.application.sockets.running or len(asyncio.all_tasks()) > tasks + 3:
                await asyncio.sleep(0.01)
    await client.stop(turn["assistantMessage"]["id"])


async def test_queries_and_mutations_run_on_a_socket_and_complete(client: Client) -> None:
    async with socket(client) as ws:
        await initialised(client, ws)
        await say(ws, subscribe("{ viewer { id } }"))
        assert await hear(ws) == {"id": "1", "type": "next", "payload": {"data": {"viewer": {"id": client.id}}}}
        assert await hear(ws) == {"id": "1", "type": "complete"}
        await say(ws, subscribe("{ viewer { id } }"))
        assert (await hear(ws))["type"] == "next"


async def test_a_mutation_on_a_socket_whose_answer_fails_is_made_once(client: Client) -> None:
    create = 'mutation { createProject(input: {name: "Once"}) { project { name threads(first: 0) { nodes { id } } } } }'
    heard = []
    async with socket(client) as ws:
        await initialised(client, ws)
        # The second time its document is known, and there is a plan for it.
        for _ in range(2):
            await say(ws, subscribe(create))
            heard.append(await hear(ws))
            assert await hear(ws) == {"id": "1", "type": "complete"}
    assert heard[0] == heard[1]
    (error,) = heard[0]["payload"]["errors"]
    assert (error["path"], error["extensions"]["field"]) == (["createProject", "project", "threads"], "first")
    projects = (await client.run("{ projects { nodes { name } } }"))["projects"]["nodes"]
    assert projects == [{"name": "Once"}] * 2


async def test_a_client_that_completes_frees_the_operation(client: Client, server: Server) -> None:
    turn = await client.send("Complete", model="hangs")
    async with socket(client) as ws:
        await initialised(client, ws)
        for _ in range(300):
            await say(ws, subscribe(READ, id=turn["assistantMessage"]["id"]))
            assert (await hear(ws))["type"] == "next"
            await say(ws, {"id": "1", "type": "complete"})
        await say(ws, {"id": "unknown", "type": "complete"})
        await say(ws, subscribe("{ __typename }", "2"))
        assert (await hear(ws))["id"] == "2"
    buffer = next(buffer for buffer in server.hub if buffer.message_id.hex in turn["assistantMessage"]["id"])
    async with asyncio.timeout(10):
        while buffer.readers_waiting:
            await asyncio.sleep(0.01)
    await client.stop(turn["assistantMessage"]["id"])


async def test_readers_on_one_socket_each_get_what_they_asked_for(client: Client) -> None:
    question = f"Asked {uuid.uuid4()}"
    queue = SCRIPTS.driven.queue(question)
    turn = await client.send(question, model="driven")
    asked = {
        "1": "__typename ... on MessageDelta { cursor kind text }",
        '"%b" \\ é🦉': "... { __typename } ... on MessageDelta { it: text }",
        "nothing of deltas": "... on MessagePartAdded { cursor } ... on MessageEnded { __typename }",
    }
    heard: dict[str, list[dict[str, Any]]] = {operation_id: [] for operation_id in asked}
    async with socket(client) as ws:
        await initialised(client, ws)
        for operation_id, selection in asked.items():
            query = f"subscription($id: ID!) {{ a: messageStream(messageId: $id) {{ {selection} }} }}"
            await say(ws, subscribe(query, operation_id, id=turn["assistantMessage"]["id"]))
        for said in (ReasoningDelta("hm"), ToolCall("c", "search", {"q": 1}), TextDelta("one "), TextDelta("zwei 🦉")):
            queue.put_nowait(said)
        queue.put_nowait(None)
        reading = set(asked)
        while reading:
            message = await hear(ws)
            if message["type"] == "complete":
                reading.remove(message["id"])
            else:
                heard[message["id"]].append(message["payload"]["data"]["a"])
    whole, renamed, without = heard.values()
    deltas = [event for event in whole if event["__typename"] == "MessageDelta"]
    assert all(list(event) == ["__typename", "cursor", "kind", "text"] for event in deltas)
    assert "".join(event["text"] for event in deltas) == "hmone zwei 🦉"
    assert [event["__typename"] for event in whole if event not in deltas] == ["MessagePartAdded", "MessageEnded"]
    assert "".join(event.get("it", "") for event in renamed) == "hmone zwei 🦉"
    assert all(list(event) == ["__typename", "it"] for event in renamed if event["__typename"] == "MessageDelta")
    assert [list(event) for event in without if event] == [["cursor"], ["__typename"]]
    assert without.count({}) >= 2


async def test_operations_on_one_socket_are_bounded(client: Client) -> None:
    turn = await client.send("Many", model="hangs-at-once")
    async with socket(client) as ws:
        await initialised(client, ws)
        for number in range(101):
            await say(ws, subscribe(READ, str(number), id=turn["assistantMessage"]["id"]))
        refusal = await hear(ws)
        assert (refusal["id"], refusal["type"]) == ("100", "error")
        assert refusal["payload"][0]["extensions"]["code"] == "RATE_LIMITED"
    await client.stop(turn["assistantMessage"]["id"])


@pytest.mark.parametrize("name", ["authorization", "Authorization", "AUTHORIZATION"])
async def test_the_token_is_taken_in_any_case_of_its_name(client: Client, name: str) -> None:
    async with client.socket(init={name: f"bearer {client.token}"}) as ws:
        assert (await hear(ws))["type"] == "connection_ack"
        await say(ws, subscribe("{ viewer { id } }"))
        assert (await hear(ws))["payload"]["data"]["viewer"]["id"] == client.id


async def test_the_token_may_stand_in_the_header_of_the_handshake(client: Client) -> None:
    async with client.socket(init=None, Authorization=f"Bearer {client.token}") as ws:
        assert (await hear(ws))["type"] == "connection_ack"
        await say(ws, subscribe("{ viewer { id } }"))
        assert (await hear(ws))["payload"]["data"]["viewer"]["id"] == client.id


@pytest.mark.parametrize(
    "payload",
    [
        {"authorization": "Bearer x"},
        {"authorization": ""},
        {"authorization": 5},
        {"authorization": "Bearer a", "Authorization": "Bearer b"},
        {"authorization": "Basic eDp5"},
    ],
)
async def test_a_bad_token_closes_with_4403(client: Client, payload: dict[str, Any]) -> None:
    async with client.socket(init=payload) as ws:
        assert await closed_with(ws) == 4403


async def test_a_live_socket_ends_with_its_token_and_a_new_one_resumes(client: Client) -> None:
    turn = await client.send("Expire", model="slow")
    now = int(time.time())
    claims = {"iss": "threadgraph", "sub": client.id, "iat": now, "exp": now + 2}
    async with client.socket(init={"authorization": "Bearer " + jwt.encode(claims, "s" * 32, "HS256")}) as ws:
        assert (await hear(ws))["type"] == "connection_ack"
        await say(ws, subscribe(READ, id=turn["assistantMessage"]["id"]))
        event = (await hear(ws))["payload"]["data"]["messageStream"]
        assert await closed_with(ws) == 4403
    async with client.reading(turn["assistantMessage"]["id"], event["cursor"]) as subscription:
        assert (await subscription.next()) is not None
    await client.stop(turn["assistantMessage"]["id"])


BAD_TOKENS: list[tuple[str, dict[str, Any], str, str]] = [
    ("expired", {"exp": 1}, "s" * 32, "HS256"),
    ("another key", {}, "t" * 32, "HS256"),
    ("no exp", {"exp": None}, "s" * 32, "HS256"),
    ("no sub", {"sub": None}, "s" * 32, "HS256"),
    ("no iat", {"iat": None}, "s" * 32, "HS256"),
    ("another issuer", {"iss": "x"}, "s" * 32, "HS256"),
    ("sub is no id", {"sub": "user_x"}, "s" * 32, "HS256"),
    ("sub of a thread", {"sub": "thread_" + "0" * 32}, "s" * 32, "HS256"),
    ("another algorithm", {}, "s" * 64, "HS512"),
    ("iat to come", {"iat": 2**33}, "s" * 32, "HS256"),
]


@pytest.mark.parametrize(("name", "change", "key", "algorithm"), BAD_TOKENS, ids=[row[0] for row in BAD_TOKENS])
async def test_a_token_that_is_not_ours_is_refused(
    client: Client, name: str, change: dict[str, Any], key: str, algorithm: str
) -> None:
    now = int(time.time())
    claims = {"iss": "threadgraph", "sub": client.id, "iat": now, "exp": now + 600} | change
    claims = {claim: value for claim, value in claims.items() if value is not None}
    client.token = jwt.encode(claims, key, algorithm)
    _, answer = await client.post("{ viewer { id } }")
    assert answer["errors"][0]["extensions"]["code"] == "UNAUTHENTICATED"


@pytest.mark.parametrize("token", ["", "a.b.c", "é", "x" * 8_000, "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."])
async def test_text_that_is_no_token_is_refused(nobody: Client, token: str) -> None:
    _, answer = await nobody.post("{ viewer { id } }", Authorization=f"Bearer {token}")
    assert answer["errors"][0]["extensions"]["code"] == "UNAUTHENTICATED"


async def test_a_header_of_100_kilobytes_is_refused(nobody: Client) -> None:
    headers = {"Authorization": f"Bearer {'x' * 100_000}", "Content-Type": "application/json"}
    async with nobody.http.post(nobody.url, data=b"{}", headers=headers) as response:
        assert response.status == 400


async def test_a_header_sent_twice_is_refused(client: Client) -> None:
    headers = [("Authorization", f"Bearer {client.token}")] * 2 + [("Content-Type", "application/json")]
    body = b'{"query":"{ viewer { id } }"}'
    async with client.http.post(client.url, data=body, headers=headers) as response:
        assert (await response.json())["errors"][0]["extensions"]["code"] == "UNAUTHENTICATED"


async def test_who_was_sent_away_by_a_restart_does_not_get_in_again(postgres_url: str, tmp_path: Path) -> None:
    own = Server(test_settings(await make_database(postgres_url), tmp_path), providers=SCRIPTS.models())
    await own.start()
    try:
        async with connect(own.address) as client:
            await client.sign_in()
            async with client.socket() as ws:
                await ws.receive()
                await own.drain()
                closed = await ws.receive()
                assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1012)
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                async with client.socket():
                    pass
            assert refusal.value.status == 503
    finally:
        await own.close()


async def test_sockets_of_a_process_are_bounded(postgres_url: str, tmp_path: Any) -> None:
    server = Server(test_settings(await make_database(postgres_url), tmp_path, max_sockets=2))
    await server.start()
    try:
        async with connect(server.address) as client:
            async with socket(client), socket(client):
                with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                    await socket(client)
            async with asyncio.timeout(10):
                while len(server.application.sockets):
                    await asyncio.sleep(0.01)
            async with socket(client) as ws:
                await initialised(client, ws)
    finally:
        await server.drain()
        await server.close()


async def test_a_close_waits_for_its_answer_so_that_no_client_loses_the_code(postgres_url: str, tmp_path: Any) -> None:
    times = SocketTimes(init_seconds=0.05, close_seconds=60)
    server = Server(test_settings(await make_database(postgres_url), tmp_path), socket_times=times)
    await server.start()
    try:
        async with connect(server.address) as client:
            async with socket(client, autoclose=False) as ws:
                closed = await ws.receive()
                assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 4408)
                await client.run("{ __typename }")
                # Were it cut already, what is sent now would reset the connection, and a code not yet read be lost.
                assert len(server.application.sockets) == 1
                await say(ws, {"type": "connection_init"})
                await client.run("{ __typename }")
                assert len(server.application.sockets) == 1
                await ws.close()
            async with asyncio.timeout(10):
                while len(server.application.sockets):
                    await asyncio.sleep(0.01)
    finally:
        await server.drain()
        await server.close()


async def test_sockets_of_a_user_are_bounded(postgres_url: str, tmp_path: Any) -> None:
    server = Server(test_settings(await make_database(postgres_url), tmp_path, max_sockets_per_user=2))
    await server.start()
    try:
        async with connect(server.address) as client, connect(server.address) as other:
            for one in (client, other):
                await one.sign_in()
            async with socket(client) as first, socket(client) as second, socket(client) as third:
                for ws in (first, second):
                    await initialised(client, ws)
                await say(third, {"type": "connection_init", "payload": {"authorization": f"Bearer {client.token}"}})
                closed = await third.receive()
                assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 4429)
                # Another user, and somebody without a token, have their own.
                async with socket(other) as ws:
                    await initialised(other, ws)
                async with socket(client) as ws:
                    await say(ws, {"type": "connection_init"})
                    assert await hear(ws) == {"type": "connection_ack"}
            async with asyncio.timeout(10):
                while len(server.application.sockets):
                    await asyncio.sleep(0.01)
            async with socket(client) as first, socket(client) as second:
                for ws in (first, second):
                    await initialised(client, ws)
    finally:
        await server.drain()
        await server.close()


async def test_a_reader_that_neither_reads_nor_answers_pings_is_let_go_and_can_resume(
    postgres_url: str, tmp_path: Any
) -> None:
    own = Server(
        test_settings(await make_database(postgres_url), tmp_path),
        providers=SCRIPTS.models(),
        socket_times=SocketTimes(heartbeat_seconds=0.3, stall_seconds=1.0, close_seconds=0.3),
    )
    await own.start()
    try:
        async with connect(own.address) as client:
            await client.sign_in()
            question = "A closed window"
            turn = await client.send(question, model="driven")
            ws = await socket(client)
            await initialised(client, ws)
            await say(ws, subscribe(READ, id=turn["assistantMessage"]["id"]))
            transport_of(ws).pause_reading()
            for _ in range(500):
                SCRIPTS.driven.queue(question).put_nowait(TextDelta("x" * 1_000))
            async with asyncio.timeout(20):
                while len(own.application.sockets):
                    await asyncio.sleep(0.01)
            SCRIPTS.driven.queue(question).put_nowait(None)
            assert (await client.finish(turn["assistantMessage"]["id"]))["text"] == "x" * 500_000
            transport_of(ws).abort()
    finally:
        await own.drain()
        await own.close()


@pytest.mark.parametrize("cut", [False, True], ids=["closed", "cut"])
async def test_a_socket_that_has_ended_is_freed_without_the_garbage_collector(client: Client, cut: bool) -> None:
    def held() -> int:
        kinds = ("_Socket", "WebSocketResponse", "EventExecutor", "Context")
        return sum(type(one).__name__ in kinds for one in gc.get_objects() if type(one).__module__ != "_contextvars")

    async def follow() -> None:
        async with client.subscribe("subscription { changes { __typename } }", {}) as subscription:
            await subscription.next()
            if cut:
                subscription.abort()

    await follow()
    gc.collect()
    gc.disable()
    try:
        before = held()
        for _ in range(3):
            await follow()
        async with asyncio.timeout(10):
            while held() > before:
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


async def test_a_message_is_not_held_until_the_next_one_comes(client: Client) -> None:
    text = orjson.dumps({"type": "ping", "payload": {"much": "x" * 100_000}}).decode()

    def held() -> bool:
        return any(type(one).__name__.startswith("WSMessage") and one[1] == text for one in gc.get_objects())

    async with client.socket() as ws:
        await hear(ws)
        await ws.send_str(text)
        assert (await hear(ws))["type"] == "pong"
        async with asyncio.timeout(10):
            while held():
                await asyncio.sleep(0.01)


async def test_an_operation_by_post_is_freed_without_the_garbage_collector(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "{ freed: viewer { id } threads(first: 5) { nodes { id title } } models { id } }"
    made: list[weakref.ref[EventExecutor]] = []
    build = EventExecutor.build.__func__  # type: ignore[attr-defined]

    def watched(kind: type[EventExecutor], *args: Any, **more: Any) -> Any:
        executor = build(kind, *args, **more)
        made.append(weakref.ref(executor))
        return executor

    monkeypatch.setattr(EventExecutor, "build", classmethod(watched))
    gc.disable()
    try:
        await client.run(query)
        # The answer is on its way before all that made it is left.
        async with asyncio.timeout(10):
            while any(executor() is not None for executor in made):
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
    assert made, "a document that is seen for the first time goes the long way"
