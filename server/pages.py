"""What is not GraphQL: health, and the headers that every response carries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

OK = "ok"


# Against browsers that guess types, and pages that frame ours.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


async def security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Set headers that stop a browser from guessing types and from framing pages, as a response begins."""
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)


class Health:
    """`/healthz`: the process serves. `/readyz`: it takes new work.

    Args:
        parts: what is needed for new work, each with `ok` or what is wrong.
    """

    def __init__(self, parts: Callable[[], Awaitable[dict[str, str]]]) -> None:
        self._parts = parts

    async def live(self, request: web.Request) -> web.Response:
        """200 as long as the event loop turns; looks at nothing else."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200 when turns are taken and answers can be read; 503 otherwise, with the part that is at fault."""
        parts = await self._parts()
        if all(state == OK for state in parts.values()):
            return web.json_response({"status": "ready", "parts": parts})
        return web.json_response({"status": "not ready", "parts": parts}, status=503)
