"""Plans of a schema made for it: whatever resolvers give or raise, a plan tells what graphql-core would.

The product's own resolvers hardly ever fail below a root field, nor give null where none may be. These do: null for
what is required, in lists and in lists of lists, exceptions of every kind of resolver, numbers that are none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from random import Random
from typing import Annotated, Any, cast
from uuid import uuid4

import orjson
import pytest
import strawberry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strawberry.schema.exceptions import CannotGetOperationTypeError
from strawberry.types.graphql import OperationType

from graph.batching import batched_field
from graph.context import Context, Info, Services
from graph.event_executor import EventExecutor
from graph.limits import _CACHED_DOCUMENTS, Documents, document_limits
from graph.plan import Plan
from graph.schema import _MAX_PLANS, Schema
from server.graphql_http import result_payload
from services.viewer import Viewer
from tests.operations import Operation, mutations, operations


@strawberry.enum
class Colour(Enum):
    """A leaf's."""

    RED = "red"
    GREEN = "green"


@strawberry.input
class Shape:
    """An input object with defaults, and with one inside."""

    width: int
    height: int | None = 3
    tags: list[str] = strawberry.field(default_factory=lambda: ["plain"])
    inner: Shape | None = None


@strawberry.interface
class Named:
    """Whatever has a name."""

    name: str


@strawberry.type
class Leaf(Named):
    """Plain fields."""

    colour: Colour | None = None
    count: int | None = None
    ratio: float = 0.5
    seen_at: datetime | None = None
    tags: list[str | None] | None = None


async def _twins(branches: list[Branch], context: Context, times: int = 1) -> list[Leaf | None]:
    """Of each, what it gives; an exception where it raises."""
    return [branch.gives["twin"] for branch in branches]


async def _pairs(branches: list[Branch], context: Context) -> list[list[Leaf]]:
    return [branch.gives["pair"] for branch in branches]


@strawberry.type
class Branch(Named):
    """Fields by resolvers of every kind: each gives, or raises, what it was given."""

    gives: strawberry.Private[dict[str, Any]]

    def found(self, name: str) -> Any:
        """What a field gives."""
        value = self.gives[name]
        if isinstance(value, Exception):
            raise value
        return value

    @strawberry.field
    def child(self) -> Branch | None:
        """Sync, may be null."""
        return cast("Branch | None", self.found("child"))

    @strawberry.field
    async def leaf(self) -> Leaf:
        """Async, must not be null."""
        return cast("Leaf", self.found("leaf"))

    @strawberry.field
    async def either(self) -> Annotated[Leaf | Branch, strawberry.union("Either")] | None:
        """A union."""
        return cast("Leaf | Branch | None", self.found("either"))

    @strawberry.field
    def named(self) -> list[Named]:
        """Of an interface, none of them null."""
        return cast("list[Named]", self.found("named"))

    @strawberry.field
    async def leaves(self) -> list[Leaf | None]:
        """Some of them null."""
        return cast("list[Leaf | None]", self.found("leaves"))

    @strawberry.field
    def matrix(self) -> list[list[int] | None] | None:
        """Lists in a list."""
        return cast("list[list[int] | None] | None", self.found("matrix"))

    @strawberry.field
    def said(
        self,
        times: int = 2,
        text: str | None = "so",
        colour: Colour = Colour.RED,
        shape: Shape | None = None,
        sizes: list[int] | None = None,
    ) -> str:
        """All that it was asked with."""
        return f"{times} {text!r} {colour} {shape} {sizes}"

    twin: Leaf | None = batched_field(_twins, description="For many at once; may be null.")
    pair: list[Leaf] = batched_field(_pairs, description="For many at once; must not be null.")


@dataclass(slots=True)
class Given:
    """What the root fields give, in place of services; and how often they were asked."""

    branch: Branch | Exception | None
    branches: list[Branch | None] | Exception | None
    calls: int = 0

    def found(self, value: Any) -> Any:
        """What a root field gives."""
        self.calls += 1
        if isinstance(value, Exception):
            raise value
        return value


def _given(info: Info) -> Given:
    return cast("Given", info.context.services)


