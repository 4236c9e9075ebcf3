"""What every request gets: an id, in the log and in the response; and a place in the counts."""

from __future__ import annotations

import re
from collections import Counter

from aiohttp import hdrs, web

from models.log_fields import log_scope
from server.connections import Connections
from server.operations import new_request_id

HEADER = "X-Request-Id"
# What proxies and clients make: hex, UUIDs, base64. Nothing in it can end a line, or be a text of a user's.
_SANE = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}", re.ASCII)
_METHODS = hdrs.METH_ALL - {hdrs.METH_CONNECT, hdrs.METH_TRACE}
_KEY = web.RequestKey("request_id", str)


class Requests:
    """The requests of one process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self.responses: Counter[tuple[str, str, int]] = Counter()
        """By method, route and status; an upgrade to a WebSocket is 101."""

    def named(self, request: web.Request) -> log_scope:
        """Give a request its id, the one it was sent with, if that is one, else a new one; the scope to serve it in."""
        self._connections.heard(request)
        sent = request.headers.get(HEADER, "")
        request[_KEY] = request_id = sent if _SANE.fullmatch(sent) else new_request_id()
        return log_scope(request_id=request_id)

    def id_of(self, request: web.Request) -> str:
        """The id that a request was given."""
        return request[_KEY]

    async def announce(self, request: web.Request, response: web.StreamResponse) -> None:
        """Count a response and tell its id, as it begins."""
        resource = request.match_info.route.resource
        route = "none" if resource is None else resource.canonical
        method = request.method if request.method in _METHODS else "other"
        self.responses[method, route, response.status] += 1
        if _KEY in request:
            response.headers[HEADER] = request[_KEY]
