"""GraphQL over WebSocket: the server's side of `graphql-transport-ws`.

Follows github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md. Ours, and not Strawberry's handler, because of what a
token stream needs of it: a context for each operation, errors in our shape, a socket that ends when its token does, a
drain that tells clients to come back, and no work for an event beside its encoding.

Close codes: 4400 message that is none, 4401 subscribe before the acknowledgement, 4403 token refused or expired, or its
user is no more (clients retry with a new one), 4406 another subprotocol, 4408 no connection_init in time, 4409 id in
use, 4420 the client does not read (it may come back), 4429 second connection_init, 1012 the server restarts (clients
reconnect at once), 1013 the token cannot be verified now.

A client keeps its socket and what runs on it by sending a new token in time, as `authorization` in the payload of a
`ping`; the payload of the `pong` says in `expiresAt` until when the socket lives now (docs/identity.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as sockets
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
from aiohttp import ClientConnectionResetError, WSCloseCode, WSMessage, WSMsgType, web
from aiohttp.abc import AbstractStreamWriter
from strawberry.types import ExecutionResult
from strawberry.types.execution import PreExecutionError

from graph.context import Context, Services
from graph.deltas import DeltaPlan
from graph.errors import code_error, format_errors
from graph.schema import Schema
from models.database import DatabaseUnavailableError
from server.delta_sender import DeltaSender
from server.graphql_http import BadRequestError, GraphQLRequest, error_response, is_request_error, result_payload
from server.identity import viewer_of_headers, viewer_of_payload
from server.operations import Operation, Operations
from services.errors import ErrorCode, UnauthenticatedError, UnavailableError
from services.viewer import Viewer

log = logging.getLogger(__name__)

PROTOCOL = "graphql-transport-ws"
NOT_READING = 4420
# What a socket whose client does not read costs: so much here and the frame that went over it, and so much of what was
# not sent yet in the kernel, which without that limit takes megabytes. What else there is to tell is not made.
_WAITING_BYTES = 65_536
_UNSENT_BYTES = 16_384
# Not known to every system.
_NOTSENT_LOWAT: int | None = getattr(sockets, "TCP_NOTSENT_LOWAT", None)
_LONGEST_TIMER_SECONDS = 86_400.0
_CLOSES = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED)


@dataclass(frozen=True, slots=True)
class SocketTimes:
    """How long clients are waited for.

    Attributes:
        init_seconds: for `connection_init`.
        heartbeat_seconds: a peer that vanished without a FIN is found by a ping without a pong: after at most 1.5 times
            this.
        stall_seconds: a client that has taken nothing for as long of what waits for it, and not for twice as long, is
            let go.
        close_seconds: for the answer to a close, and for what was sent before to leave. Then the connection is cut.
        watch_seconds: how long a socket can outlive the deletion of its user by another process; by this one it ends at
            once.
    """

    init_seconds: float = 10.0
    heartbeat_seconds: float = 25.0
    stall_seconds: float = 15.0
    close_seconds: float = 5.0
    watch_seconds: float = 15.0


class SocketLimits:
    """What sockets may take of a process."""

    __slots__ = ("max_message_bytes", "max_operations", "max_sockets", "max_sockets_of_user", "times")

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_operations: int,
        max_sockets: int,
        max_sockets_of_user: int,
        times: SocketTimes,
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self.max_operations = max_operations
        self.max_sockets = max_sockets
        self.max_sockets_of_user = max_sockets_of_user
        self.times = times


class GraphQLSockets:
    """The handler of WebSockets at /graphql, and the register of those that are open."""

    def __init__(self, schema: Schema, services: Services, limits: SocketLimits, operations: Operations) -> None:
        self.schema = schema
        self.services = services
        self.limits = limits
        self.operations = operations
        # For metrics: sockets that were let go, `unread` or `silent`.
        self.let_go: Counter[str] = Counter()
        self._open: set[_Socket] = set()
        self._of_users: Counter[UUID] = Counter()
        self._watching: asyncio.Task[None] | None = None
        self._sent_away = False
        services.identities.when_gone(self._close_gone)

    def start(self) -> None:
        """Begin to watch whether the users behind the sockets are still there."""
        self._watching = asyncio.create_task(self._watch(), name="socket watch")

    async def stop(self) -> None:
        """Watch no more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def running(self) -> int:
        """How many operations run on all of them."""
        return sum(socket.running for socket in self._open)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Serve one socket until it closes. Its origin has been checked."""
        if self._sent_away:
            return error_response(503, ErrorCode.UNAVAILABLE, "The server restarts; try again.")
        if len(self._open) >= self.limits.max_sockets:
            return error_response(503, ErrorCode.UNAVAILABLE, "Too many sockets are open here; try again.")
        # No compression: its windows cost more memory a socket than a token stream is long. Whether there is room for a
        # frame is asked before it is made, so the writer has no limit of its own; for the same reason pings are
        # answered by us.
        ws = web.WebSocketResponse(
            protocols=(PROTOCOL,),
            timeout=self.limits.times.close_seconds,
            autoping=False,
            heartbeat=self.limits.times.heartbeat_seconds,
            max_msg_size=self.limits.max_message_bytes,
            compress=False,
            writer_limit=sys.maxsize,
        )
        writer = await ws.prepare(request)
        # They are sent, and would be held for as long as the socket.
        ws.headers.clear()
        _limit_what_waits(request.transport)
        if ws.ws_protocol != PROTOCOL:
            await ws.close(code=4406, message=b"Subprotocol not acceptable")
            return ws
        socket = _Socket(self, ws, request, writer)
        self._open.add(socket)
        try:
            await socket.serve()
        finally:
            self._open.discard(socket)
            if socket.viewer is not None:
                self._leave(socket.viewer.id)
            self._free(request.transport)
            _untie(request, ws)
        return ws

    def admit(self, user_id: UUID) -> bool:
        """Count a socket as a user's, until it ends; False where the user has as many as are allowed."""
        if self._of_users[user_id] >= self.limits.max_sockets_of_user:
            return False
        self._of_users[user_id] += 1
        return True

    def _leave(self, user_id: UUID) -> None:
        self._of_users[user_id] -= 1
        if not self._of_users[user_id]:
            del self._of_users[user_id]

    def _free(self, transport: asyncio.Transport | None) -> None:
        """Nobody serves this connection any more: see that it ends, though its peer may never take what it was sent."""
        if transport is not None and transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(self.limits.times.close_seconds, _cut, transport)

    async def close_all(self) -> None:
        """Tell every client that the server goes away and that it should come back, and open no socket any more.

        Who came back at once would be sent away a second time, or lose the connection without a word.
        """
        self._sent_away = True
        sockets = list(self._open)
        for socket in sockets:
            socket.close_soon(WSCloseCode.SERVICE_RESTART, "The server restarts")
        if serving := [socket.serving for socket in sockets if socket.serving is not None]:
            await asyncio.wait(serving, timeout=2 * self.limits.times.close_seconds)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.limits.times.watch_seconds)
            present = {socket.viewer.id for socket in self._open if socket.viewer is not None}
            if not present:
                continue
            try:
                living = await self.services.identities.living(present)
            except DatabaseUnavailableError:
                continue
            except Exception:
                log.exception("looking for the users behind the sockets failed")
                continue
            for user_id in present - living:
                self.services.identities.forget(user_id)

    def _close_gone(self, user_id: UUID) -> None:
        for socket in self._open:
            if socket.viewer is not None and socket.viewer.id == user_id:
                socket.close_soon(4403, "The account of this token does not exist any more")


