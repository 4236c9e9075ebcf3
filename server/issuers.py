"""Whose tokens are taken, from the settings, and how the keys of those who publish them are read."""

from __future__ import annotations

import asyncio

import aiohttp

from config import Settings, SettingsError
from services.identity import Issuer
from services.keys import Fetch, KeySet, KeysUnavailableError, SharedSecret
from services.viewer import OUR_ISSUER

MAX_KEY_SET_BYTES = 262_144
_FETCH_SECONDS = 5.0
_ANY_AUDIENCE = "*"


def issuers(settings: Settings, fetch: Fetch) -> list[Issuer]:
    """The issuers that the AUTH_ variables name together; their key sets are not started.

    Raises:
        SettingsError: each variable can be used, but not with the others.
    """
    urls, names, audiences = settings.auth_jwks_url, settings.auth_issuer, settings.auth_audience
    if OUR_ISSUER in names:
        raise SettingsError(f"AUTH_ISSUER: {OUR_ISSUER!r} is the name of this server's own anonymous sessions")
    if len(set(names)) < len(names):
        raise SettingsError("AUTH_ISSUER: it names an issuer twice; each has one AUTH_JWKS_URL")
    leeway = settings.auth_leeway_seconds
    if settings.auth_shared_secret is not None:
        if urls:
            raise SettingsError("AUTH_SHARED_SECRET and AUTH_JWKS_URL: set one of the two")
        if len(names) > 1 or len(audiences) > 1:
            raise SettingsError("AUTH_ISSUER and AUTH_AUDIENCE: with AUTH_SHARED_SECRET there is at most one of each")
        return [
            Issuer(
                name=names[0] if names else None,
                audience=_audience(audiences[0]) if audiences else None,
                keys=SharedSecret(settings.auth_shared_secret),
                leeway_seconds=leeway,
            )
        ]
    if not len(urls) == len(names) == len(audiences):
        raise SettingsError(
            "AUTH_JWKS_URL, AUTH_ISSUER and AUTH_AUDIENCE: expected lists of equal length; they have "
            f"{len(urls)}, {len(names)} and {len(audiences)} entries"
        )
    return [
        Issuer(name=name, audience=_audience(audience), keys=KeySet(url, fetch), leeway_seconds=leeway)
        for url, name, audience in zip(urls, names, audiences, strict=True)
    ]


def _audience(text: str) -> str | None:
    return None if text == _ANY_AUDIENCE else text


class KeySetReader:
    """Reads key sets over HTTP: in bounded time and size, from that address and no other it leads to."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()

    async def fetch(self, url: str) -> bytes:
        """The document at a URL.

        Raises:
            KeysUnavailableError: it does not come, or not in time, or is too large.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=_FETCH_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Not compressed: the bound is on what is read.
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            )
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise KeysUnavailableError(f"status {response.status}")
                document = bytearray()
                async for piece in response.content.iter_any():
                    document += piece
                    if len(document) > MAX_KEY_SET_BYTES:
                        raise KeysUnavailableError(f"more than {MAX_KEY_SET_BYTES} bytes")
                return bytes(document)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:  # noqa: UP041
            raise KeysUnavailableError(type(error).__name__) from error
