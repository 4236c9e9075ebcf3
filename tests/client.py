"""A GraphQL client for tests: real HTTP, real WebSockets, every wait with a deadline."""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
import orjson

DEADLINE_SECONDS = 30.0
PROTOCOL = "graphql-transport-ws"

MESSAGE = """
fragment M on Message {
  id role status text
  parts {
    __typename
    ... on TextPart { text } ... on ReasoningPart { text } ... on ToolPart { callId name arguments result }
    ... on SourcePart { url title }
    ... on FilePart { name contentType size attachment { id } }
  }
  model { id } usage { promptTokens completionTokens reasoningTokens cachedTokens totalTokens estimated }
  error { code message retryAfter } durationMs createdAt updatedAt
}
"""
TURN = "{ thread { id title } userMessage { id text } assistantMessage { id status } }"
SEND = f"mutation($input: SendMessageInput!) {{ sendMessage(input: $input) {TURN} }}"
EDIT = f"mutation($input: EditMessageInput!) {{ editMessage(input: $input) {TURN} }}"
RETRY = f"mutation($input: RetryMessageInput!) {{ retryMessage(input: $input) {TURN} }}"
STOP = MESSAGE + "mutation($id: ID!) { stopMessage(input: {messageId: $id}) { message { ...M } } }"
SELECT = "mutation($id: ID!) { selectMessage(input: {messageId: $id}) { thread { id } message { id } } }"
ATTACHMENT = "id name contentType size state tokens pages width height createdAt url"
CREATE_UPLOAD = (
    "mutation($input: CreateUploadInput!) { createUpload(input: $input) "
    f"{{ attachment {{ {ATTACHMENT} }} url method headers {{ name value }} expiresAt }} }}"
)
COMPLETE_UPLOAD = (
    f"mutation($id: ID!) {{ completeUpload(input: {{attachmentId: $id}}) {{ attachment {{ {ATTACHMENT} }} }} }}"
)
READ = (
    MESSAGE
    + """
subscription($id: ID!, $after: Cursor) {
  messageStream(messageId: $id, after: $after) {
    __typename
    ... on MessageDelta { cursor partIndex kind text }
    ... on MessagePartAdded { cursor partIndex part {
      __typename ... on ToolPart { callId name arguments } ... on FilePart { name contentType size attachment { id } }
    } }
    ... on MessageReset { cursor message { ...M } }
    ... on MessageEnded { cursor message { ...M } }
  }
}
"""
)


