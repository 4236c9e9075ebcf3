"""Users' own keys: they go in and never come out; one that cannot be read disables its provider and nothing else.

CHECKLIST S51 (a canary key), S52, S53.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import orjson
import pytest

from server.runtime import Server
from services import provider_keys
from services.encryption import Vault
from services.provider_keys import MAX_KEY_CHARS, ProviderKeys
from tests.accounts import download, key_of
from tests.client import Client, GraphQLErrors
from tests.unit.test_logs import server_log

CANARY = "sk-canary-4f1e7b2a9c8d6035-wxyz"
KEY = "provider lastFour usable problem createdAt updatedAt"
SET = f"mutation($input: SetProviderKeyInput!) {{ setProviderKey(input: $input) {{ providerKey {{ {KEY} }} }} }}"
DELETE = """
mutation($provider: String!) {
  deleteProviderKey(input: {provider: $provider}) { deletedProvider settings { providerKeys { provider } } }
}
"""
LIST = f"{{ settings {{ providerKeys {{ {KEY} }} }} }}"


@pytest.fixture
async def rows(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """The server's database."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


async def set_key(client: Client, key: Any = CANARY, provider: str = "openai") -> dict[str, Any]:
    payload = await client.run(SET, {"input": {"provider": provider, "key": key}})
    found: dict[str, Any] = payload["setProviderKey"]["providerKey"]
    return found


async def keys_of(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.run(LIST))["settings"]["providerKeys"]
    return found


async def opened(server: Server, client: Client) -> dict[str, str | None]:
    """The client's keys as a turn would use them."""
    async with server.database.acquire() as connection:
        found = await server.provider_keys.of(connection, key_of(client))
    return {name: key.key for name, key in found.items()}


async def refusal(attempt: Any) -> tuple[str, str | None]:
    with pytest.raises(GraphQLErrors) as refused:
        await attempt
    return refused.value.code, refused.value.extensions.get("field")


async def test_a_key_is_kept_shown_by_its_end_and_used(server: Server, client: Client, other: Client) -> None:
    assert await keys_of(client) == []
    made = await set_key(client)
    assert (made["provider"], made["lastFour"], made["usable"], made["problem"]) == ("openai", "wxyz", True, None)
    assert await keys_of(client) == [made]
    assert await opened(server, client) == {"openai": CANARY}
    assert await keys_of(other) == []
    assert await opened(server, other) == {}


async def test_a_key_in_the_place_of_another_is_the_one_that_is_used(server: Server, client: Client) -> None:
    first = await set_key(client)
    second = await set_key(client, "another-key-5678")
    assert (second["lastFour"], second["createdAt"]) == ("5678", first["createdAt"])
    assert second["updatedAt"] > first["updatedAt"]
    assert len(await keys_of(client)) == 1
    assert await opened(server, client) == {"openai": "another-key-5678"}


async def test_a_key_is_forgotten_once(server: Server, client: Client, rows: asyncpg.Connection) -> None:
    await set_key(client)
    await set_key(client, provider="groq")
    payload = (await client.run(DELETE, {"provider": "openai"}))["deleteProviderKey"]
    assert payload == {"deletedProvider": "openai", "settings": {"providerKeys": [{"provider": "groq"}]}}
    assert await refusal(client.run(DELETE, {"provider": "openai"})) == ("NOT_FOUND", "provider")
    assert await opened(server, client) == {"groq": CANARY}
    assert await rows.fetchval("SELECT count(*) FROM provider_keys WHERE owner_id = $1", key_of(client)) == 1


@pytest.mark.parametrize(("key", "shown"), [("12345678901", ""), ("123456789012", "9012"), ("x", "")])
async def test_of_a_short_key_nothing_is_shown(client: Client, key: str, shown: str) -> None:
    assert (await set_key(client, key))["lastFour"] == shown


async def test_blanks_around_a_key_are_no_part_of_it(server: Server, client: Client) -> None:
    await set_key(client, f" \t{CANARY}\n")
    assert await opened(server, client) == {"openai": CANARY}


@pytest.mark.parametrize(
    "key",
    ["", " ", "\n\t ", "a b", "a\r\nX-Evil: 1", "ключ", "a\u200bb", "a\0b", "x" * (MAX_KEY_CHARS + 1)],
    ids=["empty", "blank", "white", "inner blank", "header", "letters", "invisible", "NUL", "long"],
)
async def test_what_can_be_no_key_is_refused_and_the_one_before_stays(server: Server, client: Client, key: str) -> None:
    await set_key(client)
    assert await refusal(set_key(client, key)) == ("BAD_USER_INPUT", "key")
    assert await opened(server, client) == {"openai": CANARY}
    assert await refusal(set_key(client, key, "groq")) == ("BAD_USER_INPUT", "key")
    assert len(await keys_of(client)) == 1


