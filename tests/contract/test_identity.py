"""Whose tokens are taken: every algorithm, every forgery, and an issuer that rotates, fails, hangs and floods."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

from config import SettingsError
from models.database import Database
from server.issuers import MAX_KEY_SET_BYTES, KeySetReader, issuers
from server.runtime import Server
from services.errors import UnauthenticatedError, UnavailableError
from services.identity import RECHECK_SECONDS, Identities, Issuer
from services.keys import MAX_WAITING, KeySet, KeySetTimes, KeysUnavailableError, SharedSecret
from services.viewer import Sessions, Viewer
from tests.conftest import test_settings
from tests.issuer import AUDIENCE, SHARED_SECRET, KeyServer, SigningKey, claims, raw_token, signing_key
from tests.vendor_server import Wire

LEEWAY = 30.0
KEYS = {algorithm: signing_key(algorithm, f"of {algorithm}") for algorithm in ("EdDSA", "ES256", "RS256")}
TIMES = KeySetTimes(cooldown_seconds=0.3)


class Clock:
    """The monotonic clock, which a test sets ahead."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.seconds


class Trust:
    """Identities that trust some issuers, with what is behind them."""

    def __init__(self, database: Database, reader: KeySetReader, names: list[KeyServer], times: KeySetTimes) -> None:
        self.clock = Clock()
        self.sessions = Sessions(database, secret="s" * 32, ttl_seconds=600, allowed=True)
        self.key_sets = [KeySet(issuer.url, reader.fetch, times=times, now=self.clock) for issuer in names]
        trusted = [
            Issuer(name=issuer.name, audience=AUDIENCE, keys=keys, leeway_seconds=LEEWAY)
            for issuer, keys in zip(names, self.key_sets, strict=True)
        ]
        self.identities = Identities(database, self.sessions, trusted, now=self.clock)
        self.verify = self.identities.verify


@asynccontextmanager
async def trusting(server: Server, *names: KeyServer, times: KeySetTimes = TIMES) -> AsyncIterator[Trust]:
    """Trust these issuers; their sets are read when they are needed only."""
    reader = KeySetReader()
    trust = Trust(server.database, reader, list(names), times)
    try:
        yield trust
    finally:
        for keys in trust.key_sets:
            await keys.stop()
        await reader.close()


@pytest.fixture
async def issuer() -> AsyncIterator[KeyServer]:
    """An issuer with a key for each algorithm."""
    async with KeyServer() as issuer:
        issuer.keys = list(KEYS.values())
        yield issuer


@pytest.fixture
async def trust(server: Server, issuer: KeyServer) -> AsyncIterator[Trust]:
    """Identities that trust it."""
    async with trusting(server, issuer) as trust:
        yield trust


async def verdict(verify: Callable[[str], Awaitable[Viewer]], token: str) -> str:
    """What comes of a token, in a word."""
    try:
        await verify(token)
    except (UnauthenticatedError, UnavailableError) as refused:
        return refused.code.value
    return "good"


# Good tokens.


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_token_of_every_algorithm_is_taken(trust: Trust, issuer: KeyServer, algorithm: str) -> None:
    viewer = await trust.verify(issuer.token("Ann", key=KEYS[algorithm]))
    assert not viewer.anonymous
    assert (await trust.verify(issuer.token("Ann"))).id == viewer.id
    assert issuer.asked == 1


async def test_one_subject_of_two_issuers_is_two_users(server: Server, issuer: KeyServer) -> None:
    async with KeyServer() as second:
        second.keys = [signing_key()]
        async with trusting(server, issuer, second) as trust:
            first = await trust.verify(issuer.token("Ann"))
            assert (await trust.verify(second.token("Ann"))).id != first.id
            # Each with its own keys only.
            forged = second.keys[0].sign(claims(issuer.name, "Ann"), kid=KEYS["EdDSA"].jwk["kid"])
            assert await verdict(trust.verify, forged) == "UNAUTHENTICATED"


async def test_a_subject_at_its_first_sight_twenty_times_at_once_is_one_user(trust: Trust, issuer: KeyServer) -> None:
    subject = uuid.uuid4().hex
    tokens = [issuer.token(subject, jti=str(number)) for number in range(20)]
    viewers = await asyncio.gather(*map(trust.verify, tokens))
    assert len({viewer.id for viewer in viewers}) == 1


