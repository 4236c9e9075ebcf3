"""What a link shows, to whom, for how long; and what it never shows."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
from graphql import (
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLUnionType,
    get_named_type,
)

from graph.schema import build_schema
from models.ids import IdKind, new_id, parse_id
from models.records import SharedThreadRecord
from server.runtime import Server
from services.errors import NotFoundError
from services.paging import SharedPosition, page_request
from tests.api.test_attachments import DELETE, DELETE_THREAD, png
from tests.api.test_forks import changes, counted, ended, fork, long_thread, said
from tests.api.test_model_prompts import SEES, asked, pdf, sent, told
from tests.client import SELECT, Client, GraphQLErrors

SCHEMA = build_schema()._schema
SHARE_FIELDS = "id token title includesAttachments expiresAt createdAt messageCount thread { id }"
SHARE = f"mutation($input: ShareThreadInput!) {{ shareThread(input: $input) {{ share {{ {SHARE_FIELDS} }} }} }}"
REVOKE = "mutation($id: ID!) { revokeShare(input: {shareId: $id}) { revokedShareId thread { id shares { id } } } }"
SHARES = f"query($id: ID!) {{ thread(id: $id) {{ shares {{ {SHARE_FIELDS} }} }} }}"
FORK_SHARED = "mutation($token: String!) { forkSharedThread(input: {token: $token}) { thread { id title } } }"
FILE_FACTS = """
query($id: ID!) {
  thread(id: $id) {
    messages { nodes { parts { ... on FilePart { attachment { name size tokens pages width height } } } } }
  }
}
"""
PARTS = """
  __typename
  ... on TextPart { text } ... on ReasoningPart { text } ... on ToolPart { callId name arguments result }
  ... on SourcePart { url title }
