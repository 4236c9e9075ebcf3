"""Who may what: every root field of the schema, by its owner, another user (signed in, and of an anonymous session), a
caller without and with a bad token.

The matrix is made from the schema. A new root field, or a new id argument of one, fails here until it has a row.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from graphql import GraphQLInputObjectType, GraphQLNamedType, get_named_type

from graph.schema import build_schema
from models.ids import IdKind, parse_id
from server.runtime import Server
from tests.client import Client, GraphQLErrors, connect
from tests.issuer import shared_secret_token

SCHEMA = build_schema()._schema

# Each row: an operation on the owner's thread {thread}, question {question}, answer {answer}, its file {attachment} and
# an uploaded one {uploaded}. What a stranger sees: NOT_FOUND, or null ("null"), or their own ("own"). {key} is a new
# idempotency key, {session} the token of an anonymous session that nobody has claimed yet. A field has a row for each
# way to reach something by it: "<root>.<field> <more words>". The owner has `OWN_PROVIDERS`, too, which a stranger gets
# NOT_FOUND or BAD_USER_INPUT for.
ROWS: dict[str, tuple[str, str]] = {
    "query.node": ('query { it: node(id: "{thread}") { id } }', "null"),
    "query.nodes": (
        'query { it: nodes(ids: ["{thread}", "{question}", "{answer}", "{project}", "{share}", "{attachment}"]) '
        "{ id } }",
        "null",
    ),
    "query.viewer": ("query { it: viewer { id anonymous } }", "own"),
    "query.threads": ("query { it: threads { nodes { id messages { nodes { text } } } } }", "own"),
    "query.threads of a project": (
        'query { it: threads(filter: {projectId: "{project}"}) { nodes { id } } }',
        "NOT_FOUND",
    ),
    "query.thread": (
        'query { it: thread(id: "{thread}") { id messages { nodes { text } } liveMessage { id } } }',
        "null",
    ),
    "query.message": ('query { it: message(id: "{answer}") { id text siblings { id } parent { id } } }', "null"),
    "query.projects": ("query { it: projects { nodes { id threads { nodes { id } } } } }", "own"),
    "query.project": ('query { it: project(id: "{project}") { id threads { nodes { id } } } }', "null"),
    "query.search": ('query { it: search(query: "Owned") { nodes { thread { id } message { id } } } }', "own"),
    "query.search in a project": (
        'query { it: search(query: "Owned", filter: {projectId: "{project}"}) { nodes { thread { id } } } }',
        "NOT_FOUND",
    ),
    "query.settings": (
        "query { it: settings { defaultModel { id } personalization { name } providerKeys { provider lastFour } "
        "customProviders { slug baseUrl } customModels { modelId } } }",
        "own",
    ),
    "query.sharedThread": (
        'query { it: sharedThread(token: "{token}") { title messages { nodes { position text } } } }',
        "open",
    ),
    "query.attachments": ("query { it: attachments { nodes { id name url } } }", "own"),
    "query.models": ("query { it: models { id } }", "own"),
    "query.usage": ("query { it: usage(timeframe: DAY) { totals { requests } byModel { id } } }", "own"),
    "subscription.usage": ("subscription { it: usage(timeframe: DAY) { totals { requests } byModel { id } } }", "own"),
    "mutation.startAnonymousSession": ("mutation { it: startAnonymousSession { viewer { id } } }", "open"),
    "mutation.claimAnonymousData": (
        'mutation { it: claimAnonymousData(input: {token: "{session}"}) { viewer { id } threadCount } }',
        "own",
    ),
    "mutation.sendMessage": (
        'mutation { it: sendMessage(input: {idempotencyKey: "{key}", threadId: "{thread}", text: "x", '
        'attachmentIds: ["{attachment}"], modelId: "two-words"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.sendMessage into a project": (
        'mutation { it: sendMessage(input: {idempotencyKey: "{key}", projectId: "{project}", text: "x", '
        'modelId: "two-words"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.editMessage": (
        'mutation { it: editMessage(input: {idempotencyKey: "{key}", messageId: "{question}", text: "x", '
        'attachmentIds: ["{attachment}"], modelId: "two-words"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.retryMessage": (
        'mutation { it: retryMessage(input: {idempotencyKey: "{key}", messageId: "{answer}", '
        'modelId: "two-words"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.stopMessage": (
        'mutation { it: stopMessage(input: {messageId: "{answer}"}) { message { id } } }',
        "NOT_FOUND",
    ),
    "mutation.selectMessage": (
        'mutation { it: selectMessage(input: {messageId: "{answer}"}) { message { id } } }',
        "NOT_FOUND",
    ),
    "mutation.renameThread": (
        'mutation { it: renameThread(input: {threadId: "{thread}", title: "x"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.pinThread": (
        'mutation { it: pinThread(input: {threadId: "{thread}", pinned: true}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.deleteThread": (
        'mutation { it: deleteThread(input: {threadId: "{thread}"}) { deletedThreadId } }',
        "NOT_FOUND",
    ),
    "mutation.forkThread": (
        'mutation { it: forkThread(input: {messageId: "{answer}"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.shareThread": (
        'mutation { it: shareThread(input: {threadId: "{thread}"}) { share { id token } } }',
        "NOT_FOUND",
    ),
    "mutation.revokeShare": (
        'mutation { it: revokeShare(input: {shareId: "{share}"}) { revokedShareId thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.forkSharedThread": (
        'mutation { it: forkSharedThread(input: {token: "{token}"}) { thread { id messages { nodes { id } } } } }',
        "own",
    ),
    "mutation.archiveThread": (
        'mutation { it: archiveThread(input: {threadId: "{thread}"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.moveThread": (
        'mutation { it: moveThread(input: {threadId: "{thread}", projectId: "{project}"}) { thread { id } } }',
        "NOT_FOUND",
    ),
    "mutation.setThreadExpiry": (
        'mutation { it: setThreadExpiry(input: {threadId: "{thread}", expiresAt: "2035-01-01T00:00:00Z"}) '
        "{ thread { id } } }",
        "NOT_FOUND",
    ),
    "mutation.createProject": ('mutation { it: createProject(input: {name: "Mine"}) { project { name } } }', "own"),
    "mutation.updateProject": (
        'mutation { it: updateProject(input: {projectId: "{project}", name: "x"}) { project { id } } }',
        "NOT_FOUND",
    ),
    "mutation.archiveProject": (
        'mutation { it: archiveProject(input: {projectId: "{project}"}) { project { id } } }',
        "NOT_FOUND",
    ),
    "mutation.deleteProject": (
        'mutation { it: deleteProject(input: {projectId: "{project}", deleteThreads: true}) { deletedProjectId } }',
        "NOT_FOUND",
    ),
    "mutation.updateSettings": (
        'mutation { it: updateSettings(input: {defaultModelId: "two-words"}) { settings { defaultModel { id } } } }',
        "own",
    ),
    "mutation.setProviderKey": (
        'mutation { it: setProviderKey(input: {provider: "openai", key: "sk-mine"}) { providerKey { provider } } }',
        "own",
    ),
    "mutation.deleteProviderKey": (
        'mutation { it: deleteProviderKey(input: {provider: "groq"}) { deletedProvider } }',
        "NOT_FOUND",
    ),
    "mutation.saveCustomProvider": (
        'mutation { it: saveCustomProvider(input: {slug: "owned", name: "Mine", baseUrl: "https://mine.example"}) '
        "{ customProvider { name lastFour models { modelId } } keyDropped } }",
        "own",
    ),
    "mutation.deleteCustomProvider": (
        'mutation { it: deleteCustomProvider(input: {slug: "owned"}) { deletedSlug } }',
        "NOT_FOUND",
    ),
    "mutation.saveCustomModel": (
        'mutation { it: saveCustomModel(input: {provider: "groq", vendorName: "owned", name: "Mine"}) '
        "{ customModel { name } } }",
        "own",
    ),
    "mutation.saveCustomModel on a custom provider": (
        'mutation { it: saveCustomModel(input: {provider: "owned", vendorName: "m", name: "Mine"}) '
        "{ customModel { name } } }",
        "BAD_USER_INPUT",
    ),
    "mutation.deleteCustomModel": (
        'mutation { it: deleteCustomModel(input: {modelId: "custom:owned/m"}) { deletedModelId } }',
        "NOT_FOUND",
    ),
    "subscription.changes": ("subscription { it: changes { __typename } }", "own"),
    "mutation.exportData": ("mutation { it: exportData(input: {}) { url } }", "own"),
    "mutation.deleteAccount": (
        'mutation { it: deleteAccount(input: {confirmation: "DELETE MY ACCOUNT"}) { deletedUserId } }',
        "own",
    ),
    "mutation.uploadAttachment": (
        "mutation($file: Upload!) { it: uploadAttachment(input: {file: $file}) { attachment { name } } }",
        "own",
    ),
    "mutation.createUpload": (
        'mutation { it: createUpload(input: {name: "x", contentType: "text/plain", size: 1}) { attachment { name } } }',
        "own",
    ),
    "mutation.completeUpload": (
        'mutation { it: completeUpload(input: {attachmentId: "{uploaded}"}) { attachment { id } } }',
        "NOT_FOUND",
    ),
    "mutation.deleteAttachment": (
        'mutation { it: deleteAttachment(input: {attachmentId: "{attachment}"}) { deletedAttachmentId } }',
        "NOT_FOUND",
    ),
    "subscription.messageStream": (
        'subscription { it: messageStream(messageId: "{answer}") { __typename } }',
        "NOT_FOUND",
    ),
}


# What the owner has of their own: a key for a provider, an endpoint with a key, and a model on it.
OWN_PROVIDERS = """
mutation {
  setProviderKey(input: {provider: "groq", key: "owned-key-of-groq"}) { __typename }
  saveCustomProvider(input: {slug: "owned", name: "Owned", baseUrl: "https://owned.example", key: "owned-custom"}) {
    __typename
  }
  saveCustomModel(input: {provider: "owned", vendorName: "m", name: "Owned"}) { __typename }
  updateSettings(input: {personalization: {name: "Owned"}}) { __typename }
}
"""


def root_fields() -> dict[str, Any]:
    roots = {"query": SCHEMA.query_type, "mutation": SCHEMA.mutation_type, "subscription": SCHEMA.subscription_type}
    return {
        f"{kind}.{name}": field
        for kind, root in roots.items()
        if root is not None
        for name, field in root.fields.items()
    }


def id_arguments(field: Any) -> set[str]:
    """The names of all arguments, also inside input objects, that take an ID."""
    found: set[str] = set()

    def visit(name: str, named: GraphQLNamedType) -> None:
        if named.name == "ID":
            found.add(name)
        elif isinstance(named, GraphQLInputObjectType):
            for inner, input_field in named.fields.items():
                visit(inner, get_named_type(input_field.type))

    for name, argument in field.args.items():
        visit(name, get_named_type(argument.type))
    return found


def test_every_root_field_has_a_row_and_every_id_argument_is_tried() -> None:
    assert {name.split(" ")[0] for name in ROWS} == set(root_fields())
    for name, field in root_fields().items():
        tried = " ".join(query for row, (query, _) in ROWS.items() if row.split(" ")[0] == name)
        for argument in id_arguments(field):
            assert f"{argument}:" in tried, f"{name}: no row tries {argument}"


@pytest.fixture
def client(person: Client) -> Client:
    """The owner: signed in, so that every field is open to them."""
    return person


@pytest.fixture(params=["signed in", "anonymous"])
async def other(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """Another one, of both kinds."""
    async with connect(server.address) as client:
        if request.param == "anonymous":
            await client.sign_in()
        else:
            await client.sign_in_with(shared_secret_token())
        yield client


@pytest.fixture
async def owned(client: Client, session: str) -> dict[str, str]:
    """What the owner has, by the names that the rows have for it."""
    return await own(client) | {"session": session}


@pytest.fixture
async def session(nobody: Client) -> str:
    """The token of an anonymous session that nobody has claimed yet."""
    token: str = (await nobody.run("mutation { startAnonymousSession { token } }"))["startAnonymousSession"]["token"]
    return token


@dataclass(frozen=True)
class Owner:
    """Somebody whom the others of all tests may try to rob, in vain."""

    user_id: str
    ids: dict[str, str]


@pytest.fixture(scope="session")
async def owner(server: Server) -> Owner:
    async with connect(server.address) as client:
        await client.sign_in_with(shared_secret_token())
        return Owner(client.id, await own(client))


@pytest.fixture
def robbed(owner: Owner, session: str) -> dict[str, str]:
    """What that owner has."""
    return owner.ids | {"session": session}


async def own(client: Client) -> dict[str, str]:
    created = await client.run('mutation { createProject(input: {name: "Owned"}) { project { id } } }')
    project = created["createProject"]["project"]["id"]
    attachment = await client.upload(b"Owned")
    turn = await client.send("Owned", projectId=project, attachmentIds=[attachment["id"]])
    await client.finish(turn["assistantMessage"]["id"])
    share = "mutation($id: ID!) { shareThread(input: {threadId: $id}) { share { id token } } }"
    await client.run(OWN_PROVIDERS)
    shared = (await client.run(share, {"id": turn["thread"]["id"]}))["shareThread"]["share"]
    return {
        "thread": turn["thread"]["id"],
        "question": turn["userMessage"]["id"],
        "answer": turn["assistantMessage"]["id"],
        "project": project,
        "share": shared["id"],
        "token": shared["token"],
        "attachment": attachment["id"],
        "uploaded": await client.upload_directly(b"Owned"),
    }


def filled(name: str, ids: dict[str, str]) -> str:
    query = ROWS[name][0]
    for key, value in (ids | {"key": str(uuid.uuid4())}).items():
        query = query.replace("{" + key + "}", value)
    return query


def takes_one_way_only(name: str) -> bool:
    """Subscriptions go over sockets, files over HTTP."""
    return name.startswith("subscription.") or "Upload!" in ROWS[name][0]


async def run(client: Client, name: str, query: str) -> Any:
    if "Upload!" in query:
        return (await client.run_with_file(query, b"x"))["it"]
    if not name.startswith("subscription."):
        return (await client.run(query))["it"]
    async with client.subscribe(query, {}) as subscription:
        payload = await subscription.next()
        return payload["data"]["it"] if payload else None


async def snapshot(server: Server, ids: dict[str, str]) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(server.database.url)
    try:
        thread = parse_id(IdKind.THREAD, ids["thread"])
        rows = await connection.fetch("SELECT * FROM threads WHERE id = $1", thread)
        rows += await connection.fetch("SELECT * FROM messages WHERE thread_id = $1 ORDER BY id", thread)
        project = parse_id(IdKind.PROJECT, ids["project"])
        rows += await connection.fetch("SELECT * FROM projects WHERE id = $1", project)
        rows += await connection.fetch("SELECT * FROM shares WHERE thread_id = $1 ORDER BY id", thread)
        rows += await connection.fetch(
            "SELECT m.* FROM share_messages m JOIN shares s ON s.id = share_id WHERE thread_id = $1 ORDER BY m.id",
            thread,
        )
        files = [parse_id(IdKind.ATTACHMENT, ids[name]) for name in ("attachment", "uploaded")]
        rows += await connection.fetch("SELECT * FROM attachments WHERE id = ANY($1::uuid[]) ORDER BY id", files)
        rows += await connection.fetch("SELECT * FROM attachment_links WHERE attachment_id = ANY($1::uuid[])", files)
        rows += await connection.fetch("SELECT * FROM turns WHERE thread_id = $1 ORDER BY id", thread)
        for table in ("settings", "provider_keys", "custom_providers", "custom_models"):
            rows += await connection.fetch(
                f"SELECT * FROM {table} WHERE owner_id = (SELECT owner_id FROM threads WHERE id = $1) ORDER BY id",
                thread,
            )
        return [tuple(row) for row in rows]
    finally:
        await connection.close()


@pytest.mark.parametrize("name", sorted(ROWS))
async def test_the_owner_gets_an_answer(client: Client, owned: dict[str, str], name: str) -> None:
    assert await run(client, name, filled(name, owned)) is not None


@pytest.mark.parametrize("name", sorted(ROWS))
async def test_another_user_sees_and_changes_nothing(
    server: Server, owner: Owner, other: Client, robbed: dict[str, str], name: str
) -> None:
    before = await snapshot(server, robbed)
    expected = ROWS[name][1]
    missing = {key: f"{value.split('_')[0]}_{uuid.uuid4().hex}" for key, value in robbed.items()}
    outcomes = []
    for ids in (robbed, missing):
        try:
            outcomes.append(await run(other, name, filled(name, ids)))
        except GraphQLErrors as refused:
            outcomes.append([{**error, "path": None, "locations": None} for error in refused.errors])
    if expected in ("NOT_FOUND", "BAD_USER_INPUT"):
        assert outcomes[0][0]["extensions"]["code"] == expected
    elif expected == "null":
        assert outcomes[0] in (None, [None] * 6)
    else:
        assert not any(value in str(outcomes[0]) for value in (*robbed.values(), owner.user_id))
        assert "owned" not in str(outcomes[0])
    if expected in ("NOT_FOUND", "BAD_USER_INPUT", "null"):
        assert outcomes[0] == outcomes[1], "a foreign id must look like a missing one"
    assert await snapshot(server, robbed) == before


@pytest.mark.parametrize("transport", ["http", "socket"])
@pytest.mark.parametrize("name", sorted(ROWS))
async def test_without_a_token_only_what_is_open_answers(
    server: Server, nobody: Client, robbed: dict[str, str], name: str, transport: str
) -> None:
    if transport == ("http" if name.startswith("subscription.") else "socket") and takes_one_way_only(name):
        return
    before = await snapshot(server, robbed)
    query = filled(name, robbed)

    async def attempt() -> Any:
        if transport == "http":
            return await run(nobody, name, query)
        async with nobody.subscribe(query, {}) as operation:
            return await operation.next()

    if ROWS[name][1] == "open":
        assert await attempt() is not None
    else:
        with pytest.raises(GraphQLErrors) as refused:
            await attempt()
        assert refused.value.code == "UNAUTHENTICATED"
    assert await snapshot(server, robbed) == before


@pytest.mark.parametrize("name", sorted(ROWS))
async def test_a_bad_token_is_no_token(nobody: Client, robbed: dict[str, str], name: str) -> None:
    nobody.token = "not.a.token"
    query = filled(name, robbed)
    if name.startswith("subscription."):
        with pytest.raises(ConnectionError, match="4403"):
            await run(nobody, name, query)
    elif ROWS[name][1] == "open":
        assert await run(nobody, name, query) is not None
    else:
        with pytest.raises(GraphQLErrors) as refused:
            await run(nobody, name, query)
        assert refused.value.code == "UNAUTHENTICATED"


async def test_typename_and_introspection_need_no_token(nobody: Client) -> None:
    assert await nobody.run("{ __typename __schema { queryType { name } } }") == {
        "__typename": "Query",
        "__schema": {"queryType": {"name": "Query"}},
    }
