"""Arguments as resolvers take them: what Strawberry's `convert_arguments` does, compiled once for each field.

Strawberry looks up anew for every value what its type is: 0.2 of the 3 ms of a whole turn. Only what is plain is
compiled, which is leaves, lists and input objects; whatever else there may be is still Strawberry's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from strawberry.relay import GlobalID
from strawberry.scalars import is_scalar
from strawberry.schema.schema_converter import GraphQLCoreConverter
from strawberry.types.arguments import StrawberryArgument, convert_argument
from strawberry.types.base import StrawberryList, StrawberryMaybe, StrawberryOptional, has_object_definition
from strawberry.types.enum import StrawberryEnumDefinition, has_enum_definition
from strawberry.types.lazy_type import LazyType
from strawberry.types.unset import UNSET

Convert = Callable[[Any], Any]
# Of input types that are met once, what converts them: such a type may hold itself.
_Inputs = dict[type, Convert]


def arguments_converter(
    arguments: Sequence[StrawberryArgument], converter: GraphQLCoreConverter
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What makes keyword arguments of a resolver from the values that graphql-core has coerced, by their schema names.

    Args:
        converter: Strawberry's, which knows its scalars and how names are written.
    """
    name_of = converter.config.name_converter.from_argument
    inputs: _Inputs = {}
    known = [(name_of(one), one.python_name, _value_converter(one.type, converter, inputs)) for one in arguments]

    def convert(given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            python_name: given[name] if convert_value is None else convert_value(given[name])
            for name, python_name, convert_value in known
            if name in given
        }

    return convert


def _value_converter(kind: Any, converter: GraphQLCoreConverter, inputs: _Inputs) -> Convert | None:
    """For values of a type; None where they stay as they are."""
    if isinstance(kind, StrawberryOptional) and not isinstance(kind, StrawberryMaybe):
        return _value_converter(kind.of_type, converter, inputs)
    if isinstance(kind, LazyType):
        return _value_converter(kind.resolve_type(), converter, inputs)
    if isinstance(kind, StrawberryList):
        return _list_converter(_value_converter(kind.of_type, converter, inputs))
    if isinstance(kind, StrawberryEnumDefinition) or has_enum_definition(kind):
        return None
    if kind is not GlobalID and is_scalar(kind, converter.scalar_registry):
        return None
    if has_object_definition(kind):
        definition = kind.__strawberry_definition__
        if definition.is_input and definition.from_input is None:
            return inputs.get(kind) or _input_converter(kind, converter, inputs)
    return lambda value: convert_argument(value, kind, converter.scalar_registry, converter.config)


def _list_converter(convert: Convert | None) -> Convert:
    def convert_list(values: Any) -> Any:
        if values is None or values is UNSET:
            return values
        # A copy in any case: a default is the same list for all who leave it out.
        return list(values) if convert is None else [convert(value) for value in values]

    return convert_list


def _input_converter(kind: type, converter: GraphQLCoreConverter, inputs: _Inputs) -> Convert:
    definition: Any = kind.__strawberry_definition__  # type: ignore[attr-defined]
    # What has no default of its own is None where it is left out.
    defaults = {
        field.python_name: None
        for field in definition.fields
        if field.default_value is MISSING and field.default_factory is MISSING
    }
    name_of = converter.config.name_converter.from_field
    known: list[tuple[str, str, Convert | None]] = []

    def convert_input(value: Any) -> Any:
        if value is None or value is UNSET:
            return value
        given = defaults.copy()
        for name, python_name, convert in known:
            if name in value:
                given[python_name] = value[name] if convert is None else convert(value[name])
        return kind(**given)

    inputs[kind] = convert_input
    for field in definition.fields:
        convert = _value_converter(field.resolve_type(type_definition=definition), converter, inputs)
        known.append((name_of(field), field.python_name, convert))
    return convert_input