async def test_the_longest_key_is_kept(server: Server, client: Client) -> None:
    await set_key(client, "x" * MAX_KEY_CHARS)
    assert await opened(server, client) == {"openai": "x" * MAX_KEY_CHARS}


@pytest.mark.parametrize("provider", ["nobody", "", "OpenAI", "custom:mine", "openai\0"])
async def test_an_unknown_provider_is_refused(client: Client, provider: str) -> None:
    assert await refusal(set_key(client, provider=provider)) == ("BAD_USER_INPUT", "provider")
    assert await refusal(client.run(DELETE, {"provider": provider})) == ("NOT_FOUND", "provider")


# How a ciphertext comes to be unreadable, as SQL on the key for openai of user $1. Both users have one for groq, too.
ONE = "owner_id = $1 AND provider = 'openai'"
BROKEN = {
    "cut off": "UPDATE provider_keys SET ciphertext = substr(ciphertext, 1, 30) WHERE {ONE}",
    "empty": "UPDATE provider_keys SET ciphertext = '' WHERE {ONE}",
    "a flipped bit": "UPDATE provider_keys SET ciphertext = set_bit(ciphertext, 200, 1 - get_bit(ciphertext, 200)) "
    "WHERE {ONE}",
    "of another version": "UPDATE provider_keys SET ciphertext = set_byte(ciphertext, 0, 7) WHERE {ONE}",
    "of an unknown key": "UPDATE provider_keys SET ciphertext = set_byte(ciphertext, 3, 255 - get_byte(ciphertext, 3)) "
    "WHERE {ONE}",
    "another user's": "UPDATE provider_keys mine SET ciphertext = theirs.ciphertext FROM provider_keys theirs "
    "WHERE mine.owner_id = $1 AND theirs.owner_id = $2 AND mine.provider = 'openai' AND theirs.provider = 'openai'",
    "another provider's": "UPDATE provider_keys mine SET ciphertext = other.ciphertext FROM provider_keys other "
    "WHERE mine.owner_id = $1 AND other.owner_id = $1 AND mine.provider = 'openai' AND other.provider = 'groq'",
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_key_that_cannot_be_read_disables_its_provider_and_nothing_else(
    server: Server, client: Client, other: Client, rows: asyncpg.Connection, how: str
) -> None:
    for who in (client, other):
        await set_key(who)
        await set_key(who, "the-key-of-groq", "groq")
    await rows.execute(
        BROKEN[how].replace("{ONE}", ONE), key_of(client), *([key_of(other)] if "$2" in BROKEN[how] else [])
    )
    with server_log() as logged:
        assert await opened(server, client) == {"openai": None, "groq": "the-key-of-groq"}
        groq, openai = await keys_of(client)
    assert (openai["usable"], openai["problem"]) == (False, "This key cannot be read any more; enter it again.")
    assert groq["usable"] is True
    assert "a user's key cannot be read" in logged.getvalue()
    assert CANARY not in logged.getvalue()
    assert await opened(server, other) == {"openai": CANARY, "groq": "the-key-of-groq"}
    # Everything else goes on, and entering it again mends it.
    turn = await client.send("Hello")
    assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
    assert (await set_key(client))["usable"] is True
    assert await opened(server, client) == {"openai": CANARY, "groq": "the-key-of-groq"}


async def test_a_key_that_cannot_be_read_is_logged_once_however_often_it_is_looked_at(
    server: Server, client: Client, other: Client, rows: asyncpg.Connection
) -> None:
    told = "a user's key cannot be read"
    for who in (client, other):
        await set_key(who)
        await rows.execute(BROKEN["a flipped bit"].replace("{ONE}", ONE), key_of(who))
    with server_log() as logged:
        for _ in range(3):
            await opened(server, client)
            await keys_of(client)
        turn = await client.send("Hello")
        await client.finish(turn["assistantMessage"]["id"])
        assert logged.getvalue().count(told) == 1
        await opened(server, other)
        assert logged.getvalue().count(told) == 2
        # One that was entered again and is lost again is news.
        await set_key(client)
        await rows.execute(BROKEN["a flipped bit"].replace("{ONE}", ONE), key_of(client))
        await opened(server, client)
        await opened(server, other)
        assert logged.getvalue().count(told) == 3


def test_no_more_than_so_many_unreadable_keys_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_keys, "_MAX_LOGGED", 2)
    keys = ProviderKeys(None, Vault([bytes(32)]), tuple)  # type: ignore[arg-type]
    owner = uuid4()
    with server_log() as logged:
        for ciphertext in (b"1", b"2", b"3", b"3", b"2", b"1"):
            assert keys.opened(owner, "openai", ciphertext, "").key is None
    assert logged.getvalue().count("a user's key cannot be read") == 4


