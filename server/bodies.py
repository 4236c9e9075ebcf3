"""Bodies that are read while they come, by deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from aiohttp import ClientError, web

from services.errors import BadUserInputError

IDLE_SECONDS = 30.0
TOTAL_SECONDS = 600.0


async def pieces(read: Callable[[], Awaitable[bytes]]) -> AsyncGenerator[bytes, None]:
    """A body in the pieces it comes in, to the first empty one.

    Raises:
        BadUserInputError: the caller went away, or was silent for too long, before it was whole.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + TOTAL_SECONDS
    while True:
        try:
            async with asyncio.timeout_at(min(deadline, now() + IDLE_SECONDS)):
                piece = await read()
        except (ClientError, OSError, TimeoutError, ValueError, web.RequestPayloadError) as error:
            raise BadUserInputError("The body did not come to its end.") from error
        if not piece:
            return
        yield piece