async def test_an_audience_may_be_one_of_several(trust: Trust, issuer: KeyServer) -> None:
    assert await verdict(trust.verify, issuer.token(aud=["profile", AUDIENCE])) == "good"


async def test_a_token_without_a_key_id_is_taken_where_one_key_fits(trust: Trust, issuer: KeyServer) -> None:
    assert await verdict(trust.verify, KEYS["ES256"].sign(claims(issuer.name), kid=None)) == "good"
    issuer.keys.append(signing_key("ES256"))
    trust.clock.seconds += TIMES.cooldown_seconds
    await verdict(trust.verify, KEYS["ES256"].sign(claims(issuer.name), kid="unknown"))
    assert await verdict(trust.verify, KEYS["ES256"].sign(claims(issuer.name), kid=None)) == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("claim", "seconds", "expected"),
    [
        ("exp", -20, "good"),
        ("exp", -40, "UNAUTHENTICATED"),
        ("nbf", 20, "good"),
        ("nbf", 40, "UNAUTHENTICATED"),
        ("iat", 20, "good"),
        ("iat", 40, "UNAUTHENTICATED"),
        ("exp", 360 * 86_400, "good"),
        ("exp", 367 * 86_400, "UNAUTHENTICATED"),
    ],
)
async def test_the_clock_of_an_issuer_may_differ_by_so_much(
    trust: Trust, issuer: KeyServer, claim: str, seconds: int, expected: str
) -> None:
    payload = claims(issuer.name) | {claim: int(time.time()) + seconds}
    assert await verdict(trust.verify, KEYS["EdDSA"].sign(payload)) == expected


