"""Who is calling, from the header of a request or the payload of `connection_init`: the same form in both."""

from __future__ import annotations

from collections.abc import Mapping

from multidict import CIMultiDictProxy

from services.errors import UnauthenticatedError
from services.viewer import Sessions, Viewer

_SCHEME = "bearer "


def viewer_of_headers(sessions: Sessions, headers: CIMultiDictProxy[str]) -> Viewer | None:
    """The viewer of an HTTP request; None where no token was sent.

    Raises:
        UnauthenticatedError: a token was sent that is not valid, or two were.
    """
    values = headers.getall("Authorization", [])
    if len(values) > 1:
        raise UnauthenticatedError("The Authorization header was sent twice.")
    return _viewer(sessions, values[0]) if values else None


def viewer_of_payload(sessions: Sessions, payload: Mapping[str, object]) -> Viewer | None:
    """The viewer of a WebSocket, from `authorization` (in any case) in its `connection_init` payload.

    Raises:
        UnauthenticatedError: a token was sent that is not valid, or two were.
    """
    values = [value for key, value in payload.items() if key.lower() == "authorization" and value is not None]
    if len(values) > 1 or not all(isinstance(value, str) for value in values):
        raise UnauthenticatedError("The payload must hold one authorization, a string.")
    return _viewer(sessions, str(values[0])) if values else None


def _viewer(sessions: Sessions, authorization: str) -> Viewer:
    if authorization[: len(_SCHEME)].lower() != _SCHEME:
        raise UnauthenticatedError("Send the token as `Bearer <token>`.")
    return sessions.verify(authorization[len(_SCHEME) :].strip())
