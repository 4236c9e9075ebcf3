"""Plans: every query gives what graphql-core gives, and is executed by a plan wherever that finds no error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strawberry.schema.exceptions import CannotGetOperationTypeError
from strawberry.types.graphql import OperationType

from graph.context import Context, Services
from graph.plan import Plan
from graph.schema import Schema
from models.records import ThreadRecord
from server.graphql_http import result_payload
from server.runtime import Server
from services.messages import Messages
from services.viewer import Viewer
from tests.client import Client, connect
from tests.operations import Operation, mutations, operations

# A link is signed anew with every reading, and a report tells the hour.
WITHOUT = frozenset({"url", "usage"})


@dataclass(slots=True)
class World:
    """A user who has something of everything, and what executes that user's operations."""

    schema: Schema
    services: Services
    viewer: Viewer
    values: dict[str, list[str]]
    thread_id: str
    message_id: str

    def context(self) -> Context:
        return Context(self.services, self.viewer)

    async def by_graphql_core(self, asked: Operation) -> bytes:
        return await _told(
            self.schema.execute(
                asked.document,
                variable_values=asked.variables,
                context_value=self.context(),
                operation_name=asked.name,
            )
        )

    async def as_served(self, asked: Operation) -> bytes:
        return await _told(
            self.schema.run(
                asked.document,
                self.context(),
                variables=asked.variables,
                operation_name=asked.name,
                allowed=(OperationType.QUERY, OperationType.MUTATION),
            )
        )


async def _told(execution: Awaitable[Any]) -> bytes:
    """The answer as it is sent; where the document has no such operation, what says so."""
    try:
        return orjson.dumps(result_payload(await execution))
    except CannotGetOperationTypeError as error:
        return orjson.dumps({"errors": [error.as_http_error_reason()]})