"""
SHARED = f"""
query($token: String!, $first: Int, $after: Cursor, $last: Int, $before: Cursor) {{
  sharedThread(token: $token) {{
    title includesAttachments expiresAt createdAt
    messages(first: $first, after: $after, last: $last, before: $before) {{
      edges {{ cursor node {{ position role status parts {{ {PARTS} }} text model {{ id name }} createdAt }} }}
      pageInfo {{ hasNextPage hasPreviousPage startCursor endCursor }}
      nodes {{ position text }}
    }}
  }}
}}
"""


@pytest.fixture
async def database(server: Server) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


async def share(client: Client, thread_id: str, **more: Any) -> dict[str, Any]:
    made = await client.run(SHARE, {"input": {"threadId": thread_id} | more})
    link: dict[str, Any] = made["shareThread"]["share"]
    return link


async def read(client: Client, token: str, **page: Any) -> dict[str, Any] | None:
    shared: dict[str, Any] | None = (await client.run(SHARED, {"token": token, "first": 100} | page))["sharedThread"]
    return shared


async def texts(client: Client, token: str) -> list[str]:
    """What a link shows."""
    shared = await read(client, token)
    assert shared
    return [node["text"] for node in shared["messages"]["nodes"]]


async def shares(client: Client, thread_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.run(SHARES, {"id": thread_id}))["thread"]["shares"]
    return found


async def fork_shared(client: Client, token: str) -> dict[str, Any]:
    forked: dict[str, Any] = (await client.run(FORK_SHARED, {"token": token}))["forkSharedThread"]["thread"]
    return forked


async def is_closed(client: Client, token: str) -> bool:
    """Whether a token opens nothing: read or forked."""
    with pytest.raises(GraphQLErrors) as refused:
        await fork_shared(client, token)
    assert (refused.value.code, refused.value.extensions["field"]) == ("NOT_FOUND", "token")
    return await read(client, token) is None


@pytest.fixture
async def thread(client: Client) -> str:
    """A thread with an answer of several kinds of parts."""
    turn = await ended(client, await client.send("Look it up", model="thinks-and-calls"))
    return str(turn["thread"]["id"])


async def test_a_link_shows_the_active_path_as_it_was_to_anybody(client: Client, nobody: Client) -> None:
    turn = await ended(client, await client.send("One", model="thinks-and-calls"))
    thread = turn["thread"]["id"]
    await ended(client, await client.edit(turn["userMessage"]["id"], "Another branch"))
    await client.run(SELECT, {"id": turn["userMessage"]["id"]})
    await ended(client, await client.send("Two", model="fails-midway", threadId=thread))
    path = await client.path(thread)
    link = await share(client, thread)
    assert (link["title"], link["includesAttachments"], link["expiresAt"], link["messageCount"]) == (
        "One",
        False,
        None,
        4,
    )
    assert link["thread"] == {"id": thread}
    shared = await read(nobody, link["token"])
    assert shared
    assert {key: shared[key] for key in ("title", "includesAttachments", "expiresAt", "createdAt")} == {
        "title": "One",
        "includesAttachments": False,
        "expiresAt": None,
        "createdAt": link["createdAt"],
    }
    shown = [edge["node"] for edge in shared["messages"]["edges"]]
    assert [node["position"] for node in shown] == [0, 1, 2, 3]
    for node, message in zip(shown, path, strict=True):
        for field in ("role", "status", "parts", "text", "createdAt"):
            assert node[field] == message[field]
        assert (node["model"] and node["model"]["id"]) == (message["model"] and message["model"]["id"])
    assert "Another branch" not in str(shared)


async def test_what_happens_to_the_thread_later_does_not_reach_a_link(client: Client, nobody: Client) -> None:
    turn = await ended(client, await client.send("One"))
    thread = turn["thread"]["id"]
    token = (await share(client, thread))["token"]
    before = await read(nobody, token)
    await ended(client, await client.send("Later", threadId=thread))
    await ended(client, await client.retry(turn["assistantMessage"]["id"], model="scripted-echo"))
    await ended(client, await client.edit(turn["userMessage"]["id"], "Edited"))
    rename = 'mutation($id: ID!) { renameThread(input: {threadId: $id, title: "Renamed"}) { thread { id } } }'
    await client.run(rename, {"id": thread})
    assert await read(nobody, token) == before
    newer = await share(client, thread)
    assert (newer["title"], await texts(nobody, newer["token"])) == ("Renamed", ["Edited", "Hello world"])


async def test_an_answer_that_is_being_written_is_not_shared_also_when_it_has_ended(
    client: Client, nobody: Client
) -> None:
    turn = await ended(client, await client.send("One"))
    thread = turn["thread"]["id"]
    live = await client.send("Two", model="hangs", threadId=thread)
    link = await share(client, thread)
    assert link["messageCount"] == 3
    assert await texts(nobody, link["token"]) == ["One", "Hello world", "Two"]
    await client.stop(live["assistantMessage"]["id"])
    assert await texts(nobody, link["token"]) == ["One", "Hello world", "Two"]


async def test_a_snapshot_is_of_one_moment(client: Client, nobody: Client) -> None:
    turn = await ended(client, await client.send("One"))
    thread = turn["thread"]["id"]
    await ended(client, await client.send("One more", threadId=thread))
    edited = await ended(client, await client.edit(turn["userMessage"]["id"], "Two"))
    sides = [turn["userMessage"]["id"], edited["userMessage"]["id"]]
    made = await asyncio.gather(
        *(work for side in sides * 6 for work in (client.run(SELECT, {"id": side}), share(client, thread)))
    )
    paths = [["One", "Hello world", "One more", "Hello world"], ["Two", "Hello world"]]
    for link in made[1::2]:
        assert await texts(nobody, link["token"]) in paths


async def stored(database: asyncpg.Connection, link: dict[str, Any]) -> list[dict[str, Any]]:
    """All parts of a snapshot as they are stored."""
    rows = await database.fetch(
        "SELECT parts FROM share_messages WHERE share_id = $1 ORDER BY position", parse_id(IdKind.SHARE, link["id"])
    )
    return [part for row in rows for part in orjson.loads(row["parts"])]


FILES = """
query($token: String!) { sharedThread(token: $token) { messages { nodes {
  parts { __typename ... on SharedFilePart { name contentType size path } ... on TextPart { text } }
} } } }
"""


async def files_of(caller: Client, token: str) -> list[dict[str, Any]]:
    """The file parts that anybody with the token is shown."""
    nodes = (await caller.run(FILES, {"token": token}))["sharedThread"]["messages"]["nodes"]
    return [part for node in nodes for part in node["parts"] if part["__typename"] == "SharedFilePart"]


async def content(caller: Client, path: str) -> bytes | int:
    """What a browser gets there, or the status that refuses it."""
    async with caller.http.get(caller.address + path) as response:
        return await response.read() if response.status == 200 else response.status


async def test_files_are_in_a_snapshot_where_that_was_chosen_and_never_by_their_owners_id(
    client: Client, other: Client, nobody: Client, database: asyncpg.Connection
) -> None:
    bytes_of = {name: f"{name} {new_id()}".encode() for name in ("plan.txt", "notes.txt")}
    sent = [await client.upload(bytes_of[name], name) for name in bytes_of]
    turn = await ended(client, await client.send("Read these", attachmentIds=[one["id"] for one in sent]))
    without = await share(client, turn["thread"]["id"])
    assert await files_of(nobody, without["token"]) == []
    assert await content(nobody, f"/shared/{without['token']}/files/0") == 404
    given = await share(client, turn["thread"]["id"], includeAttachments=True)
    assert given["includesAttachments"] is True
    shown = await files_of(nobody, given["token"])
    assert [(file["name"], file["size"]) for file in shown] == [(name, len(bytes_of[name])) for name in bytes_of]
    assert [await content(nobody, file["path"]) for file in shown] == list(bytes_of.values())
    kept = str(await stored(database, given))
    assert not any(one["id"].split("_")[1] in kept for one in sent)
    for wrong in ("2", "999999999", "-1", "x", "0/..", "9" * 30):
        assert await content(nobody, f"/shared/{given['token']}/files/{wrong}") == 404
    # A fork has files of its own, whatever becomes of the thread, the link and the sharer's attachments.
    forked = await fork_shared(other, given["token"])
    await client.run(REVOKE, {"id": given["id"]})
    assert [await content(nobody, file["path"]) for file in shown] == [404, 404]
    await client.run(DELETE_THREAD, {"id": turn["thread"]["id"]})
    mine = """
    query($id: ID!) { thread(id: $id) { messages { nodes { parts { ... on FilePart { attachment { id url } } } } } } }
    """
    nodes = (await other.run(mine, {"id": forked["id"]}))["thread"]["messages"]["nodes"]
    attachments = [part["attachment"] for node in nodes for part in node["parts"] if part]
    assert len(attachments) == 2
    for attachment, expected in zip(attachments, bytes_of.values(), strict=True):
        assert attachment["id"] not in [one["id"] for one in sent]
        async with other.http.get(attachment["url"]) as response:
            assert await response.read() == expected
    plain = await fork_shared(other, without["token"]) if await read(nobody, without["token"]) else None
    assert plain is None, "the links of a deleted thread are gone with it"


async def test_a_file_that_is_deleted_stays_in_the_links_that_show_it_and_is_in_no_later_one(
    client: Client, nobody: Client
) -> None:
    given = await client.upload(b"Some words.", "w.txt")
    turn = await ended(client, await client.send("Read this", attachmentIds=[given["id"]]))
    before = await share(client, turn["thread"]["id"], includeAttachments=True)
    await client.run(DELETE, {"id": given["id"]})
    (shown,) = await files_of(nobody, before["token"])
    assert await content(nobody, shown["path"]) == b"Some words."
    after = await share(client, turn["thread"]["id"], includeAttachments=True)
    assert await files_of(nobody, after["token"]) == []
    await client.run(REVOKE, {"id": before["id"]})
    assert await content(nobody, shown["path"]) == 404


async def test_instructions_to_the_model_are_not_shared(
    client: Client, nobody: Client, database: asyncpg.Connection
) -> None:
    thread, root, question = new_id(), new_id(), new_id()
    owner = parse_id(IdKind.USER, client.id)
    await database.execute(
        "INSERT INTO threads (id, owner_id, title, title_source) VALUES ($1, $2, 'T', 'TEXT')", thread, owner
    )
    for key, parent, depth, role in ((root, None, 0, "SYSTEM"), (question, root, 1, "USER")):
        await database.execute(
            """
            INSERT INTO messages (id, owner_id, thread_id, parent_id, depth, active, role, status, parts)
            VALUES ($1, $2, $3, $4, $5, true, $6::text, 'COMPLETE', jsonb_build_array(
                jsonb_build_object('type', 'text', 'text', $6::text)))
            """,
            *(key, owner, thread, parent, depth, role),
        )
    link = await share(client, f"thread_{thread.hex}")
    shared = await read(nobody, link["token"])
    assert shared
    assert [(node["position"], node["text"]) for node in shared["messages"]["nodes"]] == [(0, "USER")]


async def test_a_title_and_an_end_can_be_given_and_bad_ones_change_nothing(
    client: Client, nobody: Client, thread: str
) -> None:
    link = await share(client, thread, title=" For \n you ", expiresAt="2032-01-01T00:00:00+02:00")
    shared = await read(nobody, link["token"])
    assert shared
    assert shared["title"] == link["title"] == "For you"
    assert shared["expiresAt"] == link["expiresAt"]
    assert link["expiresAt"].startswith("2031-12-31T22:00:00")
    for field, value, code in (
        ("title", "", "BAD_USER_INPUT"),
        ("title", "a\0", "BAD_USER_INPUT"),
        ("title", "é" * 401, "PAYLOAD_TOO_LARGE"),
        ("expiresAt", "2020-01-01T00:00:00Z", "BAD_USER_INPUT"),
        ("expiresAt", "0001-01-01T00:00:00+14:00", "BAD_USER_INPUT"),
        ("expiresAt", "9999-12-31T23:59:59-14:00", "BAD_USER_INPUT"),
    ):
        with pytest.raises(GraphQLErrors) as refused:
            await share(client, thread, **{field: value})
        assert (refused.value.code, refused.value.extensions["field"]) == (code, field), value
    with pytest.raises(GraphQLErrors) as refused:
        await share(client, thread, expiresAt="tomorrow")
    assert refused.value.code == "BAD_USER_INPUT"
    assert len(await shares(client, thread)) == 1


@pytest.mark.parametrize("bad", ["", "thread_", "message_" + "0" * 32, "thread_" + "G" * 32, "x" * 100_000, "🦉"])
async def test_what_is_no_id_of_the_kind_is_bad_input(client: Client, bad: str) -> None:
    for field, query in (("threadId", SHARE), ("shareId", REVOKE)):
        with pytest.raises(GraphQLErrors) as refused:
            await client.run(query, {"input": {"threadId": bad}, "id": bad})
        assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", field)


def near_misses(token: str) -> Iterator[str]:
    """Tokens that are almost this one."""
    yield token.swapcase()
    yield token[:-1]
    yield token[1:]
    yield token + "="
    yield token + "A"
    yield f" {token}"
    yield f"{token}\n"
    yield token[:20] + ("B" if token[20] == "A" else "A") + token[21:]
    # The last character of 32 bytes in base64 has two bits to spare: another spelling is another token.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    yield token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]
    yield token.replace("-", "+").replace("_", "/") + "=="
    yield f"{token}\0"
    yield "\N{FULLWIDTH LATIN SMALL LETTER A}" + token[1:]
    yield from ("", "null", "%", "_" * 43, "A" * 43, "A" * 64, "A" * 65, "A" * 100_000, "' OR true --", "🦉")


async def test_only_the_very_token_opens_a_link(client: Client, thread: str) -> None:
    link = await share(client, thread)
    token = link["token"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    for guess in near_misses(token):
        assert guess != token
        assert await is_closed(client, guess), guess[:80]
    for guess in (link["id"], thread, client.id, link["id"].removeprefix("share_")):
        assert await is_closed(client, guess)
    assert await read(client, token)


async def test_every_link_has_a_token_of_its_own(client: Client, thread: str) -> None:
    links = [await share(client, thread) for _ in range(5)]
    assert len({link["token"] for link in links}) == 5
    assert await shares(client, thread) == links[::-1], "newest first"
    nodes = await client.run(
        f"query($ids: [ID!]!) {{ nodes(ids: $ids) {{ ... on Share {{ {SHARE_FIELDS} }} }} }}",
        {"ids": [link["id"] for link in links]},
    )
    assert nodes["nodes"] == links


async def test_a_link_ends_by_the_clock_of_the_database(
    client: Client, nobody: Client, thread: str, database: asyncpg.Connection
) -> None:
    link = await share(client, thread, expiresAt="2032-01-01T00:00:00Z")
    assert await texts(nobody, link["token"])
    await database.execute("UPDATE shares SET expires_at = now() WHERE id = $1", parse_id(IdKind.SHARE, link["id"]))
    assert await is_closed(client, link["token"])
    assert await shares(client, thread) == []
    assert (await client.run("query($id: ID!) { node(id: $id) { id } }", {"id": link["id"]}))["node"] is None


@pytest.mark.parametrize(
    "end",
    [
        "UPDATE threads SET expires_at = now() WHERE owner_id = $1",
        "UPDATE users SET deleted_at = now() WHERE id = $1",
        "DELETE FROM threads WHERE owner_id = $1",
        "DELETE FROM users WHERE id = $1",
    ],
)
async def test_a_link_ends_with_its_thread_and_with_its_owner(
    client: Client, other: Client, thread: str, database: asyncpg.Connection, end: str
) -> None:
    link = await share(client, thread)
    assert await texts(other, link["token"])
    await database.execute(end, parse_id(IdKind.USER, client.id))
    assert await is_closed(other, link["token"])
    if end.startswith("DELETE"):
        left = "SELECT count(*) FROM share_messages WHERE share_id = $1"
        assert await database.fetchval(left, parse_id(IdKind.SHARE, link["id"])) == 0


async def test_a_link_that_is_revoked_ends_at_once_also_between_two_pages(
    client: Client, nobody: Client, server: Server
) -> None:
    turn = await ended(client, await client.send("One"))
    thread = turn["thread"]["id"]
    await ended(client, await client.send("Two", threadId=thread))
    link, kept = await share(client, thread), await share(client, thread)
    page = await read(nobody, link["token"], first=2)
    assert page
    assert page["messages"]["pageInfo"]["hasNextPage"] is True
    sharing = server.application._http._services.sharing
    opened = await sharing.read(link["token"])
    assert isinstance(opened, SharedThreadRecord)
    revoked = (await client.run(REVOKE, {"id": link["id"]}))["revokeShare"]
    assert revoked == {"revokedShareId": link["id"], "thread": {"id": thread, "shares": [{"id": kept["id"]}]}}
    assert await read(nobody, link["token"], first=2, after=page["messages"]["pageInfo"]["endCursor"]) is None
    with pytest.raises(NotFoundError):
        # Inside of one operation: it was open when its title was read.
        await sharing.page(opened, page_request(SharedPosition.parse, 2, None, None, None))
    assert await is_closed(client, link["token"])
    assert len(await texts(nobody, kept["token"])) == 4


async def test_of_revocations_at_once_one_wins_and_the_others_find_nothing(client: Client, thread: str) -> None:
    link = await share(client, thread)
    outcomes = await asyncio.gather(
        *(client.run(REVOKE, {"id": link["id"]}) for _ in range(10)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, GraphQLErrors)]
    assert len(refused) == 9
    assert {(error.code, error.extensions["field"]) for error in refused} == {("NOT_FOUND", "shareId")}


async def test_a_thread_has_at_most_a_hundred_links_and_what_expired_makes_room(
    client: Client, thread: str, database: asyncpg.Connection
) -> None:
    outcomes = await asyncio.gather(*(share(client, thread) for _ in range(104)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, GraphQLErrors)]
    assert [(error.code, error.extensions["field"]) for error in refused] == [("BAD_USER_INPUT", "threadId")] * 4
    listed = await shares(client, thread)
    assert len(listed) == 100
    expired = parse_id(IdKind.SHARE, listed[50]["id"])
    await database.execute("UPDATE shares SET expires_at = now() WHERE id = $1", expired)
    newest = await share(client, thread)
    assert await shares(client, thread) == [newest, *listed[:50], *listed[51:]]
    assert await database.fetchval("SELECT count(*) FROM shares WHERE id = $1", expired) == 0
    with pytest.raises(GraphQLErrors):
        await share(client, thread)


async def test_a_thread_that_is_too_long_is_not_shared(client: Client, database: asyncpg.Connection) -> None:
    ids = await long_thread(database, client, 10_001)
    thread = await database.fetchval("SELECT thread_id FROM messages WHERE id = $1", ids[0])
    with pytest.raises(GraphQLErrors) as refused:
        await share(client, f"thread_{thread.hex}")
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "threadId")
    await database.execute("DELETE FROM messages WHERE id = $1", ids[-1])
    link = await share(client, f"thread_{thread.hex}")
    assert link["messageCount"] == 10_000
    page = await read(client, link["token"], first=None, last=2)
    assert page
    assert [node["text"] for node in page["messages"]["nodes"]] == ["message 9999", "message 10000"]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 100])
async def test_every_message_appears_once_however_a_link_is_paged(
    client: Client, nobody: Client, database: asyncpg.Connection, size: int, backwards: bool
) -> None:
    ids = await long_thread(database, client, 6)
    thread = await database.fetchval("SELECT thread_id FROM messages WHERE id = $1", ids[0])
    token = (await share(client, f"thread_{thread.hex}"))["token"]
    seen: list[int] = []
    cursor = None
    while True:
        arguments = {"last": size, "before": cursor, "first": None} if backwards else {"first": size, "after": cursor}
        shared = await read(nobody, token, **arguments)
        assert shared
        page = shared["messages"]
        positions = [edge["node"]["position"] for edge in page["edges"]]
        assert [node["position"] for node in page["nodes"]] == positions
        assert len(positions) <= size
        seen = positions + seen if backwards else seen + positions
        info = page["pageInfo"]
        assert (info["startCursor"], info["endCursor"]) == (page["edges"][0]["cursor"], page["edges"][-1]["cursor"])
        if not info["hasPreviousPage" if backwards else "hasNextPage"]:
            break
        cursor = info["startCursor" if backwards else "endCursor"]
    assert seen == list(range(6))
    empty = await read(nobody, token, after=SharedPosition(2**31 - 1).cursor())
    assert empty
    assert empty["messages"]["edges"] == []


async def test_a_page_of_a_link_that_makes_no_sense_is_refused(client: Client, nobody: Client, thread: str) -> None:
    token = (await share(client, thread))["token"]
    path = await client.run(
        "query($id: ID!) { thread(id: $id) { messages(first: 1) { pageInfo { endCursor } } } }", {"id": thread}
    )
    foreign = path["thread"]["messages"]["pageInfo"]["endCursor"]
    for page, code in (
        ({"after": foreign}, "CURSOR_INVALID"),
        ({"after": "x" * 1_000}, "CURSOR_INVALID"),
        ({"first": 101}, "BAD_USER_INPUT"),
        ({"first": 1, "last": 1}, "BAD_USER_INPUT"),
    ):
        with pytest.raises(GraphQLErrors) as refused:
            await read(nobody, token, **page)
        assert refused.value.code == code


# What a link leads to.


def reachable(start: str) -> dict[str, GraphQLNamedType]:
    """All types that can be come to from this one."""
    found: dict[str, GraphQLNamedType] = {}
    waiting = [SCHEMA.type_map[start]]
    while waiting:
        kind = waiting.pop()
        if kind.name in found:
            continue
        found[kind.name] = kind
        if isinstance(kind, GraphQLUnionType):
            waiting += kind.types
        elif isinstance(kind, GraphQLInterfaceType):
            waiting += SCHEMA.get_possible_types(kind)
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
            waiting += [get_named_type(field.type) for field in kind.fields.values()]
    return found


def test_no_type_that_a_link_leads_to_has_an_id_or_leads_to_one_that_has() -> None:
    kinds = reachable("SharedThread")
    assert {"SharedMessage", "TextPart", "PageInfo", "Model"} <= kinds.keys()
    assert not kinds.keys() & {"Thread", "Message", "Viewer", "Share", "Project", "Node", "Settings"}
    for kind in kinds.values():
        if isinstance(kind, GraphQLObjectType):
            assert kind.interfaces == (), kind.name
            ids = {name for name, field in kind.fields.items() if get_named_type(field.type).name == "ID"}
            assert ids == ({"id"} if kind.name == "Model" else set()), kind.name
            assert not {name for name in kind.fields if "owner" in name.lower() or "user" in name.lower()}


def everything_of(kind: GraphQLNamedType) -> str:
    """A selection of all that a type has, all the way down; nothing for a scalar."""
    if isinstance(kind, GraphQLUnionType):
        return f"{{ __typename {' '.join(f'... on {member.name} {everything_of(member)}' for member in kind.types)} }}"
    if not isinstance(kind, GraphQLObjectType):
        return ""
    fields = (f"{name} {everything_of(get_named_type(field.type))}" for name, field in kind.fields.items())
    return f"{{ __typename {' '.join(fields)} }}"


def strings(value: Any) -> Iterator[str]:
    """Every string in a response."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


