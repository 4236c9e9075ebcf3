"""Which pages may read what this server says: one setting, for CORS, for sockets and for the analytics relay.

CORS for exactly these origins (fetch.spec.whatwg.org, section 3.2). There are no cookies, so no credentials are ever
allowed, and nothing but an origin of the setting is ever echoed. The headers are set where a response begins, whoever
made it: a page can read a refusal, an unknown path and a defect as it reads an answer.
"""

from __future__ import annotations

from aiohttp import hdrs, web
from strawberry.http.websocket_origin import is_same_origin

_METHODS = "POST, PUT"
_HEADERS = "authorization, content-type, range, graphql-preflight, apollo-require-preflight"
# Beside those that every page may read (fetch.spec.whatwg.org, CORS-safelisted response-header name).
_EXPOSED = "Retry-After, Content-Disposition, Accept-Ranges, Content-Range, ETag, X-Request-Id"
_MAX_AGE_SECONDS = "600"


class Origins:
    """The origins of ALLOWED_ORIGINS.

    Args:
        allowed: as browsers spell them: scheme, host and port where it is not the default one, in lower case.
    """

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = frozenset(allowed)

    def named(self, request: web.Request) -> str | None:
        """The request's origin where it is one of the setting, as it was sent."""
        origins = request.headers.getall(hdrs.ORIGIN, [])
        return origins[0] if len(origins) == 1 and origins[0].lower() in self._allowed else None

    def admits(self, request: web.Request) -> bool:
        """Whether a request may come from where it does, for what browsers do not apply CORS to.

        Programs send no Origin and carry nothing to steal; a page of this server may speak to it.
        """
        origins = request.headers.getall(hdrs.ORIGIN, [])
        if not origins or self.named(request) is not None:
            return True
        return len(origins) == 1 and is_same_origin(origins[0], request.headers.get(hdrs.HOST))

    async def announce(self, request: web.Request, response: web.StreamResponse) -> None:
        """Set the headers of CORS, as a response begins."""
        vary = response.headers.get(hdrs.VARY)
        response.headers[hdrs.VARY] = "Origin" if not vary else f"{vary}, Origin"
        response.headers.update(self.headers(request))

    def headers(self, request: web.Request) -> dict[str, str]:
        """What lets the page that sent a request read the response, where it may."""
        origin = self.named(request)
        if origin is None:
            return {}
        return {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: _EXPOSED}

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser which asks before it sends; None for every other request."""
        if request.method != "OPTIONS" or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
            return None
        if self.named(request) is None:
            return web.Response(status=403)
        allowed = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _HEADERS,
            hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_SECONDS,
        }
        return web.Response(status=204, headers=allowed)
