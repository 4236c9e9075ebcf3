"""Who is calling, from the header of a request or the payload of a socket's message: the same form in both."""

from __future__ import annotations

from collections.abc import Mapping

from multidict import CIMultiDictProxy

from services.errors import UnauthenticatedError
from services.identity import Identities
from services.viewer import Viewer

_SCHEME = "bearer "


async def viewer_of_headers(identities: Identities, headers: CIMultiDictProxy[str]) -> Viewer | None:
    """The viewer of an HTTP request; None where no token was sent.

    Raises:
        UnauthenticatedError: a token was sent that is not valid, or two were.
        UnavailableError, DatabaseUnavailableError: whether it is valid cannot be known now.
    """
    values = headers.getall("Authorization", [])
    if len(values) > 1:
        raise UnauthenticatedError("The Authorization header was sent twice.")
    return await _viewer(identities, values[0]) if values else None


async def viewer_of_payload(identities: Identities, payload: Mapping[str, object]) -> Viewer | None:
    """The viewer of a WebSocket, from `authorization` (in any case) in the payload of `connection_init` or `ping`.

    Raises:
        as `viewer_of_headers`.
    """
    values = [value for key, value in payload.items() if key.lower() == "authorization" and value is not None]
    if len(values) > 1 or not all(isinstance(value, str) for value in values):
        raise UnauthenticatedError("The payload must hold one authorization, a string.")
    return await _viewer(identities, str(values[0])) if values else None


async def _viewer(identities: Identities, authorization: str) -> Viewer:
    if authorization[: len(_SCHEME)].lower() != _SCHEME:
        raise UnauthenticatedError("Send the token as `Bearer <token>`.")
    return await identities.verify(authorization[len(_SCHEME) :].strip())