async def test_nothing_that_a_link_shows_names_anything_of_the_sharers(
    client: Client, nobody: Client, database: asyncpg.Connection
) -> None:
    created = await client.run('mutation { createProject(input: {name: "P", prompt: "Be terse"}) { project { id } } }')
    project = created["createProject"]["project"]["id"]
    turn = await ended(client, await client.send("One", model="thinks-and-calls", projectId=project))
    thread = turn["thread"]["id"]
    await ended(client, await client.send("Two", model="fails-midway", threadId=thread))
    link = await share(client, thread, expiresAt="2032-01-01T00:00:00Z")
    everything = everything_of(SCHEMA.type_map["SharedThread"])
    query = f"query($token: String!) {{ sharedThread(token: $token) {everything} }}"
    shown = await nobody.run(query, {"token": link["token"]})
    assert shown["sharedThread"]["messages"]["nodes"][3]["status"] == "FAILED"
    body = orjson.dumps(shown).decode()
    owner = parse_id(IdKind.USER, client.id)
    keys: list[UUID] = [owner, parse_id(IdKind.SHARE, link["id"]), parse_id(IdKind.PROJECT, project)]
    for table in ("threads", "messages", "turns", "usage_events"):
        keys += [row["id"] for row in await database.fetch(f"SELECT id FROM {table} WHERE owner_id = $1", owner)]
    assert len(keys) > 10
    for key in keys:
        assert key.hex not in body
        assert str(key) not in body
    assert "Be terse" not in body
    # The owner may do most; even for them no string of it is an id.
    calls = [
        "query($id: ID!) { it: node(id: $id) { id } }",
        "query($id: ID!) { it: thread(id: $id) { id } }",
        "query($id: ID!) { it: message(id: $id) { id } }",
        "query($id: ID!) { it: project(id: $id) { id } }",
        "mutation($id: ID!) { it: forkThread(input: {messageId: $id}) { thread { id } } }",
        "mutation($id: ID!) { it: deleteThread(input: {threadId: $id}) { deletedThreadId } }",
        "mutation($id: ID!) { it: revokeShare(input: {shareId: $id}) { revokedShareId } }",
    ]
    found = set(strings(shown))
    assert len(found) > 10
    for text in found:
        for call in calls:
            with pytest.raises(GraphQLErrors) as refused:
                await client.run(call, {"id": text})
            assert refused.value.code == "BAD_USER_INPUT"
        assert (await client.run("query($t: String!) { sharedThread(token: $t) { title } }", {"t": text}))[
            "sharedThread"
        ] is None
    with pytest.raises(GraphQLErrors) as refused:
        await nobody.run(
            "query($id: ID!, $t: String!) { sharedThread(token: $t) { title } thread(id: $id) { id } }",
            {"id": thread, "t": link["token"]},
        )
    assert refused.value.code == "UNAUTHENTICATED"


