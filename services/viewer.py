"""Who is asking, and how an anonymous identity comes to be."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import jwt

from models.database import Database
from models.ids import IdKind, MalformedIdError, new_id, outside_id, parse_id
from services.errors import ForbiddenError, UnauthenticatedError

_ISSUER = "threadgraph"
_ALGORITHM = "HS256"
_CACHE_TOKENS = 10_000
_MAX_TOKEN_CHARS = 8_192


@dataclass(frozen=True, slots=True)
class Viewer:
    """An identity that a token proved. `expires_at` is the token's, in seconds since the epoch."""

    id: UUID
    anonymous: bool
    expires_at: float


@dataclass(frozen=True, slots=True)
class Session:
    """A new anonymous session."""

    token: str
    viewer: Viewer


class Sessions:
    """Anonymous sessions: tokens signed by this server's own key (HS256, `iss` threadgraph).

    A verified token is remembered by its SHA-256 until it expires, so that a request costs a hash and not a signature.

    Args:
        secret: at least 32 bytes; whoever has it can be anyone.
        ttl_seconds: lifetime of a new session.
        allowed: whether new sessions are handed out.
    """

    def __init__(self, database: Database, *, secret: str, ttl_seconds: int, allowed: bool) -> None:
        self._database = database
        self._secret = secret
        self._ttl_seconds = ttl_seconds
        self._allowed = allowed
        self._verified: OrderedDict[bytes, Viewer] = OrderedDict()

    async def start_anonymous(self) -> Session:
        """A new identity that owns nothing yet.

        Raises:
            ForbiddenError: the operator does not allow anonymous sessions.
        """
        if not self._allowed:
            raise ForbiddenError("This server does not hand out anonymous sessions; sign in.")
        user_id = new_id()
        now = int(time.time())
        viewer = Viewer(user_id, anonymous=True, expires_at=now + self._ttl_seconds)
        async with self._database.acquire() as connection:
            await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", user_id)
        claims = {"iss": _ISSUER, "sub": outside_id(IdKind.USER, user_id), "iat": now, "exp": now + self._ttl_seconds}
        return Session(jwt.encode(claims, self._secret, algorithm=_ALGORITHM), viewer)

    def verify(self, token: str) -> Viewer:
        """Who a token stands for. Local CPU only.

        Raises:
            UnauthenticatedError: not a token of ours, or expired.
        """
        if len(token) > _MAX_TOKEN_CHARS or not token.isascii():
            raise UnauthenticatedError
        digest = sha256(token.encode()).digest()
        viewer = self._verified.get(digest)
        if viewer is None:
            viewer = self._decode(token)
            self._verified[digest] = viewer
            if len(self._verified) > _CACHE_TOKENS:
                self._verified.popitem(last=False)
        if viewer.expires_at <= time.time():
            self._verified.pop(digest, None)
            raise UnauthenticatedError("The token has expired.")
        return viewer

    def _decode(self, token: str) -> Viewer:
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                options={"require": ["exp", "iat", "sub", "iss"], "verify_aud": False},
            )
            return Viewer(parse_id(IdKind.USER, claims["sub"]), anonymous=True, expires_at=float(claims["exp"]))
        except (jwt.PyJWTError, MalformedIdError, TypeError, ValueError) as error:
            raise UnauthenticatedError("The token is not valid.") from error


def session_secret(data_dir: Path) -> str:
    """The key kept in the data folder; made at the first start, readable by the server's user only."""
    file = data_dir / "session.key"
    try:
        return file.read_text()
    except FileNotFoundError:
        data_dir.mkdir(parents=True, exist_ok=True)
        secret = secrets.token_hex(32)
        file.touch(mode=0o600)
        file.write_text(secret)
        return secret