class _Socket:
    """One connection: its identity and its operations, each in a task that ends with it."""

    def __init__(
        self,
        sockets: GraphQLSockets,
        ws: web.WebSocketResponse,
        request: web.Request,
        writer: AbstractStreamWriter,
    ) -> None:
        self._sockets = sockets
        self._times = sockets.limits.times
        self._ws = ws
        self._request = request
        self._writer = writer
        self.viewer: Viewer | None = None
        self._initialised = False
        self._acknowledged = False
        self._closed_here = False
        self._operations: dict[str, asyncio.Task[None]] = {}
        # Who takes its messages; nobody once it ends.
        self.serving: asyncio.Task[Any] | None = None
        self._close_as: tuple[int, str] | None = None
        self._draining: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(
            self._times.init_seconds, self.close_soon, 4408, "Connection initialisation timeout"
        )

    @property
    def running(self) -> int:
        """How many operations run on it."""
        return len(self._operations)

    async def serve(self) -> None:
        """Take messages until either side closes."""
        task = self.serving = asyncio.current_task()
        assert task is not None
        try:
            # No `async for`: that is a coroutine more for each socket, and holds a message until the next one comes.
            while await self._hear(await self._ws.receive()):
                pass
        except (ClientConnectionResetError, ConnectionResetError):
            pass
        except asyncio.CancelledError:
            if self._close_as is None or task.uncancel():
                raise
            await self.close(*self._close_as)
        finally:
            self.serving = None
            # aiohttp ends a socket so where a ping had no pong; we do where a close had no answer.
            if isinstance(self._ws.exception(), TimeoutError) and not self._closed_here:
                self._sockets.let_go["silent"] += 1
            self._timer.cancel()
            running = [task for task in (*self._operations.values(), self._draining) if task is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            # A cancelled task holds its frames, and so this.
            self._operations.clear()

    async def _hear(self, message: WSMessage) -> bool:
        """Take one message; whether another may follow."""
        if message.type is WSMsgType.TEXT:
            await self._take(message.data)
        elif message.type is WSMsgType.BINARY:
            await self.close(4400, "Messages are text")
        elif message.type is WSMsgType.PING:
            await self._room()
            await self._ws.pong(message.data)
        return message.type not in _CLOSES

    async def close(self, code: int, reason: str) -> None:
        """Close with a code, from within `serve`; the client is given a moment to agree."""
        self._closed_here = True
        with contextlib.suppress(ConnectionError, RuntimeError):
            # Not drained: that has no deadline. The end of `serve` has one.
            await self._ws.close(code=code, message=reason.encode()[:120], drain=False)

    def close_soon(self, code: int, reason: str) -> None:
        """Close with a code, from anywhere.

        Whoever takes messages has to do it. Where another task closes, aiohttp cuts the connection behind the code and
        waits for no answer, and a client that is sending meanwhile may lose the code to the reset of the connection.
        """
        if self.serving is not None and self._close_as is None and not self._closed_here:
            self._close_as = (code, reason)
            self.serving.cancel()

    async def _take(self, text: str) -> None:
        try:
            message = orjson.loads(text)
        except orjson.JSONDecodeError:
            return await self.close(4400, "Messages are JSON")
        if not isinstance(message, dict):
            return await self.close(4400, "Messages are JSON objects")
        match message.get("type"):
            case "connection_init":
                return await self._initialise(message.get("payload"))
            case "subscribe":
                return await self._subscribe(message.get("id"), message.get("payload"))
            case "complete":
                return self._complete(message.get("id"))
            case "ping":
                return await self._answer_ping(message.get("payload"))
            case "pong":
                return None
        return await self.close(4400, "Unknown type of message")

    async def _initialise(self, payload: Any) -> None:
        if self._initialised:
            return await self.close(4429, "Too many initialisation requests")
        self._initialised = True
        self._timer.cancel()
        if payload is not None and not isinstance(payload, dict):
            return await self.close(4400, "The payload of connection_init is an object")
        identities = self._sockets.services.identities
        try:
            viewer = await viewer_of_payload(identities, payload or {})
            viewer = viewer or await viewer_of_headers(identities, self._request.headers)
        except UnauthenticatedError as refusal:
            return await self.close(4403, refusal.message)
        except (UnavailableError, DatabaseUnavailableError):
            return await self.close(WSCloseCode.TRY_AGAIN_LATER, "The token cannot be verified now")
        if viewer is not None:
            if not self._sockets.admit(viewer.id):
                return await self.close(4429, "Too many sockets of this user are open")
            self.viewer = viewer
            self._end_with_token(viewer.expires_at)
        self._acknowledged = True
        return await self._send({"type": "connection_ack"})

    async def _answer_ping(self, payload: Any) -> None:
        names_token = isinstance(payload, dict) and any(
            name.lower() == "authorization" and value is not None for name, value in payload.items()
        )
        if names_token and self._acknowledged:
            return await self._refresh(payload)
        # Not echoed with a token in it: a pong is often logged.
        echoed = {} if payload is None or names_token else {"payload": payload}
        try:
            pong = orjson.dumps({"type": "pong"} | echoed).decode()
        except TypeError:
            # Deeper than what is written may be, though not than what is read.
            return await self.close(4400, "The payload of a ping is nested too deeply")
        return await self._ws.send_str(pong)

    async def _refresh(self, payload: dict[str, Any]) -> None:
        """Take a new token of the same viewer: the socket lives as long as it does."""
        viewer = self.viewer
        try:
            fresh = await viewer_of_payload(self._sockets.services.identities, payload)
        except UnauthenticatedError as refusal:
            return await self.close(4403, refusal.message)
        except (UnavailableError, DatabaseUnavailableError):
            # The old token is as good as it was; the client sees by the time in the pong that it was not prolonged.
            fresh = viewer
        if viewer is None or fresh is None or fresh.id != viewer.id:
            return await self.close(4403, "The token is another viewer's")
        if self._close_as is None:
            self._timer.cancel()
            self.viewer = fresh
            self._end_with_token(fresh.expires_at)
        until = datetime.fromtimestamp(fresh.expires_at, UTC).isoformat()
        return await self._send({"type": "pong", "payload": {"expiresAt": until}})

    def _end_with_token(self, expires_at: float) -> None:
        remaining = expires_at - time.time()
        loop = asyncio.get_running_loop()
        if remaining > _LONGEST_TIMER_SECONDS:
            self._timer = loop.call_later(_LONGEST_TIMER_SECONDS, self._end_with_token, expires_at)
        else:
            self._timer = loop.call_later(max(remaining, 0), self.close_soon, 4403, "The token has expired")

    async def _subscribe(self, operation_id: Any, payload: Any) -> None:
        if not self._acknowledged:
            return await self.close(4401, "Unauthorized")
        if not isinstance(operation_id, str) or not operation_id or len(operation_id) > 200:
            return await self.close(4400, "An operation has an id, a string")
        if operation_id in self._operations:
            return await self.close(4409, f"Subscriber for {operation_id[:80]} already exists")
        if len(self._operations) >= self._sockets.limits.max_operations:
            error = code_error(ErrorCode.RATE_LIMITED, "Too many operations run on this socket.")
            return await self._send({"id": operation_id, "type": "error", "payload": format_errors([error])})
        try:
            asked = GraphQLRequest(payload)
        except BadRequestError as refusal:
            error = code_error(ErrorCode.BAD_USER_INPUT, str(refusal))
            return await self._send({"id": operation_id, "type": "error", "payload": format_errors([error])})
        task = asyncio.create_task(self._run(operation_id, asked), name="socket operation")
        self._operations[operation_id] = task
        return None

    def _complete(self, operation_id: Any) -> None:
        task = self._operations.pop(operation_id, None) if isinstance(operation_id, str) else None
        if task is not None:
            task.cancel()

    async def _run(self, operation_id: str, asked: GraphQLRequest) -> None:
        context = Context(self._sockets.services, self.viewer, address=self._request.remote)
        try:
            with self._sockets.operations.running(context) as operation:
                last = await self._follow(operation_id, asked, operation)
        except (ClientConnectionResetError, ConnectionResetError):
            return
        except Exception as error:
            log.exception("an operation on a socket failed")
            failure = code_error(ErrorCode.INTERNAL_SERVER_ERROR, "Something went wrong on the server.")
            del error
            last = {"id": operation_id, "type": "error", "payload": format_errors([failure])}
        # Free before the client can know: it may use the id again at once.
        if self._operations.pop(operation_id, None) is not None:
            with contextlib.suppress(ClientConnectionResetError, ConnectionResetError):
                await self._send(last)

    async def _follow(self, operation_id: str, asked: GraphQLRequest, operation: Operation) -> dict[str, Any]:
        """Send every result; what is returned is the message that ends the operation."""
        context = operation.context
        sender: DeltaSender | None = None

        def tell_deltas(plan: DeltaPlan) -> DeltaSender:
            nonlocal sender
            request = self._request
            if request.transport is None:
                raise ClientConnectionResetError("Cannot write to closing transport")
            sender = DeltaSender(self._ws, request.protocol, request.transport, operation_id, plan, self._room)
            return sender

        context.tell_deltas = tell_deltas
        async with aclosing(await self._results(asked, context)) as results:
            async for result in results:
                # Refused before it ran, or the source of a subscription failed: nothing will follow.
                if isinstance(result, PreExecutionError) or is_request_error(result):
                    errors = format_errors(result.errors or [])
                    operation.failed(errors)
                    return {"id": operation_id, "type": "error", "payload": errors}
                payload = result_payload(result)
                operation.told(payload)
                await self._send({"id": operation_id, "type": "next", "payload": payload})
        if sender is not None and sender.failure is not None:
            raise sender.failure
        await context.announce(asked.query)
        return {"id": operation_id, "type": "complete"}

    async def _results(self, asked: GraphQLRequest, context: Context) -> AsyncGenerator[Any, None]:
        """All results of an operation: by its plan where it has one, else what Strawberry gives."""
        schema, variables = self._sockets.schema, asked.variables or {}
        planned = await schema.run_planned(asked.query, context, variables, asked.operation_name)
        if planned is not None:
            return _alone(planned)
        followed = schema.follow_planned(asked.query, context, variables, asked.operation_name)
        if followed is not None:
            return followed
        return await schema.stream(
            asked.query,
            variable_values=asked.variables,
            context_value=context,
            operation_name=asked.operation_name,
            operation_extensions=asked.extensions,
        )

    async def _send(self, message: dict[str, Any]) -> None:
        # Before the text is made: what a reader that is late has not been told yet is merged, not queued.
        await self._room()
        # Text: a binary frame is one that no GraphQL client reads.
        await self._ws.send_str(orjson.dumps(message).decode())

    async def _room(self) -> None:
        """Wait until the client has taken enough of what it was sent.

        Raises:
            ConnectionResetError: it takes nothing, or is gone.
        """
        while self._request.protocol.writing_paused:
            if self._draining is None:
                # One wait for all operations: each alone would cancel the others' with its own.
                self._draining = asyncio.create_task(self._drain(), name="socket drain")
                self._draining.add_done_callback(self._drained)
            await asyncio.shield(self._draining)

    async def _drain(self) -> None:
        while True:
            transport = self._request.transport
            if transport is None or transport.is_closing() or self._ws.closed:
                raise ClientConnectionResetError("Cannot write to closing transport")
            waiting = transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(self._times.stall_seconds):
                    return await self._writer.drain()
            except TimeoutError:
                if transport.get_write_buffer_size() < waiting:
                    continue
                if not self._closed_here:
                    self._sockets.let_go["unread"] += 1
                    log.info("a client does not read: its socket is closed", extra={"bytes_waiting": waiting})
                    self.close_soon(NOT_READING, "The client does not read")
                raise ClientConnectionResetError("The client does not read") from None

    def _drained(self, task: asyncio.Task[None]) -> None:
        self._draining = None
        if not task.cancelled():
            # Whoever waits is told; that nobody does is no error.
            task.exception()


async def _alone(result: ExecutionResult) -> AsyncGenerator[ExecutionResult, None]:
    yield result


def _untie(request: web.Request, ws: web.WebSocketResponse) -> None:
    """Undo what makes circles of a socket that has ended: it is freed at once, and not when garbage is collected."""
    error = ws.exception()
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
    # There is no public way.
    request.protocol._data_received_cb = None  # noqa: SLF001


def _cut(transport: asyncio.Transport) -> None:
    """End a connection that still has something to tell; one that has not is at its end by itself."""
    if transport.get_write_buffer_size():
        transport.abort()


def _limit_what_waits(transport: asyncio.Transport | None) -> None:
    """Bound what a connection holds for a client that does not read, here and in the kernel."""
    if transport is None:
        return
    transport.set_write_buffer_limits(high=_WAITING_BYTES)
    connection = transport.get_extra_info("socket")
    if _NOTSENT_LOWAT is not None and connection.family in (sockets.AF_INET, sockets.AF_INET6):
        with contextlib.suppress(OSError):
            connection.setsockopt(sockets.IPPROTO_TCP, _NOTSENT_LOWAT, _UNSENT_BYTES)