async def test_a_link_is_read_whatever_the_authorization_says(
    client: Client, other: Client, nobody: Client, thread: str
) -> None:
    token = (await share(client, thread))["token"]
    shown = await read(client, token)
    assert shown == await read(other, token) == await read(nobody, token)
    query = "query($token: String!) { sharedThread(token: $token) { title } }"
    for authorization in ("Bearer not.a.token", "Basic x", "Bearer ", f"Bearer {client.token}x"):
        status, body = await nobody.post(query, {"token": token}, Authorization=authorization)
        assert (status, body) == (200, {"data": {"sharedThread": {"title": "Look it up"}}})
    params = {"query": query, "variables": orjson.dumps({"token": token}).decode()}
    async with nobody.http.get(nobody.url, params=params) as got:
        assert got.headers["Cache-Control"] == "no-store"
        assert (await got.json())["data"] == {"sharedThread": {"title": "Look it up"}}
    async with nobody.subscribe(query, {"token": token}) as operation:
        payload = await operation.next()
        assert payload == {"data": {"sharedThread": {"title": "Look it up"}}}


async def test_the_log_does_not_hold_a_token(
    client: Client, thread: str, caplog: pytest.LogCaptureFixture, server: Server
) -> None:
    caplog.set_level(logging.DEBUG)
    link = await share(client, thread)
    await read(client, link["token"])
    await fork_shared(client, link["token"])
    with pytest.raises(GraphQLErrors):
        await read(client, link["token"], after="nonsense")
    await client.run(REVOKE, {"id": link["id"]})
    assert await is_closed(client, link["token"])
    assert link["token"] not in caplog.text
    shared = await server.application._http._services.sharing.read((await share(client, thread))["token"])
    assert shared
    assert shared.token not in repr(shared)


