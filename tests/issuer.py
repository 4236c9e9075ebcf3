"""Issuers of tokens for tests: one that shares a secret with the server, and ones that publish their keys.

async with KeyServer() as issuer:
    issuer.keys = [signing_key("EdDSA", "k1")]
    token = issuer.token(sub="me")
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tests.vendor_server import VendorServer, Wire

SHARED_SECRET = "a secret that is shared with an app"
AUDIENCE = "chat"


def shared_secret_token(subject: str | None = None, **changes: Any) -> str:
    """A token as an app with the shared secret signs it; of somebody new, unless a subject is given."""
    return jwt.encode(claims("app", subject, **changes), SHARED_SECRET, "HS256")


def claims(issuer: str, subject: str | None = None, **changes: Any) -> dict[str, Any]:
    """The claims of a good token with changes: None leaves a claim out."""
    now = int(time.time())
    good = {"iss": issuer, "sub": subject or uuid.uuid4().hex, "aud": AUDIENCE, "iat": now, "exp": now + 600}
    return {name: value for name, value in (good | changes).items() if value is not None}


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key with its public form."""

    algorithm: str
    private: Any
    jwk: dict[str, Any]

    def sign(self, payload: dict[str, Any], **header: Any) -> str:
        """A token with the key's id in its header, unless `kid` is given; None leaves it out."""
        header = {"kid": self.jwk.get("kid")} | header
        shown = {name: value for name, value in header.items() if value is not None}
        return jwt.encode(payload, self.private, self.algorithm, headers=shown)


def signing_key(algorithm: str = "EdDSA", key_id: str | None = None, **members: Any) -> SigningKey:
    """A new key."""
    private: Any
    if algorithm == "EdDSA":
        private = ed25519.Ed25519PrivateKey.generate()
        jwk = OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)
    elif algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
        jwk = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
    else:
        private = rsa.generate_private_key(65_537, 2_048)
        jwk = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
        jwk.pop("key_ops", None)
    named = {"kid": key_id or uuid.uuid4().hex} | members
    return SigningKey(algorithm, private, jwk | {name: value for name, value in named.items() if value is not None})


def raw_token(header: dict[str, Any], payload: dict[str, Any] | bytes, signature: bytes = b"") -> str:
    """A token put together by hand, as no library would."""
    # Not orjson: it writes no half characters and no numbers beyond 64 bits.
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return ".".join(
        base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (orjson.dumps(header), body, signature)
    )


class KeyServer:
    """An issuer on a real socket. `answer` is how it answers; it may be set to anything that writes to the wire."""

    def __init__(self) -> None:
        self.keys: list[SigningKey] = []
        self.answer: Callable[[Wire], Awaitable[None]] = self.publish
        self._server = VendorServer(self._answer)

    @property
    def name(self) -> str:
        """Its `iss`."""
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def url(self) -> str:
        """Where its keys are."""
        return f"{self.name}/jwks"

    @property
    def asked(self) -> int:
        """How often it was asked for its keys."""
        return len(self._server.requests)

    def token(self, subject: str | None = None, *, key: SigningKey | None = None, **changes: Any) -> str:
        """A token by its last key, or by another."""
        return (key or self.keys[-1]).sign(claims(self.name, subject, **changes))

    async def publish(self, wire: Wire) -> None:
        """Answer with the keys."""
        await wire.whole(200, orjson.dumps({"keys": [key.jwk for key in self.keys]}))

    async def fail(self, wire: Wire) -> None:
        """Answer with 500."""
        await wire.whole(500, b"{}")

    async def hang(self, wire: Wire) -> None:
        """Answer nothing, until the client leaves."""
        await wire.gone()

    async def _answer(self, wire: Wire) -> None:
        await self.answer(wire)

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._server.__aexit__(*error)