@strawberry.type
class Query:
    """Fields that may be null, and one that must not."""

    @strawberry.field
    async def branch(self, info: Info) -> Branch | None:
        """One."""
        given = _given(info)
        return cast("Branch | None", given.found(given.branch))

    @strawberry.field
    def required(self, info: Info) -> Branch:
        """One that must be there."""
        given = _given(info)
        return cast("Branch", given.found(given.branch))

    @strawberry.field
    async def branches(self, info: Info, size: int = 10) -> list[Branch] | None:
        """Some, none of them null."""
        given = _given(info)
        found = given.found(given.branches)
        return None if found is None else found[:size]

    @strawberry.field
    def leaf(self) -> Leaf | None:
        """Never one."""
        return None


@strawberry.type
class Mutation:
    """What must not be called again."""

    @strawberry.mutation
    async def change(self, info: Info) -> Branch:
        """One that must be there."""
        given = _given(info)
        return cast("Branch", given.found(given.branch))

    @strawberry.mutation
    async def change_many(self, info: Info) -> list[Branch] | None:
        """Some, none of them null."""
        given = _given(info)
        return cast("list[Branch] | None", given.found(given.branches))


def schema() -> Schema:
    """A schema of the product's class."""
    documents = Documents()
    made = Schema(
        query=Query,
        mutation=Mutation,
        extensions=[document_limits(documents, introspection=True)],
        execution_context_class=EventExecutor,
    )
    made.documents = documents
    return made


SCHEMA = schema()
ERROR_ID = re.compile(rb"\b[0-9a-f]{16}\b")
VALUES = {
    "Int": ["0", "1", "-7", "2147483647"],
    "String": ['"so"', '""', '"""block"""', r'"\u00e9"'],
    "Boolean": ["true", "false"],
}


def failure() -> Exception:
    """What a resolver raises."""
    return ValueError("no value")


@dataclass(frozen=True, slots=True)
class Chance:
    """Makes what resolvers give. By a generator of its own: Hypothesis would take far longer for it than the rest."""

    random: Random

    def one_of(self, usual: Sequence[Any], *unusual: Any) -> Any:
        """Mostly one of the usual."""
        rare = unusual and self.random.randrange(12) == 0
        return self.random.choice(unusual if rare else usual)

    def name(self) -> str | None:
        """One of any."""
        return cast("str | None", self.one_of(["a", "é\u2028🦉", ""], None))

    def leaf(self) -> Leaf:
        """One with whatever its fields can hold, and cannot."""
        return Leaf(
            name=cast("str", self.name()),
            colour=self.one_of([None, *Colour]),
            count=self.one_of([None, 0, 7], 2**31),
            ratio=self.one_of([0.5, 1e300, -0.0], float("nan"), float("inf")),
            seen_at=self.one_of([None, datetime(2026, 1, 2, 3, 4, 5, 6, UTC)]),
            tags=self.one_of([None, [], ["x", None]]),
        )

    def some(self, make: Callable[[], Any], at_most: int = 3) -> list[Any]:
        """A few."""
        return [make() for _ in range(self.random.randint(0, at_most))]

    def branch(self, depth: int = 2) -> Branch:
        """One with whatever is below it."""

        def below() -> Branch | Leaf:
            return self.branch(depth - 1) if depth and self.random.randrange(2) else self.leaf()

        return Branch(
            name=cast("str", self.name()),
            gives={
                "child": self.one_of([self.branch(depth - 1) if depth else None], None, failure()),
                "leaf": self.one_of([self.leaf()], None, failure()),
                "either": self.one_of([below()], None, failure()),
                "named": self.one_of([self.some(below)], None, failure(), [None]),
                "leaves": self.one_of([self.some(self.leaf)], None, failure(), [None, None]),
                "matrix": self.one_of([None, [], [[1, 2], None, []]], [[1], [None]], [[2**31]]),
                "twin": self.one_of([self.leaf()], None, failure()),
                "pair": self.one_of([self.some(self.leaf)], None, failure(), [None]),
            },
        )


