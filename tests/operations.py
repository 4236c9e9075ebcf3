"""Random operations over the schema itself: whatever can be asked, in all the ways that GraphQL has for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphql import (
    GraphQLEnumType,
    GraphQLField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNamedType,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    get_named_type,
    is_composite_type,
)
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(slots=True)
class Operation:
    """A document with the variables it is asked with."""

    document: str
    variables: dict[str, Any]


@dataclass(slots=True)
class _Writing:
    """One document while it is made up.

    Attributes:
        values: literals for arguments, by their names or by the names of their types.
    """

    schema: GraphQLSchema
    draw: Draw
    values: Mapping[str, Sequence[str]]
    without: frozenset[str]
    variables: dict[str, tuple[str, Any]] = field(default_factory=dict)
    fragments: list[str] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    aliases: int = 0
    fields: int = 0

    def selection(self, kind: GraphQLNamedType, depth: int) -> str:
        """What to select of a composite type, with its braces."""
        parts = [self._part(kind, depth) for _ in range(self.draw(st.integers(1, 4)))]
        return "{ " + " ".join(parts) + " }"

    def _part(self, kind: GraphQLNamedType, depth: int) -> str:
        form = self.draw(st.sampled_from(["field", "field", "field", "field", "inline", "named", "typename"]))
        possible: list[GraphQLNamedType] = [kind]
        if isinstance(kind, GraphQLInterfaceType | GraphQLUnionType):
            possible = [*self.schema.get_possible_types(kind), kind]
            form = self.draw(st.sampled_from(["inline", "inline", "named", form]))
        elif isinstance(kind, GraphQLObjectType):
            possible = [kind, *kind.interfaces]
        if form == "typename" or (form == "field" and isinstance(kind, GraphQLUnionType)):
            return f"__typename {self._directive()}"
        if form == "field":
            return self._field(kind, depth)
        on = self.draw(st.sampled_from(possible))
        selection = self.selection(on, depth)
        if form == "inline":
            bare = on is kind and self.draw(st.booleans())
            return f"... {'' if bare else f'on {on.name}'} {self._directive()} {selection}"
        name = f"F{len(self.fragments)}"
        self.fragments.append(f"fragment {name} on {on.name} {selection}")
        return f"...{name} {self._directive()}"

    def _field(self, kind: Any, depth: int) -> str:
        names = [
            name
            for name, one in kind.fields.items()
            if name not in self.without and (depth > 0 or not is_composite_type(get_named_type(one.type)))
        ]
        if not names or self.fields > 60:
            return "__typename"
        self.fields += 1
        name = self.draw(st.sampled_from(sorted(names)))
        asked: GraphQLField = kind.fields[name]
        below = get_named_type(asked.type)
        selection = self.selection(below, depth - 1) if is_composite_type(below) else ""
        key = f"{kind.name}.{name}"
        if asked.args and self.aliases < 25 and self.draw(st.booleans()):
            self.aliases += 1
            return f"a{self.aliases}: {name}{self._arguments(asked)} {self._directive()} {selection}"
        # One key has one choice of arguments, or the document would be no valid one.
        if key not in self.arguments:
            self.arguments[key] = self._arguments(asked)
        return f"{name}{self.arguments[key]} {self._directive()} {selection}"

    def _arguments(self, asked: GraphQLField) -> str:
        given = []
        for name, argument in asked.args.items():
            if isinstance(argument.type, GraphQLNonNull) or self.draw(st.integers(0, 3)) == 0:
                given.append(f"{name}: {self._value(name, argument.type)}")
        return f"({', '.join(given)})" if given else ""

    def _value(self, name: str, kind: Any) -> str:
        if isinstance(kind, GraphQLNonNull):
            return self._value(name, kind.of_type)
        if isinstance(kind, GraphQLList):
            return "[" + ", ".join(self._value(name, kind.of_type) for _ in range(self.draw(st.integers(0, 3)))) + "]"
        if isinstance(kind, GraphQLEnumType):
            return str(self.draw(st.sampled_from(sorted(kind.values))))
        if isinstance(kind, GraphQLInputObjectType):
            chosen = [one for one in kind.fields if self.draw(st.integers(0, 3)) == 0]
            return "{" + ", ".join(f"{one}: {self._value(one, kind.fields[one].type)}" for one in chosen) + "}"
        literal = str(self.draw(st.sampled_from(self.values.get(name) or self.values[kind.name])))
        if kind.name == "Int" and self.draw(st.booleans()):
            variable = f"int{len(self.variables)}"
            self.variables[variable] = ("Int", int(literal))
            return f"${variable}"
        return literal

    def _directive(self) -> str:
        form = self.draw(st.sampled_from(["", "", "", "", "", "include", "skip"]))
        if not form:
            return ""
        condition = self.draw(st.sampled_from(["true", "false", "$yes", "$no"]))
        if condition[0] == "$":
            self.variables.setdefault(condition[1:], ("Boolean!", condition == "$yes"))
        return f"@{form}(if: {condition})"


@st.composite
def operations(
    draw: Draw, schema: GraphQLSchema, values: Mapping[str, Sequence[str]], without: frozenset[str]
) -> Operation:
    """Queries, most of them valid.

    Args:
        values: literals for arguments, by the names of arguments or of their types.
        without: names of fields that are left out.
    """
    root = schema.query_type
    assert root is not None
    writing = _Writing(schema, draw, values, without)
    return _whole("query", writing, writing.selection(root, 4))


@st.composite
def mutations(
    draw: Draw,
    schema: GraphQLSchema,
    values: Mapping[str, Sequence[str]],
    without: frozenset[str],
    asked: Sequence[str],
) -> Operation:
    """Mutations of one root field, with whatever can be selected of what they return.

    Args:
        values, without: as those of `operations`.
        asked: the root fields with their arguments.
    """
    root = schema.mutation_type
    assert root is not None
    writing = _Writing(schema, draw, values, without)
    field = draw(st.sampled_from(asked))
    payload = get_named_type(root.fields[field.partition("(")[0]].type)
    return _whole("mutation", writing, f"{{ {field} {writing.selection(payload, 4)} }}")


def _whole(kind: str, writing: _Writing, selection: str) -> Operation:
    variables = {name: value for name, (_, value) in writing.variables.items()}
    heads = [f"${name}: {kind}" for name, (kind, _) in writing.variables.items()]
    head = f"{kind} Random{'(' + ', '.join(heads) + ')' if heads else ''} "
    return Operation("\n".join([head + selection, *writing.fragments]), variables)
