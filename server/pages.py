"""What is not GraphQL: health, and the headers that every response carries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def security_headers() -> Callable[..., Awaitable[web.StreamResponse]]:
    """Headers that stop a browser from guessing types and from framing pages."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if not response.prepared:
            response.headers.setdefault("X-Content-Type-Options", "nosniff")
            response.headers.setdefault("Referrer-Policy", "no-referrer")
            response.headers.setdefault("X-Frame-Options", "DENY")
        return response

    return middleware


def cors(allowed_origins: tuple[str, ...]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """CORS for exactly these origins (fetch.spec.whatwg.org, section 3.2); no cookies, so no credentials."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin", "").lower()
        allowed = origin in allowed_origins
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            response: web.StreamResponse = web.Response(status=204 if allowed else 403)
            if allowed:
                response.headers["Access-Control-Allow-Methods"] = "POST, PUT"
                response.headers["Access-Control-Allow-Headers"] = (
                    "authorization, content-type, graphql-preflight, apollo-require-preflight"
                )
                response.headers["Access-Control-Max-Age"] = "600"
        else:
            response = await handler(request)
        if not response.prepared:
            response.headers["Vary"] = "Origin"
            if allowed:
                response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        return response

    return middleware


class Health:
    """`/healthz`: the process serves. `/readyz`: it takes new work."""

    def __init__(self, *, is_ready: Callable[[], Awaitable[bool]]) -> None:
        self._is_ready = is_ready

    async def live(self, request: web.Request) -> web.Response:
        """200 as long as the event loop turns; looks at nothing else."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200 when turns are taken; 503 while draining, or when the database does not answer."""
        if await self._is_ready():
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready"}, status=503)
