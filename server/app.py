"""The web application: routes and what stands before them."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from config import Settings
from graph.context import Services
from graph.schema import build_schema
from server.account_files import AccountFiles
from server.answers import Answers
from server.attachments import AttachmentHttp
from server.connections import Connections
from server.files import FileLinks
from server.graphiql import GraphiQL
from server.graphql_http import GraphQLHttp, error_response, not_allowed
from server.graphql_socket import GraphQLSockets, SocketLimits, SocketTimes
from server.ingest import Ingest
from server.operations import Operations
from server.origins import Origins
from server.pages import Health, security_headers
from server.requests import Requests
from services.errors import ErrorCode
from storage.base import Storage
from storage.local import LocalStorage


class Application:
    """The aiohttp application with what of it must be closed by hand."""

    def __init__(
        self,
        settings: Settings,
        services: Services,
        health: Health,
        storage: Storage,
        account_files: AccountFiles,
        ingest: Ingest | None,
        operations: Operations,
        socket_times: SocketTimes,
    ) -> None:
        schema = build_schema(introspection=settings.introspection)
        limits = SocketLimits(
            max_message_bytes=settings.max_request_bytes,
            max_operations=settings.max_subscriptions_per_socket,
            max_sockets=settings.max_sockets,
            max_sockets_of_user=settings.max_sockets_per_user,
            times=socket_times,
        )
        self._origins = Origins(settings.allowed_origins)
        self.sockets = GraphQLSockets(schema, services, limits, operations)
        self.connections = Connections()
        self.requests = Requests(self.connections)
        self._http = GraphQLHttp(schema, services, operations, Answers(self.requests, self._origins))
        self.web = web.Application(
            client_max_size=settings.max_request_bytes,
            middlewares=[self._admit],
        )
        self.web.on_response_prepare.append(self.requests.announce)
        self.web.on_response_prepare.append(security_headers)
        self.web.on_response_prepare.append(self._origins.announce)
        self._graphiql = GraphiQL() if settings.graphiql else None
        self.web.router.add_post("/graphql", self._http.post)
        self.web.router.add_get("/graphql", self._get, allow_head=False)
        AttachmentHttp(services).add_routes(self.web.router)
        if isinstance(storage, LocalStorage):
            FileLinks(storage).add_routes(self.web.router)
        self.web.router.add_get("/healthz", health.live)
        self.web.router.add_get("/readyz", health.ready)
        account_files.add_routes(self.web.router)
        if ingest is not None:
            ingest.add_routes(self.web.router, self._origins)
        if self._graphiql is not None:
            self.web.router.add_get("/", self._graphiql.redirect)
            self.web.router.add_get("/graphiql/{name:.+}", self._graphiql.asset)

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What comes before every handler; each further one would be a coroutine more for every request and socket."""
        with self.requests.named(request):
            preflight = self._origins.preflight(request)
            return await handler(request) if preflight is None else preflight

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            if not self._origins.admits(request):
                return error_response(403, ErrorCode.FORBIDDEN, "Sockets are not allowed from this origin.")
            return await self.sockets.connect(request)
        if "query" in request.query:
            return await self._http.get(request)
        if self._graphiql is not None and "text/html" in request.headers.get("Accept", ""):
            return await self._graphiql.page(request)
        return not_allowed("Send GraphQL by POST, or over a WebSocket (graphql-transport-ws).")