def given_by(seed: int) -> Given:
    """What the root fields give, by chance."""
    chance = Chance(Random(seed))
    return Given(
        branch=chance.one_of([chance.branch()], None, failure()),
        branches=chance.one_of([chance.some(chance.branch, 4)], None, failure(), [None]),
    )


GIVEN = st.builds(given_by, st.integers(0, 2**32 - 1))


async def told(execute: Callable[..., Any], asked: Operation, root: Given, **more: Any) -> bytes:
    """The answer as it is sent."""
    context = Context(cast("Services", root), Viewer(uuid4(), anonymous=True, expires_at=2e9))
    root.calls = 0
    try:
        result = await execute(
            asked.document, context_value=context, variable_values=asked.variables, operation_name=asked.name, **more
        )
    except CannotGetOperationTypeError as error:
        return orjson.dumps({"errors": [error.as_http_error_reason()]})
    return ERROR_ID.sub(b"an id", orjson.dumps(result_payload(result)))


async def run(document: str, *, context_value: Context, variable_values: Any, operation_name: str | None) -> Any:
    """As the server does."""
    allowed = (OperationType.QUERY, OperationType.MUTATION)
    return await SCHEMA.run(
        document, context_value, variables=variable_values, operation_name=operation_name, allowed=allowed
    )


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each execution by a plan, whether it came to an answer."""
    came: list[bool] = []
    execute = Plan.execute

    async def watched(self: Plan, *arguments: Any) -> Any:
        result = await execute(self, *arguments)
        came.append(result is not None)
        return result

    monkeypatch.setattr(Plan, "execute", watched)
    return came


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), root=GIVEN)
async def test_a_query_gives_what_graphql_core_gives_whatever_its_resolvers_do(
    outcomes: list[bool], data: st.DataObject, root: Given
) -> None:
    asked = data.draw(operations(SCHEMA._schema, VALUES, frozenset()))
    expected = await told(SCHEMA.execute, asked, root)
    outcomes.clear()
    assert await told(run, asked, root) == expected
    if b'"errors"' not in expected and asked.variables.get("perhaps", ...) is not None:
        assert outcomes == [True], "a plan does what has no error"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), root=GIVEN)
async def test_a_mutation_gives_what_graphql_core_gives_and_is_made_once(
    outcomes: list[bool], data: st.DataObject, root: Given
) -> None:
    asked = data.draw(mutations(SCHEMA._schema, VALUES, frozenset(), ["change", "changeMany"]))
    expected = await told(SCHEMA.execute, asked, root)
    calls = root.calls
    outcomes.clear()
    assert await told(run, asked, root) == expected
    assert root.calls == calls <= 1
    if b'"errors"' not in expected and calls and asked.variables.get("perhaps", ...) is not None:
        assert outcomes == [True], "a plan does what has no error"


async def test_a_document_has_a_bounded_number_of_plans_and_an_answer_for_every_choice(outcomes: list[bool]) -> None:
    """One that has more choices than plans is answered by graphql-core for the others."""
    names = "abcde"
    heads = ", ".join(f"${name}: Boolean!" for name in names)
    fields = " ".join(f"{name}: said(times: 1) @include(if: ${name})" for name in names)
    document = f"query Random({heads}) {{ branch {{ name {fields} }} }}"
    root = Given(Branch(name="a", gives={}), None)
    for number in range(2 ** len(names)):
        asked = Operation(document, {name: bool(number >> place & 1) for place, name in enumerate(names)})
        expected = await told(SCHEMA.execute, asked, root)
        assert await told(run, asked, root) == expected
        assert expected.count(b"Colour.RED") == number.bit_count()
    known = SCHEMA.documents.find(document)
    assert known is not None
    assert (len(known.plans), len(outcomes)) == (_MAX_PLANS, _MAX_PLANS)


async def test_a_bounded_number_of_documents_is_remembered(outcomes: list[bool]) -> None:
    made = schema()
    for number in range(_CACHED_DOCUMENTS + 10):
        await made.execute(f"{{ leaf {{ name }} }} # {number}")
    assert len(made.documents._checked) == _CACHED_DOCUMENTS
    assert made.documents.find("{ leaf { name } } # 9") is None
    assert made.documents.find("{ leaf { name } } # 10") is not None
    assert outcomes == []
