"""`make demo`: a question to a running server, its answer as it streams, a cut in the middle, the rest, the proof.

With a vendor's key in the environment (`OPENAI_API_KEY` and its like) the demo enters it as its own user's and asks the
real vendor: the server needs no key for that. It takes the key back at the end.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

_SESSION = "mutation { startAnonymousSession { token viewer { id } } }"
_SEND = """
mutation Ask($input: SendMessageInput!) {
  sendMessage(input: $input) { thread { id title } assistantMessage { id model { name } } }
}
"""
_READ = """
subscription Read($messageId: ID!, $after: Cursor) {
  messageStream(messageId: $messageId, after: $after) {
    __typename
    ... on MessageDelta { cursor kind text }
    ... on MessagePartAdded { cursor }
    ... on MessageReset { cursor message { text } }
    ... on MessageEnded { cursor message { status text durationMs usage { totalTokens } error { message } } }
  }
}
"""
_SET_KEY = "mutation Enter($input: SetProviderKeyInput!) { setProviderKey(input: $input) { __typename } }"
_DELETE_KEY = "mutation Forget($input: DeleteProviderKeyInput!) { deleteProviderKey(input: $input) { __typename } }"
_QUESTION = "What is a resumable stream?"
_CUT_AFTER_CHARS = 250
_DEADLINE = aiohttp.ClientTimeout(total=300)


class DemoError(Exception):
    """The server answered something else than the demo needs."""


async def run_demo(url: str, model: str | None, keys: Mapping[str, str]) -> int:
    """Run the demo against the server at `url`; 0 where everything was proved.

    Args:
        keys: by the name of their provider; the first model that they lead to is asked, unless one is named.
    """
    try:
        async with aiohttp.ClientSession(timeout=_DEADLINE) as http:
            session = (await _post(http, url, None, _SESSION))["startAnonymousSession"]
            _say(f"1. A new anonymous session: {session['viewer']['id']}")
            try:
                own = await _enter(http, url, session["token"], keys)
                return await _demo(http, url, session["token"], model or own)
            finally:
                for provider in keys:
                    await _post(http, url, session["token"], _DELETE_KEY, {"input": {"provider": provider}})
    except aiohttp.ClientConnectionError:
        print(f"No server answers at {url}. Start one with: make run", file=sys.stderr)
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
    return 1


async def _enter(http: aiohttp.ClientSession, url: str, token: str, keys: Mapping[str, str]) -> str | None:
    """Enter keys as the session's own; the first model that they lead to."""
    for provider, key in keys.items():
        await _post(http, url, token, _SET_KEY, {"input": {"provider": provider, "key": key}})
    if not keys:
        return None
    models = (await _post(http, url, token, "{ models { id name provider ownKey } }"))["models"]
    own = next((model for model in models if model["ownKey"]), None)
    if own is None:
        raise DemoError("The keys in the environment lead to no model of this server.")
    _say(f"   with a key for {', '.join(keys)}: {own['name']} through {own['provider']}")
    return str(own["id"])


async def _demo(http: aiohttp.ClientSession, url: str, token: str, model: str | None) -> int:
    asked = {"idempotencyKey": str(uuid.uuid4()), "text": _QUESTION, "modelId": model}
    turn = (await _post(http, url, token, _SEND, {"input": asked}))["sendMessage"]
    message_id = turn["assistantMessage"]["id"]
    _say(f"2. Asked “{_QUESTION}”; {turn['assistantMessage']['model']['name']} answers as {message_id}\n")

    before, cursor, over = await _read(http, url, token, message_id, None, cut_after=_CUT_AFTER_CHARS)
    goes_on = "it was over already" if over else "the answer goes on without us"
    _say(f"\n\n3. ✂ connection cut after {len(before)} characters; {goes_on}")
    _say(f"4. A new connection, with after: {cursor}\n")
    rest, _, ended = await _read(http, url, token, message_id, cursor)
    if ended is None:
        raise DemoError("The stream ended without MessageEnded.")
    message = ended["message"]
    _say(f"\n\n5. {message['status']} after {message['durationMs']} ms, {message['usage']['totalTokens']} tokens")
    if message["status"] != "COMPLETE":
        told = message["error"]["message"] if message["error"] else "It is not whole."
        raise DemoError(f"The answer ended as {message['status']}. {told}")
    if before + rest != message["text"]:
        raise DemoError("What was read is NOT what is stored. This is a defect; please report it.")
    _say(f"6. {len(before)} + {len(rest)} characters read = {len(message['text'])} stored, equal to the letter ✔")
    return 0


async def _read(
    http: aiohttp.ClientSession, url: str, token: str, message_id: str, after: str | None, cut_after: int | None = None
) -> tuple[str, str | None, dict[str, Any] | None]:
    """Read a stream to its end, or until so many characters came; the text, the last cursor, the terminal event.

    The cursor is that of the last event before the terminal one: reading from there always gives the end.
    """
    text, cursor = "", after
    async with http.ws_connect(url, protocols=("graphql-transport-ws",)) as ws:
        await ws.send_json({"type": "connection_init", "payload": {"authorization": f"Bearer {token}"}})
        variables = {"messageId": message_id, "after": after}
        async for frame in ws:
            message = orjson.loads(frame.data)
            match message["type"]:
                case "connection_ack":
                    subscribe = {"query": _READ, "variables": variables}
                    await ws.send_json({"id": "1", "type": "subscribe", "payload": subscribe})
                case "error":
                    raise DemoError(f"The server refused: {message['payload'][0]['message']}")
                case "complete":
                    break
                case "next":
                    event = message["payload"]["data"]["messageStream"]
                    if event["__typename"] == "MessageEnded":
                        return text, cursor, event
                    cursor = event["cursor"]
                    if event["__typename"] == "MessageDelta" and event["kind"] == "TEXT":
                        text += event["text"]
                        print(event["text"], end="", flush=True)
                    if cut_after is not None and len(text) >= cut_after:
                        return text, cursor, None
    raise DemoError("The connection ended before the answer did.")


async def _post(
    http: aiohttp.ClientSession, url: str, token: str | None, query: str, variables: dict[str, Any] | None = None
) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with http.post(url, json={"query": query, "variables": variables}, headers=headers) as response:
        answer = await response.json()
    if "errors" in answer:
        raise DemoError(f"The server refused: {answer['errors'][0]['message']}")
    data: dict[str, Any] = answer["data"]
    return data


def _say(text: str) -> None:
    print(text, flush=True)
