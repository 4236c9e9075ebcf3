"""Arguments are made of what a client gives as Strawberry makes them, for every field of the schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    Undefined,
)
from strawberry.types.arguments import convert_arguments
from strawberry.types.field import StrawberryField

from graph.arguments import arguments_converter
from graph.schema import build_schema

SCHEMA = build_schema(introspection=True)
CONVERTER = SCHEMA.schema_converter


def fields_with_arguments() -> Iterator[Any]:
    for kind in SCHEMA._schema.type_map.values():
        if isinstance(kind, GraphQLObjectType) and not kind.name.startswith("__"):
            for name, field in kind.fields.items():
                if field.args:
                    yield pytest.param(field, id=f"{kind.name}.{name}")


def coerced(kind: GraphQLInputType, how: str) -> Any:
    """A value as graphql-core hands it on: all of it, only what is required, or null wherever that may be."""
    if isinstance(kind, GraphQLNonNull):
        return coerced(kind.of_type, "required" if how == "null" else how)
    if how == "null":
        return None
    if isinstance(kind, GraphQLList):
        return [coerced(kind.of_type, how)] * 2
    if isinstance(kind, GraphQLEnumType):
        return next(iter(kind.values.values())).value
    if isinstance(kind, GraphQLInputObjectType):
        return {
            name: (
                field.default_value
                if how == "required" and field.default_value is not Undefined
                else coerced(field.type, how if how == "all" else "null")
            )
            for name, field in kind.fields.items()
            if how == "all" or isinstance(field.type, GraphQLNonNull) or field.default_value is not Undefined
        }
    return f"a {kind}"


@pytest.mark.parametrize("how", ["all", "required", "null"])
@pytest.mark.parametrize("field", list(fields_with_arguments()))
def test_arguments_are_those_that_strawberry_makes(field: Any, how: str) -> None:
    definition: StrawberryField = field.extensions["strawberry-definition"]
    given = {name: coerced(argument.type, how) for name, argument in field.args.items()}
    convert = arguments_converter(definition.arguments, CONVERTER)
    for some in (given, dict(list(given.items())[:1]), {}):
        expected = convert_arguments(some, definition.arguments, CONVERTER.scalar_registry, CONVERTER.config)
        made = convert(some)
        assert made == expected
        assert [type(value) for value in made.values()] == [type(value) for value in expected.values()]
        # Nothing of one request can change in the next.
        assert not any(value is some[name] for value in made.values() for name in some if isinstance(some[name], list))