# Forks of links.


async def test_a_link_can_be_gone_on_with_in_a_thread_of_ones_own(
    client: Client, other: Client, database: asyncpg.Connection
) -> None:
    turn = await ended(client, await client.send("One", model="thinks-and-calls"))
    thread = turn["thread"]["id"]
    await ended(client, await client.send("Two", model="fails-midway", threadId=thread))
    source = await client.path(thread)
    link = await share(client, thread, title="For you")
    before = await changes(database, client)
    used = await counted(database, client)
    forked = await fork_shared(other, link["token"])
    assert forked["title"] == "For you"
    copies = await other.path(forked["id"])
    for copy, message in zip(copies, source, strict=True):
        for field in ("role", "status", "parts", "text", "model", "createdAt"):
            assert copy[field] == message[field]
        assert (copy["usage"], copy["error"], copy["durationMs"]) == (None, None, None)
    assert {copy["id"] for copy in copies} & {message["id"] for message in source} == set()
    assert await counted(database, other) == []
    assert await changes(database, other) == [
        ("THREAD", parse_id(IdKind.THREAD, forked["id"])),
        *(("MESSAGE_ADDED", parse_id(IdKind.MESSAGE, copy["id"])) for copy in copies),
    ]
    assert (await changes(database, client), await counted(database, client)) == (before, used), (
        "the sharer is told nothing"
    )
    for theirs, mine in ((client, forked["id"]), (other, thread)):
        assert (await theirs.run("query($id: ID!) { thread(id: $id) { id } }", {"id": mine}))["thread"] is None
    await client.run(REVOKE, {"id": link["id"]})
    await ended(other, await other.send("And now?", threadId=forked["id"]))
    await ended(other, await other.retry(copies[3]["id"]))
    assert [message["text"] for message in await other.path(forked["id"])] == [
        *(copy["text"] for copy in copies[:3]),
        "Hello world",
    ]
    assert await client.path(thread) == source


