"""Who is asking, and how an anonymous identity comes to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import jwt

from models.database import Database
from models.ids import IdKind, MalformedIdError, new_id, outside_id, parse_id
from services.errors import ForbiddenError, RateLimitedError, UnauthenticatedError
from services.kept_secrets import kept_secret

OUR_ISSUER = "threadgraph"
MAX_TOKEN_CHARS = 8_192
_ALGORITHM = "HS256"


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

    Args:
        secret: at least 32 bytes; whoever has it can be anyone.
        ttl_seconds: lifetime of a new session.
        allowed: whether new sessions are handed out.
        take: asked for each new session with the address it is for; 0, or the seconds after which there would be one.
    """

    def __init__(
        self,
        database: Database,
        *,
        secret: str,
        ttl_seconds: int,
        allowed: bool,
        take: Callable[[str | None], int] = lambda address: 0,
    ) -> None:
        self._database = database
        self._secret = secret
        self._ttl_seconds = ttl_seconds
        self._allowed = allowed
        self._take = take

    async def start_anonymous(self, address: str | None = None) -> Session:
        """A new identity that owns nothing yet.

        Args:
            address: whose it will be.

        Raises:
            ForbiddenError: the operator does not allow anonymous sessions.
            RateLimitedError: too many were begun a moment ago.
        """
        if not self._allowed:
            raise ForbiddenError("This server does not hand out anonymous sessions; sign in.")
        if wait := self._take(address):
            raise RateLimitedError(
                "Too many anonymous sessions were begun from here; try again later.", retry_after=wait
            )
        user_id = new_id()
        async with self._database.acquire() as connection:
            await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", user_id)
        return self.session_of(user_id)

    def session_of(self, user_id: UUID) -> Session:
        """A session of an anonymous user that exists. Whoever calls this decides that it is theirs."""
        now = int(time.time())
        viewer = Viewer(user_id, anonymous=True, expires_at=now + self._ttl_seconds)
        claims = {
            "iss": OUR_ISSUER,
            "sub": outside_id(IdKind.USER, user_id),
            "iat": now,
            "exp": now + self._ttl_seconds,
        }
        return Session(jwt.encode(claims, self._secret, algorithm=_ALGORITHM), viewer)

    def read(self, token: str) -> Viewer:
        """Whose anonymous session a token is. Local CPU only: whether the user still exists is not asked.

        Raises:
            UnauthenticatedError: not a token of ours, or expired.
        """
        if len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise UnauthenticatedError("The token is not valid.")
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                issuer=OUR_ISSUER,
                options={"require": ["exp", "iat", "sub", "iss"], "verify_aud": False},
            )
            return Viewer(parse_id(IdKind.USER, claims["sub"]), anonymous=True, expires_at=float(claims["exp"]))
        except jwt.ExpiredSignatureError as error:
            raise UnauthenticatedError("The token has expired.") from error
        except (jwt.PyJWTError, MalformedIdError, TypeError, ValueError, OverflowError) as error:
            raise UnauthenticatedError("The token is not valid.") from error


def session_secret(data_dir: Path) -> str:
    """The key kept in the data folder; made at the first start, readable by the server's user only."""
    return kept_secret(data_dir / "session.key")
