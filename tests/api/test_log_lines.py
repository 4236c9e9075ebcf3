"""What the log says of requests: ids by which a line is found again, never what a user wrote or signed in with."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

import pytest

import server.operations
from providers.base import FailureCode, ProviderFailure
from server.runtime import Server
from tests.client import Client, GraphQLErrors
from tests.scripts import SCRIPTS, TextDelta
from tests.unit.test_logs import server_log


def lines_of(written: Any) -> list[dict[str, Any]]:
    """The lines of a log in JSON."""
    return [json.loads(line) for line in written.getvalue().splitlines()]


async def test_a_request_has_an_id_its_own_or_a_new_one(client: Client) -> None:
    for sent, kept in (
        ("0af7651916cd43dd8448eb211c80319c", True),
        ("a0b1/Trace:7=", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("with blank", False),
        ("ümlaut", False),
        ("", False),
    ):
        async with client.http.get(f"{client.address}/healthz", headers={"X-Request-Id": sent}) as response:
            answered = response.headers["X-Request-Id"]
        assert (answered == sent) is kept
        assert kept or re.fullmatch(r"[0-9a-f]{16}", answered)
    async with client.http.get(f"{client.address}/no/such/path") as response:
        assert re.fullmatch(r"[0-9a-f]{16}", response.headers["X-Request-Id"]), "a refusal has one, too"


async def test_an_operation_is_one_line_with_its_ids_when_debugging(client: Client) -> None:
    request_id = uuid.uuid4().hex
    with server_log("DEBUG", "JSON") as written:
        await client.post("query LogMe { viewer { id } }", None, **{"X-Request-Id": request_id})
    (line,) = [line for line in lines_of(written) if line.get("request_id") == request_id]
    assert line["message"] == "operation"
    assert (line["operation"], line["operation_type"], line["outcome"]) == ("LogMe", "query", "ok")
    assert line["user_id"].replace("-", "") == client.id.split("_")[1]
    assert 0 <= line["seconds"] < 30


async def test_the_end_of_an_answer_names_the_request_that_asked_for_it(client: Client) -> None:
    request_id = uuid.uuid4().hex
    client.http.headers["X-Request-Id"] = request_id
    with server_log("INFO", "JSON") as written:
        turn = await client.send("Who asked?")
        await client.finish(turn["assistantMessage"]["id"])
    (line,) = [line for line in lines_of(written) if line["message"] == "answer ended"]
    assert line["request_id"] == request_id
    assert line["message_id"].replace("-", "") == turn["assistantMessage"]["id"].split("_")[1]
    assert line["thread_id"].replace("-", "") == turn["thread"]["id"].split("_")[1]
    assert line["status"] == "COMPLETE"


async def test_a_slow_operation_is_a_warning_and_a_subscription_never_is(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.operations, "SLOW_SECONDS", 0.0)
    with server_log("WARNING", "JSON") as written:
        turn = await client.send("Slowly")
        await client.finish(turn["assistantMessage"]["id"])
    lines = [line for line in lines_of(written) if line["logger"] == "server.operations"]
    assert [(line["message"], line["operation_type"]) for line in lines] == [("slow operation", "mutation")]


async def test_a_defect_is_found_by_the_id_of_its_request(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(type(server.application._http._services.threads), "find", fail)
    with server_log("ERROR", "JSON") as written:
        _, body = await client.post('query Broken { thread(id: "thread_' + "0" * 32 + '") { id } }')
    (line,) = lines_of(written)
    assert body["errors"][0]["extensions"]["errorId"] in line["message"]
    assert line["request_id"]
    assert "RuntimeError: a defect" in line["exception"]


@pytest.mark.parametrize("style", ["TEXT", "JSON"])
async def test_nothing_that_a_user_wrote_or_signed_in_with_is_logged_even_for_debugging(
    client: Client, style: str
) -> None:
    canary = f"canary-{uuid.uuid4().hex}"
    question = f"My question has a {canary}"
    queue = SCRIPTS.driven.queue(question)
    with server_log("DEBUG", style) as written:
        turn = await client.send(question, model="driven")
        message_id = turn["assistantMessage"]["id"]
        queue.put_nowait(TextDelta(f"An answer with the {canary}, too. "))
        async with client.reading(message_id) as reading:
            await reading.next()
        queue.put_nowait(ProviderFailure(FailureCode.PROVIDER_UNAVAILABLE, f"It said {canary}"))
        await client.finish(message_id)
        await client.run(
            "mutation($id: ID!, $title: String!) "
            "{ renameThread(input: {threadId: $id, title: $title}) { thread { id } } }",
            {"id": turn["thread"]["id"], "title": canary},
        )
        for query, variables in (
            (f'{{ thread(id: "{canary}") {{ id }} }}', None),
            (f'query Search {{ search(query: "{canary}") {{ nodes {{ __typename }} }} }}', None),
            (f'{{ nothing(text: "{canary}") }}', None),
            (f"{{ {canary} ", None),
            ("query($id: ID!) { thread(id: $id) { id } }", {"id": {"a": canary}}),
        ):
            await client.post(query, variables)
        async with client.http.get(client.address + f"/{canary}?token={canary}") as response:
            assert response.status == 404
        token, client.token = client.token, f"x.{canary}.y"
        with pytest.raises((GraphQLErrors, ConnectionError)):
            await client.read(message_id)
        client.token = token
        # The tasks that these began have ended by when the next operation has been answered twice.
        for _ in range(2):
            await client.run("{ viewer { id } }")
            await asyncio.sleep(0)
    logged = written.getvalue()
    assert "answer ended" in logged
    assert "operation" in logged
    assert canary not in logged
    assert str(client.token) not in logged