async def test_models_are_sent_the_files_of_a_fork_as_those_of_its_source(
    server: Server, client: Client, other: Client
) -> None:
    given = [
        await client.upload(content, name)
        for name, content in (("p.png", png(2, 2)), ("d.pdf", pdf(3)), ("w.txt", b"Some words."))
    ]
    turn = await asked(client, attachmentIds=[one["id"] for one in given])
    question = (await told(server, turn, SEES)).messages[0]
    link = await share(client, turn["thread"]["id"], includeAttachments=True)
    forked = await fork_shared(other, link["token"])
    # And those of a fork of the fork, when the first files are gone.
    again = await share(other, forked["id"], includeAttachments=True)
    await client.run(DELETE_THREAD, {"id": turn["thread"]["id"]})
    for thread in (forked, await fork_shared(other, again["token"])):
        following = await asked(other, threadId=thread["id"])
        assert sent(await told(server, following, SEES)) == ["p.png", "d.pdf"]
        assert (await told(server, following, SEES)).messages[0] == question
        parts = (await other.run(FILE_FACTS, {"id": thread["id"]}))["thread"]["messages"]["nodes"][0]["parts"]
        facts = [part["attachment"] for part in parts if part]
        assert facts == [{key: one[key] for key in facts[0]} for one in given]