class GraphQLErrors(Exception):  # noqa: N818 - several
    """A response had errors."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(str(errors))
        self.errors = errors

    @property
    def code(self) -> str:
        """The code of the first error."""
        return str(self.errors[0]["extensions"]["code"])

    @property
    def extensions(self) -> dict[str, Any]:
        """The extensions of the first error."""
        found: dict[str, Any] = self.errors[0]["extensions"]
        return found


class Subscription:
    """One operation on one socket of its own, from its acknowledgement on."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    def abort(self) -> None:
        """Cut the connection as a lost network does: without a word."""
        transport_of(self.ws).abort()

    async def next(self) -> dict[str, Any] | None:
        """The next event's payload; None when the operation is complete.

        Raises:
            GraphQLErrors: the operation ended with errors.
            ConnectionError: the socket was closed; the text is its code.
        """
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                frame = await self.ws.receive()
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    raise ConnectionError(str(self.ws.close_code))
                message = orjson.loads(frame.data)
                match message["type"]:
                    case "next":
                        payload: dict[str, Any] = message["payload"]
                        if "errors" in payload:
                            raise GraphQLErrors(payload["errors"])
                        return payload
                    case "error":
                        raise GraphQLErrors(message["payload"])
                    case "complete":
                        return None

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The events of `messageStream` until it completes."""
        while (payload := await self.next()) is not None:
            event: dict[str, Any] = payload["data"]["messageStream"]
            yield event


class Client:
    """One caller. Without `sign_in` it has no token."""

    def __init__(self, http: aiohttp.ClientSession, address: str) -> None:
        self.http = http
        self.address = address
        self.token: str | None = None
        self.id = ""

    @property
    def url(self) -> str:
        """The GraphQL endpoint."""
        return f"{self.address}/graphql"

    async def sign_in(self) -> None:
        """Become a new anonymous user."""
        data = await self.run("mutation { startAnonymousSession { token viewer { id } } }")
        self.token = data["startAnonymousSession"]["token"]
        self.id = data["startAnonymousSession"]["viewer"]["id"]

    async def sign_in_with(self, token: str) -> None:
        """Become whom a token of an issuer stands for."""
        self.token = token
        self.id = (await self.run("{ viewer { id } }"))["viewer"]["id"]

    async def post(
        self, query: str, variables: dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Send an operation by POST; status and body."""
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        body = orjson.dumps({"query": query, "variables": variables})
        headers.setdefault("Content-Type", "application/json")
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            self.http.post(self.url, data=body, headers=headers) as response,
        ):
            return response.status, orjson.loads(await response.read())

    async def run(self, query: str, variables: dict[str, Any] | None = None) -> dict[str, Any]:
        """The data of an operation sent by POST.

        Raises:
            GraphQLErrors: the response had errors.
        """
        _, body = await self.post(query, variables)
        if "errors" in body:
            raise GraphQLErrors(body["errors"])
        data: dict[str, Any] = body["data"]
        return data

    async def send(self, text: str, *, model: str = "two-words", **more: Any) -> dict[str, Any]:
        """`sendMessage` with a new key, unless one is given."""
        given = {"idempotencyKey": str(uuid.uuid4()), "text": text, "modelId": model} | more
        turn: dict[str, Any] = (await self.run(SEND, {"input": given}))["sendMessage"]
        return turn

    async def edit(self, message_id: str, text: str, *, model: str = "two-words", **more: Any) -> dict[str, Any]:
        """`editMessage` with a new key, unless one is given."""
        given = {"idempotencyKey": str(uuid.uuid4()), "messageId": message_id, "text": text, "modelId": model} | more
        turn: dict[str, Any] = (await self.run(EDIT, {"input": given}))["editMessage"]
        return turn

    async def retry(self, message_id: str, *, model: str = "two-words", **more: Any) -> dict[str, Any]:
        """`retryMessage` with a new key, unless one is given."""
        given = {"idempotencyKey": str(uuid.uuid4()), "messageId": message_id, "modelId": model} | more
        turn: dict[str, Any] = (await self.run(RETRY, {"input": given}))["retryMessage"]
        return turn

    async def run_with_file(
        self, query: str, content: bytes, *, name: str = "file.txt", content_type: str = "text/plain", **headers: str
    ) -> dict[str, Any]:
        """The data of an operation with the variable `file`, sent as a form.

        Raises:
            GraphQLErrors: the response had errors.
        """
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("operations", orjson.dumps({"query": query, "variables": {"file": None}}).decode())
        form.add_field("map", '{"0": ["variables.file"]}')
        form.add_field("0", io.BytesIO(content), filename=name, content_type=content_type)
        headers.setdefault("GraphQL-Preflight", "1")
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            self.http.post(self.url, data=form, headers=headers) as response,
        ):
            body: dict[str, Any] = orjson.loads(await response.read())
        if "errors" in body:
            raise GraphQLErrors(body["errors"])
        data: dict[str, Any] = body["data"]
        return data

    async def upload(self, content: Any, name: str = "file.txt", **headers: str) -> dict[str, Any]:
        """`POST /attachments`; the attachment.

        Raises:
            GraphQLErrors: the response had errors.
        """
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            self.http.post(
                f"{self.address}/attachments", params={"name": name}, data=content, headers=headers
            ) as response,
        ):
            body: dict[str, Any] = orjson.loads(await response.read())
        if "errors" in body:
            raise GraphQLErrors(body["errors"])
        return body

    async def upload_directly(
        self, content: bytes, *, name: str = "file.txt", content_type: str = "text/plain", size: int | None = None
    ) -> str:
        """`createUpload`, and the content sent where it says; the id of the attachment, which is not complete yet."""
        given = {"name": name, "contentType": content_type, "size": len(content) if size is None else size}
        upload = (await self.run(CREATE_UPLOAD, {"input": given}))["createUpload"]
        headers = {header["name"]: header["value"] for header in upload["headers"]}
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            self.http.request(upload["method"], upload["url"], data=content, headers=headers) as response,
        ):
            assert response.status in (200, 204), await response.text()
        attachment_id: str = upload["attachment"]["id"]
        return attachment_id

    async def complete_upload(self, attachment_id: str) -> dict[str, Any]:
        """`completeUpload`; the attachment."""
        completed: dict[str, Any] = (await self.run(COMPLETE_UPLOAD, {"id": attachment_id}))["completeUpload"]
        attachment: dict[str, Any] = completed["attachment"]
        return attachment

    async def stop(self, message_id: str) -> dict[str, Any]:
        """`stopMessage`; the message."""
        message: dict[str, Any] = (await self.run(STOP, {"id": message_id}))["stopMessage"]["message"]
        return message

    async def message(self, message_id: str) -> dict[str, Any]:
        """One message, whole."""
        query = MESSAGE + "query($id: ID!) { message(id: $id) { ...M } }"
        message: dict[str, Any] = (await self.run(query, {"id": message_id}))["message"]
        return message

    async def path(self, thread_id: str) -> list[dict[str, Any]]:
        """The active path of a thread, at most 100 messages."""
        query = MESSAGE + "query($id: ID!) { thread(id: $id) { messages(first: 100) { nodes { ...M } } } }"
        nodes: list[dict[str, Any]] = (await self.run(query, {"id": thread_id}))["thread"]["messages"]["nodes"]
        return nodes

    @asynccontextmanager
    async def socket(self, *, init: Any = ..., **headers: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A socket with `connection_init` sent (its payload: the token, unless given), not yet acknowledged."""
        if init is ...:
            init = {"authorization": f"Bearer {self.token}"} if self.token else None
        async with self.http.ws_connect(self.url, protocols=(PROTOCOL,), headers=headers, max_msg_size=0) as ws:
            message = {"type": "connection_init"} | ({} if init is None else {"payload": init})
            await ws.send_str(orjson.dumps(message).decode())
            yield ws

    @asynccontextmanager
    async def subscribe(self, query: str, variables: dict[str, Any]) -> AsyncIterator[Subscription]:
        """An operation on a socket of its own."""
        async with self.socket() as ws:
            async with asyncio.timeout(DEADLINE_SECONDS):
                acknowledgement = await ws.receive()
            if acknowledgement.type is not aiohttp.WSMsgType.TEXT:
                raise ConnectionError(str(ws.close_code))
            subscribe = {"id": "1", "type": "subscribe", "payload": {"query": query, "variables": variables}}
            await ws.send_str(orjson.dumps(subscribe).decode())
            yield Subscription(ws)

    def reading(self, message_id: str, after: str | None = None) -> Any:
        """`messageStream` on a socket of its own: an async context manager of a Subscription."""
        return self.subscribe(READ, {"id": message_id, "after": after})

    async def read(self, message_id: str, after: str | None = None) -> list[dict[str, Any]]:
        """All events of a stream from a cursor to its completion."""
        async with self.reading(message_id, after) as subscription:
            return [event async for event in subscription.events()]

    async def finish(self, message_id: str) -> dict[str, Any]:
        """The message when it has ended."""
        message: dict[str, Any] = (await self.read(message_id))[-1]["message"]
        return message


def transport_of(ws: aiohttp.ClientWebSocketResponse) -> asyncio.Transport:
    """What carries a socket."""
    connection = ws._response.connection
    assert connection is not None
    # uvloop's transports are no subclasses of asyncio's.
    return cast("asyncio.Transport", connection.transport)


def text_of(events: list[dict[str, Any]], kind: str = "TEXT") -> str:
    """The text that a reader of these events holds."""
    return "".join(event["text"] for event in events if event["__typename"] == "MessageDelta" and event["kind"] == kind)


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Client]:
    """A caller without a token."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield Client(http, address)