@pytest.fixture(scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with connect(server.address) as client:
        await client.sign_in()
        values, thread_id, message_id = await fill(client)
        assert client.token is not None
        http = server.application._http
        services = http._services
        viewer = await services.identities.verify(client.token)
        yield World(http._schema, services, viewer, values, thread_id, message_id)


async def fill(client: Client) -> tuple[dict[str, list[str]], str, str]:
    """Make something of everything; literals for the arguments that ask for it, a thread, and an answer in it."""

    async def made(mutation: str) -> Any:
        (payload,) = (await client.run(f"mutation {{ {mutation} }}")).values()
        return payload

    ids, cursors = [], []
    for name in ("One", "Two"):
        text = f'createProject(input: {{name: "{name}", color: RED, prompt: "Be brief", defaultModelId: "two-words"}})'
        ids.append((await made(f"{text} {{ project {{ id }} }}"))["project"]["id"])
    attachment = await client.upload(b"some text", "a.txt")
    turns = []
    for number, model in enumerate(("two-words", "priced", "thinks-and-calls", "fails-midway", "two-words")):
        more: dict[str, Any] = {"projectId": ids[number % 2]} if number < 3 else {}
        more |= {"attachmentIds": [attachment["id"]]} if number == 0 else {}
        turn = await client.send(f"Question {number} of tests", model=model, **more)
        await client.finish(turn["assistantMessage"]["id"])
        turns.append(turn)
        ids += [turn["thread"]["id"], turn["assistantMessage"]["id"]]
    again = await client.retry(turns[0]["assistantMessage"]["id"])
    await client.finish(again["assistantMessage"]["id"])
    thread = turns[0]["thread"]["id"]
    await made(f'pinThread(input: {{threadId: "{thread}", pinned: true}}) {{ thread {{ id }} }}')
    gone = turns[4]["thread"]["id"]
    await made(f'archiveThread(input: {{threadId: "{gone}"}}) {{ thread {{ id }} }}')
    share = (await made(f'shareThread(input: {{threadId: "{thread}"}}) {{ share {{ id token }} }}'))["share"]
    await made('updateSettings(input: {defaultModelId: "two-words"}) { settings { defaultModel { id } } }')
    listed = await client.run(
        "{ threads { edges { cursor } } projects { edges { cursor } } attachments { edges { cursor } } }"
    )
    for connection in listed.values():
        cursors += [edge["cursor"] for edge in connection["edges"]]
    path = await client.run(f'{{ thread(id: "{thread}") {{ messages {{ edges {{ cursor }} }} }} }}')
    cursors += [edge["cursor"] for edge in path["thread"]["messages"]["edges"]]
    ids += [share["id"], attachment["id"], "thread_" + "0" * 32, "nonsense", ""]

    def quoted(texts: list[str]) -> list[str]:
        return [orjson.dumps(text).decode() for text in texts]

    values = {
        "ID": quoted(ids),
        "Cursor": quoted([*cursors, "nonsense"]),
        "Int": ["1", "2", "3", "1", "2", "3", "100", "0", "101"],
        "Boolean": ["true", "false"],
        "token": quoted([share["token"], "nonsense"]),
        "query": quoted(["question", "tests -two", "hello", ""]),
        "timezone": quoted(["UTC", "Europe/Berlin", "nonsense"]),
        "String": quoted(["on", "One", ""]),
        "DateTime": quoted(["2020-01-01T00:00:00Z", "2040-01-01T00:00:00+01:00"]),
    }
    return values, thread, again["assistantMessage"]["id"]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each execution by a plan, whether it came to an answer."""
    outcomes: list[bool] = []
    execute = Plan.execute

    async def watched(self: Plan, *arguments: Any) -> Any:
        result = await execute(self, *arguments)
        outcomes.append(result is not None)
        return result

    monkeypatch.setattr(Plan, "execute", watched)
    return outcomes


def must_be_planned(asked: Operation, expected: bytes) -> bool:
    """Whether nothing is wrong with it.

    Null for a directive is no error where nothing is that it could be on, which only graphql-core finds.
    """
    return b'"errors"' not in expected and asked.variables.get("perhaps", ...) is not None


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_every_query_gives_what_graphql_core_gives(
    world: World, executed: list[bool], data: st.DataObject
) -> None:
    asked = data.draw(operations(world.schema._schema, world.values, WITHOUT))
    expected = await world.by_graphql_core(asked)
    executed.clear()
    assert await world.as_served(asked) == expected
    if must_be_planned(asked, expected):
        assert executed == [True], "a plan does what has no error"


@pytest.mark.parametrize("selected", ["edges { node { __typename } }", "edges { cursor }", "pageInfo { endCursor }"])
@pytest.mark.parametrize(
    "field",
    ["threads", "projects", "attachments", 'search(query: "question")', "thread messages", "sharedThread messages"],
)
async def test_every_part_of_a_list_can_be_asked_for_alone(
    world: World, executed: list[bool], field: str, selected: str
) -> None:
    (token, *_) = world.values["token"]
    root = {
        "thread messages": f'thread(id: "{world.thread_id}") {{ messages {{ %s }} }}',
        "sharedThread messages": f"sharedThread(token: {token}) {{ messages {{ %s }} }}",
    }.get(field, field + " { %s }")
    asked = Operation(f"{{ {root % selected} }}", {})
    expected = await world.by_graphql_core(asked)
    assert b'"errors"' not in expected
    assert await world.as_served(asked) == expected
    assert executed == [True], "what is not selected need not have been read"


@pytest.mark.parametrize(
    "selected",
    [
        "project { name }",
        "project { __typename id threadCount }",
        "project { icon } project { color }",
        "project { name } again: project { prompt threads { nodes { title } } }",
        "title project { name } messages { nodes { id role } }",
    ],
)
@pytest.mark.parametrize("root", ["threads { nodes { %s } }", "threads { edges { node { %s } } }", "thread"])
async def test_a_project_is_the_same_whether_or_not_it_was_read_with_its_thread(
    world: World, executed: list[bool], root: str, selected: str
) -> None:
    document = {"thread": f'thread(id: "{world.thread_id}") {{ %s }}'}.get(root, root) % selected
    asked = Operation(f"{{ {document} }}", {})
    expected = await world.by_graphql_core(asked)
    assert b'"project":{' in expected, "a thread that has one"
    assert root == "thread" or b'"project":null' in expected, "and one that has none"
    assert await world.as_served(asked) == expected
    assert executed == [True]


@pytest.mark.parametrize(
    ("document", "queries"),
    [
        ("threads { nodes { title messages(last: 2) { nodes { id text role } } } }", 0),
        ("threads { edges { node { messages { pageInfo { hasNextPage hasPreviousPage startCursor } } } } }", 0),
        ("threads(first: 2) { pageInfo { hasNextPage } nodes { messages(first: 1) { edges { cursor } } } }", 0),
        ("threads(last: 2) { nodes { project { name } messages(first: 1) { nodes { thread { title } } } } }", 0),
        ("threads(filter: {pinned: false}) { nodes { messages(last: 1) { nodes { siblings { text } } } } }", 0),
        ('threads(filter: {title: "no such"}) { nodes { messages(last: 1) { nodes { id } } } }', 0),
        ("threads { nodes { messages(last: 1) { nodes { id } } all: messages { nodes { text } } } }", 1),
        ("threads { nodes { messages(last: 1) { nodes { id } } project { threads { nodes { id } } } } }", 0),
        ("threads { nodes { project { threads { nodes { messages { nodes { id } } } } } } }", 1),
        (
            "a: threads(first: 1) { nodes { messages { nodes { id } } } } "
            "b: threads { nodes { messages { nodes { text } } } }",
            0,
        ),
        ("threads { nodes { messages(first: 0) { nodes { id } } } }", None),
        ('threads { nodes { messages(after: "nonsense") { nodes { id } } } }', None),
        ('threads(after: "nonsense") { nodes { messages { nodes { id } } } }', None),
    ],
)
async def test_messages_are_the_same_whether_or_not_they_were_read_with_the_list_of_their_threads(
    world: World, executed: list[bool], monkeypatch: pytest.MonkeyPatch, document: str, queries: int | None
) -> None:
    asked = Operation(f"{{ {document} }}", {})
    expected = await world.by_graphql_core(asked)
    pages, calls = Messages.pages, list[object]()

    def counted(self: Messages, *given: Any) -> Any:
        calls.append(given)
        return pages(self, *given)

    monkeypatch.setattr(Messages, "pages", counted)
    assert await world.as_served(asked) == expected
    if queries is None:
        assert b'"errors"' in expected
    else:
        assert (executed, len(calls)) == ([True], queries)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_every_mutation_gives_what_graphql_core_gives(
    world: World, executed: list[bool], data: st.DataObject
) -> None:
    # Twice the same is the same, whatever else they do.
    asked = data.draw(
        mutations(
            world.schema._schema,
            world.values,
            WITHOUT,
            [
                f'pinThread(input: {{threadId: "{world.thread_id}", pinned: true}})',
                f'renameThread(input: {{threadId: "{world.thread_id}", title: "Named"}})',
                f'selectMessage(input: {{messageId: "{world.message_id}"}})',
                f'stopMessage(input: {{messageId: "{world.message_id}"}})',
                'renameThread(input: {threadId: "nonsense", title: "Named"})',
                f'renameThread(input: {{threadId: "{world.thread_id}", title: ""}})',
            ],
        )
    )
    expected = await world.by_graphql_core(asked)
    executed.clear()
    assert await world.as_served(asked) == expected
    if must_be_planned(asked, expected):
        assert executed == [True], "a plan does what has no error"


@pytest.mark.parametrize(
    ("below", "planned"),
    [("id messages(first: 0) { nodes { id } }", [False]), ("id messages(first: 1) { nodes { id } }", [True])],
    ids=["whose answer fails", "whose answer does not"],
)
async def test_a_mutation_is_made_once(
    world: World, executed: list[bool], monkeypatch: pytest.MonkeyPatch, below: str, planned: list[bool]
) -> None:
    made: list[str] = []
    rename = world.services.threads.rename

    async def counted(viewer: Viewer, thread_id: UUID, title: str) -> ThreadRecord:
        made.append(title)
        return await rename(viewer, thread_id, title)

    monkeypatch.setattr(type(world.services.threads), "rename", lambda _, *given: counted(*given))
    field = f'renameThread(input: {{threadId: "{world.thread_id}", title: "Named"}})'
    asked = Operation(f"mutation {{ {field} {{ thread {{ {below} }} }} }}", {})
    expected = await world.by_graphql_core(asked)
    made.clear()
    assert await world.as_served(asked) == expected
    assert (made, executed) == (["Named"], planned)


async def test_mutations_of_several_root_fields_are_left_to_graphql_core(world: World, executed: list[bool]) -> None:
    fields = [
        f'{name}: renameThread(input: {{threadId: "{world.thread_id}", title: "{name}"}}) {{ thread {{ title }} }}'
        for name in ("first", "second")
    ]
    answer = orjson.loads(await world.as_served(Operation(f"mutation {{ {' '.join(fields)} }}", {})))
    assert {key: value["thread"]["title"] for key, value in answer["data"].items()} == {
        "first": "first",
        "second": "second",
    }
    assert executed == []