async def test_a_key_of_a_provider_that_is_gone_is_shown_and_can_be_deleted(
    client: Client, rows: asyncpg.Connection
) -> None:
    await set_key(client)
    await rows.execute("UPDATE provider_keys SET provider = 'gone' WHERE owner_id = $1", key_of(client))
    (key,) = await keys_of(client)
    assert (key["usable"], key["problem"]) == (False, "This server has no provider of this name any more.")
    await client.run(DELETE, {"provider": "gone"})
    assert await keys_of(client) == []


# What clients do wrong with a key in their hands: documents with {canary} in them, and variables.
Attempt = tuple[str, Any]
_LITERAL = "mutation {{ setProviderKey(input: {}) {{ __typename }} }}"
ATTEMPTS: dict[str, Attempt] = {
    "in a list": (SET, {"input": {"provider": "openai", "key": [CANARY]}}),
    "in an object": (SET, {"input": {"provider": "openai", "key": {"key": CANARY}}}),
    "beside an unknown field": (SET, {"input": {"provider": "openai", "key": CANARY, "owner": 1}}),
    "beside a misspelt field": (SET, {"input": {"provder": "openai", "key": CANARY}}),
    "without its provider": (SET, {"input": {"key": CANARY}}),
    "as the input": (SET, {"input": CANARY}),
    "as one of several inputs": (SET, {"input": [CANARY]}),
    "for an unknown provider": (SET, {"input": {"provider": "nobody", "key": CANARY}}),
    "with a blank in it": (SET, {"input": {"provider": "openai", "key": f"{CANARY} {CANARY}"}}),
    "too long": (SET, {"input": {"provider": "openai", "key": CANARY * 50}}),
    "in the place of the provider": (SET, {"input": {"provider": CANARY, "key": ""}}),
    "in the document, unquoted": (_LITERAL.format(f'{{provider: "openai", key: {CANARY.replace("-", "_")}}}'), None),
    "in the document, without its colon": (_LITERAL.format(f'{{provider: "openai", key "{CANARY}"}}'), None),
    "in the document, as JSON": (_LITERAL.format(f'{{"{CANARY}": "openai"}}'), None),
    "in the document, in a list": (_LITERAL.format(f'{{provider: "openai", key: ["{CANARY}"]}}'), None),
    "in the document, as the input": (_LITERAL.format(f'"{CANARY}"'), None),
    "in the document, with an unknown field": (
        _LITERAL.format(f'{{provider: "openai", key: "{CANARY}", owner: 1}}'),
        None,
    ),
    "in the document, unended": (_LITERAL.format(f'{{provider: "openai", key: "{CANARY}'), None),
    "in the document, as a block beside another": (_LITERAL.format(f'{{key: """a""" """{CANARY}"""}}'), None),
    "as a default": (
        f'mutation($i: SetProviderKeyInput! = {{key: "{CANARY}"}}) {{ setProviderKey(input: $i) {{ __typename }} }}',
        None,
    ),
    "of a custom provider": (
        "mutation($i: SaveCustomProviderInput!) { saveCustomProvider(input: $i) { __typename } }",
        {"i": {"slug": "canary", "name": "x", "baseUrl": "https://a.example", "key": [CANARY]}},
    ),
    "in the place of an enum's value": (
        "mutation($i: SaveCustomProviderInput!) { saveCustomProvider(input: $i) { __typename } }",
        {"i": {"slug": "canary", "name": "x", "baseUrl": "https://a.example", "format": CANARY}},
    ),
    "in the document, in the place of an enum's value": (
        "mutation { saveCustomProvider(input: "
        f'{{slug: "canary", name: "x", baseUrl: "https://a.example", format: {CANARY.replace("-", "_")}}}) '
        "{ __typename } }",
        None,
    ),
    "of a custom provider with a bad address": (
        "mutation($i: SaveCustomProviderInput!) { saveCustomProvider(input: $i) { __typename } }",
        {"i": {"slug": "canary", "name": "x", "baseUrl": "gopher://a.example", "key": CANARY}},
    ),
}