async def test_nothing_in_the_rows_of_a_fork_leads_to_the_sharer(
    client: Client, other: Client, database: asyncpg.Connection, thread: str
) -> None:
    link = await share(client, thread)
    forked = await fork_shared(other, link["token"])
    owner = parse_id(IdKind.USER, client.id)
    rows = await database.fetch("SELECT t::text FROM threads t WHERE id = $1", parse_id(IdKind.THREAD, forked["id"]))
    rows += await database.fetch(
        "SELECT m::text FROM messages m WHERE thread_id = $1", parse_id(IdKind.THREAD, forked["id"])
    )
    text = "".join(row[0] for row in rows)
    keys = [owner, parse_id(IdKind.THREAD, thread), parse_id(IdKind.SHARE, link["id"])]
    keys += [row["id"] for row in await database.fetch("SELECT id FROM messages WHERE owner_id = $1", owner)]
    assert len(rows) == 3
    for key in (*(str(key) for key in keys), link["token"]):
        assert key not in text


async def test_a_fork_of_a_link_can_be_shared_and_forked_again(client: Client, other: Client, thread: str) -> None:
    first = await fork_shared(other, (await share(client, thread))["token"])
    second = await fork_shared(client, (await share(other, first["id"]))["token"])
    third = await fork(client, (await client.path(second["id"]))[1]["id"])
    assert said(await client.path(third["id"])) == said(await client.path(second["id"]))
    assert said(await client.path(second["id"])) == said(await other.path(first["id"]))
    assert [message["text"] for message in await client.path(third["id"])] == [
        message["text"] for message in await client.path(thread)
    ]


async def test_an_account_that_is_gone_forks_nothing(
    client: Client, other: Client, thread: str, database: asyncpg.Connection
) -> None:
    token = (await share(client, thread))["token"]
    await database.execute("DELETE FROM users WHERE id = $1", parse_id(IdKind.USER, other.id))
    with pytest.raises(GraphQLErrors) as refused:
        await fork_shared(other, token)
    assert refused.value.code == "UNAUTHENTICATED"


async def test_links_and_their_ends_are_told_to_their_owner(
    client: Client, thread: str, database: asyncpg.Connection
) -> None:
    before = await changes(database, client)
    link = await share(client, thread)
    key = parse_id(IdKind.SHARE, link["id"])
    assert await changes(database, client) == [*before, ("SHARE", key)]
    await client.run(REVOKE, {"id": link["id"]})
    assert await changes(database, client) == [*before, ("SHARE", key), ("SHARE_REVOKED", key)]


async def test_a_missing_share_is_not_found(client: Client) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(REVOKE, {"id": f"share_{uuid.uuid4().hex}"})
    assert (refused.value.code, refused.value.extensions["field"]) == ("NOT_FOUND", "shareId")