async def test_a_token_is_good_until_its_end_and_the_leeway(
    trust: Trust, issuer: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = int(time.time()) + 60
    token = issuer.token(exp=end)
    assert (await trust.verify(token)).expires_at == end + LEEWAY
    real = time.time
    monkeypatch.setattr("services.identity.time.time", lambda: real() + 60 + LEEWAY + 1)
    assert await verdict(trust.verify, token) == "UNAUTHENTICATED"


# Forgeries.

CLAIMS: list[tuple[str, dict[str, Any]]] = [
    ("no exp", {"exp": None}),
    ("exp in quotes", {"exp": str(int(time.time()) + 600)}),
    ("exp in fractions", {"exp": time.time() + 600}),
    ("exp true", {"exp": True}),
    ("exp a list", {"exp": [int(time.time()) + 600]}),
    ("exp in the year 9999", {"exp": 253_402_300_799}),
    ("exp beyond all clocks", {"exp": 10**40}),
    ("exp past", {"exp": 1}),
    ("nbf in quotes", {"nbf": "1"}),
    ("iat in fractions", {"iat": 1.5}),
    ("no iss", {"iss": None}),
    ("another iss", {"iss": "http://127.0.0.1:1"}),
    ("iss in a list", {"iss": ["http://127.0.0.1:1"]}),
    ("our own iss", {"iss": "threadgraph"}),
    ("no aud", {"aud": None}),
    ("the aud of an ID token", {"aud": "the-client-of-the-frontend"}),
    ("aud of others", {"aud": ["one", "two"]}),
    ("aud with what is no text", {"aud": [AUDIENCE, 5]}),
    ("aud an object", {"aud": {AUDIENCE: AUDIENCE}}),
    ("no sub", {"sub": None}),
    ("sub a number", {"sub": 5}),
    ("sub a list", {"sub": ["me"]}),
    ("sub empty", {"sub": ""}),
    ("sub with a NUL", {"sub": "a\0b"}),
    ("sub with half a character", {"sub": "\ud800"}),
    ("sub of 256", {"sub": "x" * 256}),
]


@pytest.mark.parametrize(("name", "changes"), CLAIMS, ids=[name for name, _ in CLAIMS])
async def test_claims_that_are_wrong_are_refused_though_signed(
    trust: Trust, issuer: KeyServer, name: str, changes: dict[str, Any]
) -> None:
    payload = {claim: value for claim, value in (claims(issuer.name) | changes).items() if value is not None}
    # By hand: a library refuses to make some of them.
    body = raw_token({"alg": "EdDSA", "kid": "of EdDSA"}, payload).rpartition(".")[0]
    assert await verdict(trust.verify, with_signature(body, KEYS["EdDSA"].private.sign(body.encode()))) == (
        "UNAUTHENTICATED"
    )


async def test_a_token_put_together_by_hand_is_taken_where_nothing_is_wrong(trust: Trust, issuer: KeyServer) -> None:
    """What the forgeries above and below are made from is good by itself."""
    body = raw_token({"alg": "EdDSA", "kid": "of EdDSA"}, claims(issuer.name)).rpartition(".")[0]
    assert await verdict(trust.verify, with_signature(body, KEYS["EdDSA"].private.sign(body.encode()))) == "good"


def with_signature(body: str, signature: bytes) -> str:
    return f"{body}.{raw_token({}, {}, signature).rpartition('.')[2]}"


def public_pem(key: SigningKey) -> bytes:
    pem: bytes = key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def hs256_with(material: bytes, key: SigningKey, issuer: str) -> str:
    """A token signed with HS256 and a public key as the secret, which a library would refuse to make."""
    body = raw_token({"alg": "HS256", "kid": key.jwk["kid"]}, claims(issuer)).rpartition(".")[0]
    return with_signature(body, hmac.digest(material, body.encode(), "sha256"))


MINE = signing_key("EdDSA", "of EdDSA")


def truncated(token: str, characters: int) -> str:
    return token[:-characters]


FORGERIES: dict[str, Callable[[str], str]] = {
    "alg none": lambda name: raw_token({"alg": "none"}, claims(name)),
    "alg None": lambda name: raw_token({"alg": "None"}, claims(name)),
    "alg NONE with a kid": lambda name: raw_token({"alg": "NONE", "kid": "of EdDSA"}, claims(name), b"x"),
    "alg nOnE": lambda name: raw_token({"alg": "nOnE", "kid": "of EdDSA"}, claims(name)),
    "no alg": lambda name: raw_token({"kid": "of EdDSA"}, claims(name)),
    "alg a list": lambda name: raw_token({"alg": ["EdDSA"], "kid": "of EdDSA"}, claims(name)),
    "alg null": lambda name: raw_token({"alg": None, "kid": "of EdDSA"}, claims(name)),
    "HS256 by the public key as PEM": lambda name: hs256_with(public_pem(KEYS["RS256"]), KEYS["RS256"], name),
    "HS256 by the public key as JWK": lambda name: hs256_with(orjson.dumps(KEYS["EdDSA"].jwk), KEYS["EdDSA"], name),
    "HS256 by the key's own x": lambda name: hs256_with(KEYS["EdDSA"].jwk["x"].encode(), KEYS["EdDSA"], name),
    "HS256 by an empty secret": lambda name: hs256_with(b"", KEYS["EdDSA"], name),
    "another key of the same id": lambda name: MINE.sign(claims(name)),
    "another key in the header": lambda name: MINE.sign(claims(name), jwk=MINE.jwk),
    "another algorithm of the same key": lambda name: jwt.encode(
        claims(name), KEYS["RS256"].private, "RS512", headers={"kid": "of RS256"}
    ),
    "PS256": lambda name: jwt.encode(claims(name), KEYS["RS256"].private, "PS256", headers={"kid": "of RS256"}),
    "the key of another algorithm": lambda name: KEYS["ES256"].sign(claims(name), kid="of EdDSA"),
    "an extension that must be understood": lambda name: KEYS["EdDSA"].sign(claims(name), crit=["exp"], exp=1),
    "an extension that nobody knows": lambda name: KEYS["EdDSA"].sign(claims(name), crit=["x"], x=1),
    "an empty crit": lambda name: KEYS["EdDSA"].sign(claims(name), crit=[]),
    "a detached payload": lambda name: raw_token(
        {"alg": "EdDSA", "kid": "of EdDSA", "b64": False, "crit": ["b64"]}, claims(name)
    ),
    "a truncated signature": lambda name: truncated(KEYS["EdDSA"].sign(claims(name)), 4),
    "half a signature": lambda name: truncated(KEYS["ES256"].sign(claims(name)), 43),
    "no signature": lambda name: KEYS["EdDSA"].sign(claims(name)).rpartition(".")[0] + ".",
    "two parts": lambda name: KEYS["EdDSA"].sign(claims(name)).rpartition(".")[0],
    "four parts": lambda name: KEYS["EdDSA"].sign(claims(name)) + ".x",
    "a signature of zeros": lambda name: raw_token({"alg": "ES256", "kid": "of ES256"}, claims(name), bytes(64)),
    "no kid where none fits": lambda name: signing_key("EdDSA").sign(claims(name), kid=None),
    "kid unknown": lambda name: KEYS["EdDSA"].sign(claims(name), kid="unknown"),
    "kid empty": lambda name: KEYS["EdDSA"].sign(claims(name), kid=""),
    "kid a path": lambda name: KEYS["EdDSA"].sign(claims(name), kid="../../../../../dev/null"),
    "kid SQL": lambda name: KEYS["EdDSA"].sign(claims(name), kid="' OR 1=1; --"),
    "kid a URL": lambda name: KEYS["EdDSA"].sign(claims(name), kid=f"{name}/other"),
    "kid of 4 kilobytes": lambda name: KEYS["EdDSA"].sign(claims(name), kid="k" * 4_000),
    "kid of 10 kilobytes": lambda name: KEYS["EdDSA"].sign(claims(name), kid="k" * 10_000),
    "kid a number": lambda name: raw_token({"alg": "EdDSA", "kid": 5}, claims(name)),
    "a payload that is no object": lambda name: raw_token({"alg": "EdDSA", "kid": "of EdDSA"}, b"[]"),
    "a payload without an end": lambda name: raw_token({"alg": "EdDSA", "kid": "of EdDSA"}, b"[" * 5_000),
    "a payload that is no text": lambda name: raw_token({"alg": "EdDSA", "kid": "of EdDSA"}, b"\xff\xfe"),
    "numbers beyond measure": lambda name: raw_token({"alg": "EdDSA", "kid": "of EdDSA"}, b'{"exp":1e400,"iss":"x"}'),
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_a_forged_token_is_refused(trust: Trust, issuer: KeyServer, name: str) -> None:
    assert await verdict(trust.verify, FORGERIES[name](issuer.name)) == "UNAUTHENTICATED"
    assert await verdict(trust.verify, issuer.token()) == "good"
    assert issuer.asked <= 2
    assert {request.path for request in issuer._server.requests} == {"/jwks"}


@pytest.mark.parametrize("header", ["jku", "x5u"])
async def test_no_address_in_a_token_is_visited(trust: Trust, issuer: KeyServer, header: str) -> None:
    async with KeyServer() as mine:
        mine.keys = [MINE]
        token = MINE.sign(claims(issuer.name), **{header: mine.url})
        assert await verdict(trust.verify, token) == "UNAUTHENTICATED"
        assert await verdict(trust.verify, KEYS["EdDSA"].sign(claims(issuer.name), **{header: mine.url})) == "good"
        assert mine.asked == 0


# What issuers do.


async def test_a_rotation_refuses_no_token(trust: Trust, issuer: KeyServer) -> None:
    old = issuer.token()
    assert await verdict(trust.verify, old) == "good"
    for _ in range(5):
        issuer.keys = [signing_key()]
        assert await verdict(trust.verify, issuer.token()) == "good"
        # Also those signed a moment ago, though the issuer publishes their key no more.
        assert await verdict(trust.verify, KEYS["EdDSA"].sign(claims(issuer.name))) == "good"
    assert issuer.asked == 6


async def test_a_key_under_the_id_of_the_old_one_is_found(trust: Trust, issuer: KeyServer) -> None:
    for key_id in ("the same", None):
        members = {} if key_id else {"kid": None}
        for _ in range(2):
            trust.clock.seconds += TIMES.cooldown_seconds
            issuer.keys = [signing_key("EdDSA", key_id, **members)]
            assert await verdict(trust.verify, issuer.token()) == "good"


async def test_a_key_that_was_removed_is_refused_in_time(trust: Trust, issuer: KeyServer) -> None:
    key = signing_key()
    issuer.keys.append(key)
    seen = issuer.token(key=key)
    assert await verdict(trust.verify, seen) == "good"
    issuer.keys.remove(key)
    trust.clock.seconds += TIMES.refresh_seconds
    await trust.key_sets[0]._read()
    trust.clock.seconds += TIMES.removed_seconds - 1
    assert await verdict(trust.verify, seen) == "good"
    trust.clock.seconds += 1
    for token in (seen, issuer.token(key=key)):
        assert await verdict(trust.verify, token) == "UNAUTHENTICATED"
    assert await verdict(trust.verify, issuer.token()) == "good"


async def test_an_issuer_that_is_down_for_an_hour_costs_no_known_key(trust: Trust, issuer: KeyServer) -> None:
    seen = issuer.token()
    assert await verdict(trust.verify, seen) == "good"
    issuer.answer = issuer.fail
    for _ in range(12):
        trust.clock.seconds += 300
        assert not await trust.key_sets[0]._read()
        assert await verdict(trust.verify, issuer.token(key=KEYS["ES256"])) == "good"
    assert await verdict(trust.verify, seen) == "good"
    # A key that nobody knows may be a new one: that cannot be said now.
    assert await verdict(trust.verify, signing_key().sign(claims(issuer.name))) == "UNAVAILABLE"
    # A signature that does not fit is no question of that.
    assert await verdict(trust.verify, MINE.sign(claims(issuer.name))) == "UNAUTHENTICATED"
    trust.clock.seconds += TIMES.stale_seconds
    for token in (seen, issuer.token()):
        assert await verdict(trust.verify, token) == "UNAVAILABLE"
    issuer.answer = issuer.publish
    trust.clock.seconds += TIMES.cooldown_seconds
    assert await verdict(trust.verify, seen) == "good"


async def test_a_thousand_unknown_keys_ask_once_in_a_while_and_hold_up_nobody_with_a_known_one(
    trust: Trust, issuer: KeyServer
) -> None:
    assert await verdict(trust.verify, issuer.token()) == "good"
    stranger = signing_key()
    made_up = [stranger.sign(claims(issuer.name), kid=str(number)) for number in range(1_000)]
    verdicts = asyncio.gather(*(verdict(trust.verify, token) for token in made_up))
    assert await verdict(trust.verify, issuer.token(key=KEYS["ES256"])) == "good"
    told = await verdicts
    assert (told.count("UNAUTHENTICATED"), told.count("UNAVAILABLE")) == (MAX_WAITING, 1_000 - MAX_WAITING)
    assert issuer.asked == 2
    # The next ones wait for their time, together.
    began = trust.clock()
    assert await asyncio.gather(*(verdict(trust.verify, token) for token in made_up[:50])) == ["UNAUTHENTICATED"] * 50
    assert issuer.asked == 3
    assert trust.clock() - began < 10 * TIMES.cooldown_seconds


async def test_a_new_key_is_taken_though_strangers_have_just_made_up_others(trust: Trust, issuer: KeyServer) -> None:
    assert await verdict(trust.verify, issuer.token()) == "good"
    for _ in range(3):
        forged = [signing_key().sign(claims(issuer.name)), MINE.sign(claims(issuer.name))]
        assert await asyncio.gather(*(verdict(trust.verify, token) for token in forged)) == ["UNAUTHENTICATED"] * 2
        issuer.keys = [signing_key()]
        assert await verdict(trust.verify, issuer.token()) == "good"
    assert KeySetTimes().cooldown_seconds <= 30


async def test_signatures_that_do_not_fit_ask_once_in_a_while(trust: Trust, issuer: KeyServer) -> None:
    for _ in range(50):
        assert await verdict(trust.verify, MINE.sign(claims(issuer.name))) == "UNAUTHENTICATED"
    assert issuer.asked == 2


async def test_whoever_comes_at_once_waits_for_one_answer(trust: Trust, issuer: KeyServer) -> None:
    tokens = [issuer.token() for _ in range(50)]
    assert await asyncio.gather(*(verdict(trust.verify, token) for token in tokens)) == ["good"] * 50
    assert issuer.asked == 1


async def test_an_issuer_that_hangs_holds_nobody_else_up(trust: Trust, issuer: KeyServer) -> None:
    assert await verdict(trust.verify, issuer.token()) == "good"
    asked = asyncio.Event()
    let_go = asyncio.Event()

    async def hang(wire: Wire) -> None:
        asked.set()
        await let_go.wait()
        await issuer.publish(wire)

    issuer.answer = hang
    new = signing_key()
    issuer.keys.append(new)
    waiting = asyncio.create_task(verdict(trust.verify, issuer.token(key=new)))
    async with asyncio.timeout(10):
        await asked.wait()
    for algorithm in KEYS:
        assert await verdict(trust.verify, issuer.token(key=KEYS[algorithm])) == "good"
    assert not waiting.done()
    let_go.set()
    assert await waiting == "good"


async def redirected(wire: Wire) -> None:
    await wire.whole(302, b"", headers={"Location": f"http://{wire.request.headers['host']}/elsewhere"})


async def too_much(wire: Wire) -> None:
    await wire.head(content_type="application/json")
    for _ in range(MAX_KEY_SET_BYTES // 1_024 + 2):
        await wire.send(b" " * 1_024)
    await wire.end()


async def cut_off(wire: Wire) -> None:
    await wire.head(content_type="application/json")
    await wire.send(b'{"keys": [')
    wire.reset()


def saying(body: bytes) -> Callable[[Wire], Awaitable[None]]:
    async def answer(wire: Wire) -> None:
        await wire.whole(200, body)

    return answer


BAD_ANSWERS: dict[str, Callable[[Wire], Awaitable[None]]] = {
    "redirected": redirected,
    "too much": too_much,
    "cut off": cut_off,
    "nothing": saying(b""),
    "a page": saying(b"<html>"),
    "a list": saying(b"[]"),
    "no keys": saying(b"{}"),
    "keys null": saying(b'{"keys": null}'),
    "an empty set": saying(b'{"keys": []}'),
    "keys that are none": saying(b'{"keys": [1, null, "x", {}, {"kty": 5}, {"kty": "OKP", "crv": "Ed25519"}]}'),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_an_answer_that_is_no_key_set_changes_nothing(trust: Trust, issuer: KeyServer, name: str) -> None:
    issuer.answer = BAD_ANSWERS[name]
    token = issuer.token()
    assert await verdict(trust.verify, token) == "UNAVAILABLE"
    issuer.answer = issuer.publish
    trust.clock.seconds += TIMES.cooldown_seconds
    assert await verdict(trust.verify, token) == "good"
    issuer.answer = BAD_ANSWERS[name]
    assert not await trust.key_sets[0]._read()
    assert await verdict(trust.verify, issuer.token(key=KEYS["RS256"])) == "good"
    assert {request.path for request in issuer._server.requests} == {"/jwks"}


async def test_an_issuer_that_never_answers_is_given_up(issuer: KeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.issuers._FETCH_SECONDS", 0.2)
    issuer.answer = issuer.hang
    reader = KeySetReader()
    try:
        with pytest.raises(KeysUnavailableError, match="Timeout"):
            await reader.fetch(issuer.url)
    finally:
        await reader.close()


UNUSABLE_KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "for encryption": ("EdDSA", {"use": "enc"}),
    "for signing only": ("EdDSA", {"key_ops": ["sign"]}),
    "of an algorithm that is not taken": ("RS256", {"alg": "PS256"}),
    "of an algorithm that is not its own": ("EdDSA", {"alg": "ES256"}),
    "with an id that is too long": ("EdDSA", {"kid": "k" * 256}),
    "with an id that is no text": ("EdDSA", {"kid": 7}),
    "that is too short": ("RS256", {}),
    "that is a secret": ("EdDSA", {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "crv": None}),
}


@pytest.mark.parametrize("name", UNUSABLE_KEYS)
async def test_a_published_key_that_is_not_for_this_is_passed_over(trust: Trust, issuer: KeyServer, name: str) -> None:
    algorithm, members = UNUSABLE_KEYS[name]
    key = signing_key(algorithm, **members)
    if name == "that is too short":
        private = rsa.generate_private_key(65_537, 1_024)
        jwk = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
        key = SigningKey("RS256", private, jwk | {"kid": "short", "key_ops": ["verify"]})
    issuer.keys.insert(0, key)
    if name == "that is too short":
        with pytest.warns(jwt.InsecureKeyLengthWarning):
            token = key.sign(claims(issuer.name))
    else:
        kid = members.get("kid", key.jwk["kid"])
        token = key.sign(claims(issuer.name), kid=kid if isinstance(kid, str) else None)
    assert await verdict(trust.verify, token) == "UNAUTHENTICATED"
    assert await verdict(trust.verify, issuer.token(key=KEYS["EdDSA"])) == "good"


async def test_keys_are_read_again_without_being_asked(server: Server, issuer: KeyServer) -> None:
    times = KeySetTimes(refresh_seconds=0.02, retry_seconds=0.02)
    async with trusting(server, issuer, times=times) as trust:
        trust.key_sets[0].start()
        async with asyncio.timeout(10):
            while issuer.asked < 3:
                await asyncio.sleep(0.01)
            issuer.answer = issuer.fail
            asked = issuer.asked
            while issuer.asked < asked + 3:
                await asyncio.sleep(0.01)
        assert await verdict(trust.verify, issuer.token()) == "good"


# Users.


async def user_of(server: Server, sql: str, user_id: uuid.UUID) -> None:
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute(sql, user_id)
    finally:
        await connection.close()


DELETED = ["UPDATE users SET deleted_at = now() WHERE id = $1", "DELETE FROM users WHERE id = $1"]


@pytest.mark.parametrize("sql", DELETED)
async def test_the_token_of_a_deleted_user_is_refused_in_time(
    server: Server, trust: Trust, issuer: KeyServer, sql: str
) -> None:
    gone: list[uuid.UUID] = []
    trust.identities.when_gone(gone.append)
    session = await trust.sessions.start_anonymous()
    for token in (session.token, issuer.token()):
        viewer = await trust.verify(token)
        await user_of(server, sql, viewer.id)
        trust.clock.seconds += RECHECK_SECONDS
        assert await verdict(trust.verify, token) == "UNAUTHENTICATED"
        assert gone.pop() == viewer.id
        if token == session.token or "deleted_at" in sql:
            assert await verdict(trust.verify, token) == "UNAUTHENTICATED", "and from now on"


async def test_a_user_who_is_said_to_be_gone_is_refused_at_once(server: Server, trust: Trust) -> None:
    session = await trust.sessions.start_anonymous()
    assert await trust.verify(session.token) == session.viewer
    await user_of(server, DELETED[1], session.viewer.id)
    trust.identities.forget(session.viewer.id)
    assert await verdict(trust.verify, session.token) == "UNAUTHENTICATED"


async def test_a_deletion_is_looked_for_once_in_a_while_and_not_at_every_request(
    trust: Trust, issuer: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0
    living = trust.identities.living

    async def counted(users: Any) -> Any:
        nonlocal looked
        looked += 1
        return await living(users)

    monkeypatch.setattr(trust.identities, "living", counted)
    token = issuer.token()
    for _ in range(50):
        await trust.verify(token)
    assert looked == 0
    trust.clock.seconds += RECHECK_SECONDS
    await asyncio.gather(*(trust.verify(token) for _ in range(50)))
    assert looked == 1


async def test_remembered_tokens_are_bounded(trust: Trust, issuer: KeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.identity._CACHED_TOKENS", 5)
    tokens = [issuer.token("Ann", jti=str(number)) for number in range(8)]
    for token in tokens * 2:
        await trust.verify(token)
    assert len(trust.identities._verified) == 5


# A shared secret.


def sharing(
    server: Server, name: str | None = None, audience: str | None = None, secret: str = SHARED_SECRET
) -> Identities:
    sessions = Sessions(server.database, secret="s" * 32, ttl_seconds=600, allowed=True)
    keys = SharedSecret(secret)
    return Identities(server.database, sessions, [Issuer(name=name, audience=audience, keys=keys, leeway_seconds=0)])


async def test_a_shared_secret_signs_for_any_issuer_unless_one_is_named(server: Server) -> None:
    def token(issuer: str, **changes: Any) -> str:
        return jwt.encode(claims(issuer, "Ann", **changes), SHARED_SECRET, "HS256")

    anyone = sharing(server)
    assert (await anyone.verify(token("one"))).id != (await anyone.verify(token("two"))).id
    assert await verdict(anyone.verify, token("threadgraph")) == "UNAUTHENTICATED"
    assert await verdict(anyone.verify, token("x" * 256)) == "UNAUTHENTICATED"
    assert await verdict(anyone.verify, token("x\0")) == "UNAUTHENTICATED"
    named = sharing(server, "one", "chat")
    assert await verdict(named.verify, token("one")) == "good"
    assert await verdict(named.verify, token("two")) == "UNAUTHENTICATED"
    assert await verdict(named.verify, token("one", aud="shop")) == "UNAUTHENTICATED"


async def test_a_shared_secret_takes_hs256_alone(server: Server) -> None:
    long = "x" * 64
    verify = sharing(server, secret=long).verify
    assert await verdict(verify, jwt.encode(claims("app"), long, "HS256")) == "good"
    for algorithm in ("HS384", "HS512"):
        assert await verdict(verify, jwt.encode(claims("app"), long, algorithm)) == "UNAUTHENTICATED"
    assert await verdict(verify, KEYS["EdDSA"].sign(claims("app"))) == "UNAUTHENTICATED"
    assert await verdict(verify, jwt.encode(claims("app"), "another secret that is long enough", "HS256")) == (
        "UNAUTHENTICATED"
    )
    assert await verdict(verify, raw_token({"alg": "none"}, claims("app"))) == "UNAUTHENTICATED"


# Settings.

UNFIT: list[tuple[str, dict[str, Any]]] = [
    ("have 1, 0 and 0 entries", {"auth_jwks_url": ("https://a.example",)}),
    ("have 0, 1 and 0 entries", {"auth_issuer": ("a",)}),
    ("have 0, 0 and 1 entries", {"auth_audience": ("a",)}),
    (
        "have 2, 2 and 1 entries",
        {"auth_jwks_url": ("https://a.example",) * 2, "auth_issuer": ("a", "b"), "auth_audience": ("c",)},
    ),
    (
        "names an issuer twice",
        {"auth_jwks_url": ("https://a.example",) * 2, "auth_issuer": ("a", "a"), "auth_audience": ("c", "d")},
    ),
    (
        "anonymous sessions",
        {"auth_jwks_url": ("https://a.example",), "auth_issuer": ("threadgraph",), "auth_audience": ("c",)},
    ),
    ("set one of the two", {"auth_jwks_url": ("https://a.example",), "auth_shared_secret": SHARED_SECRET}),
    ("at most one of each", {"auth_issuer": ("a", "b"), "auth_shared_secret": SHARED_SECRET}),
    ("at most one of each", {"auth_audience": ("a", "b"), "auth_shared_secret": SHARED_SECRET}),
    ("anonymous sessions", {"auth_issuer": ("threadgraph",), "auth_shared_secret": SHARED_SECRET}),
]


@pytest.mark.parametrize(("expected", "given"), UNFIT)
async def test_settings_that_do_not_fit_together_stop_the_start(
    database_url: str, tmp_path: Path, expected: str, given: dict[str, Any]
) -> None:
    settings = test_settings(database_url, tmp_path, **({"auth_shared_secret": None} | given))
    with pytest.raises(SettingsError, match=rf"^AUTH_.*{expected}") as refused:
        await Server(settings).start()
    assert SHARED_SECRET not in str(refused.value)


async def test_an_issuer_that_names_no_audience_is_said_to_by_a_star(database_url: str, tmp_path: Path) -> None:
    settings = test_settings(
        database_url,
        tmp_path,
        auth_shared_secret=None,
        auth_jwks_url=("https://a.example/1", "https://a.example/2"),
        auth_issuer=("a", "b"),
        auth_audience=("chat", "*"),
    )
    first, second = issuers(settings, KeySetReader().fetch)
    assert (first.name, first.audience) == ("a", "chat")
    assert (second.name, second.audience) == ("b", None)
    assert first.leeway_seconds <= 60
