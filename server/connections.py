"""The listening socket, and connections on which nobody asks anything: aiohttp would keep those for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

# For the first request of a connection, to the last of its headers.
SILENCE_SECONDS = 20.0
# Between requests. Longer than proxies keep an idle connection to use it again, a minute with most: else they would
# send into its end.
KEEPALIVE_SECONDS = 75.0
_LOOKS = 4


class Connections:
    """Takes connections, and closes those whose first request does not come in time."""

    def __init__(self) -> None:
        self._seconds = SILENCE_SECONDS
        # In the order in which they came, with the time at which each is closed.
        self._silent: dict[web.RequestHandler, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._listening: asyncio.Server | None = None

    def __len__(self) -> int:
        return len(self._silent)

    async def listen(self, make: Callable[[], web.RequestHandler], host: str, port: int) -> str:
        """Begin; the address as a URL.

        Args:
            make: aiohttp's own factory of protocols.

        Raises:
            OSError: it is not possible there.
        """
        loop = asyncio.get_running_loop()

        def connected() -> web.RequestHandler:
            handler = make()
            self._silent[handler] = loop.time() + self._seconds
            return handler

        self._listening = await loop.create_server(connected, host, port, backlog=128)
        self._timer = loop.call_later(self._seconds / _LOOKS, self._look)
        host, port = self._listening.sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        """Take no more; those there are go on."""
        if self._timer is not None:
            self._timer.cancel()
        if self._listening is not None:
            self._listening.close()

    def heard(self, request: web.BaseRequest) -> None:
        """A request came; from here on it has deadlines of its own."""
        self._silent.pop(request.protocol, None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now, late = loop.time(), []
        for handler, until in self._silent.items():
            if until > now:
                break
            late.append(handler)
        for handler in late:
            del self._silent[handler]
            # One that was closed has no transport any more.
            if handler.transport is not None:
                handler.force_close()
        self._timer = loop.call_later(self._seconds / _LOOKS, self._look)
