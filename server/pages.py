"""What is not GraphQL: health, and the headers that every response carries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web


async def security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Set headers that stop a browser from guessing types and from framing pages, as a response begins."""
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "no-referrer")
    response.headers.setdefault("X-Frame-Options", "DENY")


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
