"""The schema that frontends are written against: committed, described to the last value, and of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from graphql import (
    GraphQLArgument,
    GraphQLEnumType,
    GraphQLField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    get_named_type,
    is_introspection_type,
    is_required_argument,
    is_required_input_field,
    is_specified_scalar_type,
)
from graphql import build_schema as schema_of

import services.generation
from graph.schema import build_schema
from models.ids import IdKind
from models.records import MessageFailure, MessageRole, MessageStatus
from providers.base import FailureCode
from services.custom_providers import MAX_MODELS, MAX_PROVIDERS
from services.errors import ErrorCode
from services.search_query import MAX_SNIPPET_PARTS
from streams.recovery import SERVER_LOST

FILE = Path(__file__).parent.parent.parent / "schema.graphql"
SCHEMA: GraphQLSchema = schema_of(FILE.read_text())
OURS: list[GraphQLNamedType] = [
    kind
    for name, kind in sorted(SCHEMA.type_map.items())
    if not is_introspection_type(kind) and not is_specified_scalar_type(kind)
]

# The one argument of a mutation says nothing that its type does not.
PLAIN: set[str] = set()


def descriptions(kind: GraphQLNamedType) -> Iterator[tuple[str, str | None]]:
    """A type and everything in it by its coordinate (spec.graphql.org, section 3.15), with its description."""
    yield kind.name, kind.description
    if isinstance(kind, GraphQLEnumType):
        for value_name, value in kind.values.items():
            yield f"{kind.name}.{value_name}", value.description
    elif isinstance(kind, GraphQLInputObjectType):
        for field_name, input_field in kind.fields.items():
            yield f"{kind.name}.{field_name}", input_field.description
    elif isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
        for field_name, field in kind.fields.items():
            yield f"{kind.name}.{field_name}", field.description
            for argument_name, argument in field.args.items():
                yield f"{kind.name}.{field_name}({argument_name}:)", argument.description


def fields() -> Iterator[tuple[str, GraphQLField]]:
    """Every field of every output type by its coordinate."""
    for kind in OURS:
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
            for name, field in kind.fields.items():
                yield f"{kind.name}.{name}", field


def mutations() -> dict[str, GraphQLField]:
    """The fields of Mutation."""
    assert SCHEMA.mutation_type
    return dict(SCHEMA.mutation_type.fields)


def test_the_committed_schema_is_the_one_that_is_served() -> None:
    assert FILE.read_text() == build_schema().as_str() + "\n", "schema.graphql differs from the code; run: make schema"


def test_whether_it_may_be_asked_for_changes_nothing_in_it() -> None:
    assert build_schema(introspection=False).as_str() == build_schema().as_str()


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_everything_is_described(kind: GraphQLNamedType) -> None:
    missing = {place for place, description in descriptions(kind) if not (description or "").strip()}
    assert missing - PLAIN == set(), "give each a description where it is defined, in graph/ or resolvers/"


def test_what_is_listed_as_plain_has_no_description() -> None:
    bare = {place for kind in OURS for place, description in descriptions(kind) if not description}
    assert bare == PLAIN, "take those out of PLAIN that have one now"


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_a_description_is_a_sentence(kind: GraphQLNamedType) -> None:
    for place, description in descriptions(kind):
        if description and kind.name != "DateTime":  # Strawberry's own
            assert description[0].isupper() or not description[0].isalpha(), place
            assert description.endswith("."), place


def test_every_mutation_takes_one_required_input_of_its_own_name() -> None:
    for name, field in mutations().items():
        if name == "startAnonymousSession":
            assert field.args == {}
            continue
        ((argument_name, argument),) = field.args.items()
        assert argument_name == "input"
        assert is_required_argument(argument)
        assert get_named_type(argument.type).name == f"{name[0].upper()}{name[1:]}Input"


def test_every_mutation_returns_what_it_changed() -> None:
    turns = {"sendMessage", "editMessage", "retryMessage"}
    for name, field in mutations().items():
        expected = {"startAnonymousSession": "AnonymousSession"} | dict.fromkeys(turns, "TurnPayload")
        assert str(field.type) == expected.get(name, f"{name[0].upper()}{name[1:]}Payload") + "!"


def test_what_begins_a_turn_needs_a_key_and_nothing_else_does() -> None:
    for kind in OURS:
        if isinstance(kind, GraphQLInputObjectType):
            begins = kind.name in ("SendMessageInput", "EditMessageInput", "RetryMessageInput")
            assert ("idempotencyKey" in kind.fields) == begins, kind.name
            if begins:
                assert is_required_input_field(kind.fields["idempotencyKey"])


def test_no_input_can_say_who_asks() -> None:
    """Whose rows are meant is told by the token alone."""
    names = {name for kind in OURS if isinstance(kind, GraphQLInputObjectType) for name in kind.fields} | {
        name for _, field in fields() for name in field.args
    }
    assert not {name for name in names if name.lower().removesuffix("id") in ("owner", "user", "viewer", "author")}


# Connections that are in an order of which nobody wants the end, with what they must be asked.
FORWARDS_ONLY = {"Query.search": {"query": "String!"}}


def test_every_connection_pages_both_ways_and_shows_nodes_and_places() -> None:
    connections = [(place, field) for place, field in fields() if str(field.type).endswith("Connection!")]
    assert {place for place, _ in connections} == {
        "Query.threads",
        "Query.attachments",
        "Thread.messages",
        "Query.projects",
        "Project.threads",
        "SharedThread.messages",
        "Query.search",
    }
    for place, field in connections:
        paging = {name: str(argument.type) for name, argument in field.args.items()}
        noun = place.split(".")[1].title().removesuffix("s")
        assert paging.pop("filter", f"{noun}Filter") == f"{noun}Filter", place
        backwards = {"last": "Int", "before": "Cursor"}
        assert paging == {"first": "Int", "after": "Cursor"} | FORWARDS_ONLY.get(place, backwards), place
        connection = get_named_type(field.type)
        assert isinstance(connection, GraphQLObjectType)
        noun = connection.name.removesuffix("Connection")
        assert {name: str(inner.type) for name, inner in connection.fields.items()} == {
            "edges": f"[{noun}Edge!]!",
            "pageInfo": "PageInfo!",
            "nodes": f"[{noun}!]!",
        }
        edge = SCHEMA.type_map[f"{noun}Edge"]
        assert isinstance(edge, GraphQLObjectType)
        assert {name: str(inner.type) for name, inner in edge.fields.items()} == {
            "cursor": "Cursor!",
            "node": f"{noun}!",
        }


def test_a_list_that_no_page_bounds_is_bounded_by_its_description() -> None:
    unpaged = {place for place, field in fields() if str(field.type).startswith("[") and "Connection." not in place}
    # Parts are bounded by the length of an answer, models (asked ones too) by the operator's settings, buckets by 30.
    by_nature = {
        "Message.parts",
        "SharedMessage.parts",
        "Query.models",
        "Model.abilities",
        "UsageReport.buckets",
        "UsageReport.byModel",
        "CreateUploadPayload.headers",
        # One for each provider that the server knows, or knew; one for each that there is.
        "Settings.providerKeys",
        "CustomModel.abilities",
        "SearchResult.snippet",
    }
    by_number = {
        "Message.siblings": 100,
        "Query.nodes": 100,
        "Thread.shares": 100,
        "Settings.customProviders": MAX_PROVIDERS,
        "Settings.customModels": MAX_MODELS,
        "CustomProvider.models": MAX_MODELS,
    }
    assert unpaged == by_nature | by_number.keys()
    for place, most in by_number.items():
        described = dict(entry for kind in OURS for entry in descriptions(kind))[place]
        assert f"most {most}" in (described or "")
    assert f"most {MAX_SNIPPET_PARTS}" in (
        dict(descriptions(SCHEMA.type_map["SearchResult"]))["SearchResult.snippet"] or ""
    )


def test_every_id_of_a_node_has_a_kind() -> None:
    node = SCHEMA.type_map["Node"]
    assert isinstance(node, GraphQLInterfaceType)
    nodes = {kind.name for kind in SCHEMA.get_possible_types(node)}
    # A viewer has an id, but is not looked up by it.
    assert nodes == {kind.name.title() for kind in IdKind} - {"User"}


def values(name: str) -> set[str]:
    """The values of an enum."""
    kind = SCHEMA.type_map[name]
    assert isinstance(kind, GraphQLEnumType)
    return set(kind.values)


def test_the_enums_of_the_schema_are_those_of_the_code() -> None:
    assert values("MessageRole") == set(MessageRole)
    assert values("MessageStatus") == set(MessageStatus)
    assert values("ErrorCode") == set(ErrorCode)


def test_every_reason_for_which_an_answer_fails_is_in_the_schema_and_no_other() -> None:
    of_the_server = {
        value.code for value in vars(services.generation).values() if isinstance(value, MessageFailure)
    } | {SERVER_LOST.code}
    assert len(of_the_server) > 5
    assert values("MessageErrorCode") == of_the_server | set(FailureCode)


def test_every_event_of_a_stream_has_a_cursor_to_go_on_from() -> None:
    events = SCHEMA.type_map["MessageStreamEvent"]
    assert isinstance(events, GraphQLUnionType)
    assert {kind.name for kind in events.types} == {"MessageDelta", "MessagePartAdded", "MessageReset", "MessageEnded"}
    for kind in events.types:
        assert str(kind.fields["cursor"].type) == "Cursor!", kind.name


def test_names_are_spelt_as_the_field_spells_them() -> None:
    def is_camel(name: str) -> bool:
        return name[0].islower() and name.isalnum() and name.isascii()

    for kind in OURS:
        assert kind.name[0].isupper(), kind.name
        assert kind.name.isalnum(), kind.name
        if isinstance(kind, GraphQLEnumType):
            assert all(name == name.upper() for name in kind.values), kind.name
    for place, field in fields():
        assert is_camel(place.split(".")[1]), place
        assert all(map(is_camel, field.args)), place


def required(arguments: dict[str, GraphQLArgument]) -> set[str]:
    return {name for name, argument in arguments.items() if is_required_argument(argument)}


def test_an_argument_is_required_only_where_nothing_can_be_done_without_it() -> None:
    needed = {place: names for place, field in fields() if (names := required(field.args)) and names != {"input"}}
    assert needed == {
        "Query.node": {"id"},
        "Query.nodes": {"ids"},
        "Query.thread": {"id"},
        "Query.message": {"id"},
        "Query.project": {"id"},
        "Query.sharedThread": {"token"},
        "Query.usage": {"timeframe"},
        "Query.search": {"query"},
        "Subscription.messageStream": {"messageId"},
        "Subscription.usage": {"timeframe"},
    }