@pytest.mark.parametrize("transport", ["http", "socket"])
@pytest.mark.parametrize("how", ATTEMPTS)
async def test_no_error_and_no_log_repeats_a_key(client: Client, how: str, transport: str) -> None:
    query, variables = ATTEMPTS[how]
    with server_log() as logged:
        if transport == "http":
            status, body = await client.post(query, variables)
            assert status in (200, 400)
            answer = orjson.dumps(body)
            assert body["errors"][0]["extensions"]["code"] != "INTERNAL_SERVER_ERROR"
        else:
            async with client.subscribe(query, variables or {}) as operation:
                with pytest.raises(GraphQLErrors) as refused:
                    await operation.next()
            answer = orjson.dumps(refused.value.errors)
    for secret in (CANARY, CANARY.replace("-", "_"), CANARY[:14]):
        assert secret.encode() not in answer
        assert secret not in logged.getvalue()
    assert await keys_of(client) == []


async def test_a_key_is_in_no_answer_log_export_document_or_row(
    server: Server, client: Client, rows: asyncpg.Connection
) -> None:
    """S51: everything that a key goes through, and whatever could hold it afterwards."""
    seen: list[bytes] = []
    inline = (
        f'mutation {{ setProviderKey(input: {{provider: "google", key: "{CANARY}"}}) {{ providerKey {{ {KEY} }} }} }}'
    )
    custom = (
        "mutation($i: SaveCustomProviderInput!) { saveCustomProvider(input: $i) "
        "{ customProvider { slug lastFour problem } } }"
    )
    given = {"slug": "kept", "name": "x", "baseUrl": "https://a.example", "key": CANARY}
    with server_log() as logged:
        for query, variables in (
            (SET, {"input": {"provider": "openai", "key": CANARY}}),
            (inline, None),
            (custom, {"i": given}),
            (LIST, None),
            ("{ settings { customProviders { slug baseUrl lastFour problem } } }", None),
        ):
            status, body = await client.post(query, variables)
            assert (status, body.get("errors")) == (200, None)
            seen.append(orjson.dumps(body))
        turn = await client.send("Hello")
        await client.finish(turn["assistantMessage"]["id"])
        exported = await download(client)
    assert await opened(server, client) == {"openai": CANARY, "google": CANARY, "custom:kept": CANARY}
    with zipfile.ZipFile(io.BytesIO(exported)) as file:
        seen += [file.read(name) for name in file.namelist()]
    ciphertexts = await rows.fetch("SELECT ciphertext FROM provider_keys WHERE owner_id = $1", key_of(client))
    assert len(ciphertexts) == 3
    assert not any(
        ciphertext["ciphertext"][9:].hex().encode() in content for ciphertext in ciphertexts for content in seen
    )
    # Four characters are shown, and no more of it.
    assert not any(CANARY[start : start + 5].encode() in text for text in seen for start in range(len(CANARY) - 4))
    assert CANARY[:10] not in logged.getvalue()
    tables = await rows.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    for (table,) in tables:
        # As text, as a dump has it: bytes in hexadecimal digits.
        for secret in (CANARY, CANARY.encode().hex(), CANARY[:12]):
            found = await rows.fetchval(f"SELECT count(*) FROM {table} t WHERE strpos(t::text, $1) > 0", secret)
            assert found == 0, table
    files = [file for file in server.settings.data_dir.rglob("*") if file.is_file() and "postgres" not in file.parts]
    assert files
    assert not any(CANARY.encode() in file.read_bytes() for file in files)


async def test_the_schema_has_no_field_that_gives_a_key_back(client: Client) -> None:
    data = await client.run(
        "{ __schema { types { name kind fields { name type { name kind ofType { name kind } } } } } }"
    )
    texts = {
        f"{kind['name']}.{field['name']}"
        for kind in data["__schema"]["types"]
        if kind["kind"] == "OBJECT" and not kind["name"].startswith("__")
        for field in kind["fields"]
        if "key" in field["name"].lower() and "Key" not in str(field["type"]["ofType"])
    }
    assert texts <= {
        "Settings.providerKeys",
        "Model.ownKey",
        "SaveCustomProviderPayload.keyDropped",
        "SetProviderKeyPayload.providerKey",
    }
