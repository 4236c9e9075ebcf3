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
    parse_value,
    value_from_ast_untyped,
)
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
# Of a document: fragments in fragments would make some that take longer to draw than to execute.
_MOST_PARTS = 60


@dataclass(slots=True)
class Operation:
    """A document with the variables it is asked with."""

    document: str
    variables: dict[str, Any]
    name: str | None = None


@dataclass(slots=True)
class _Writing:
    """One document while it is made up.

    Attributes:
        values: literals for arguments, by their names or by the names of their types.
        declared: the types of variables with their defaults, by their names.
        variables: what is given for variables, where something is.
    """

    schema: GraphQLSchema
    draw: Draw
    values: Mapping[str, Sequence[str]]
    without: frozenset[str]
    declared: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    fragments: list[str] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    aliases: int = 0
    parts: int = 0

    def selection(self, kind: GraphQLNamedType, depth: int) -> str:
        """What to select of a composite type, with its braces."""
        parts = [self._part(kind, depth) for _ in range(self.draw(st.integers(1, 4)))]
        return "{ " + " ".join(parts) + " }"

    def _part(self, kind: GraphQLNamedType, depth: int) -> str:
        self.parts += 1
        if self.parts > _MOST_PARTS:
            return "__typename"
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
        if not names:
            return "__typename"
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
        """A literal, or a variable."""
        if self.draw(st.integers(0, 3)) == 0:
            return self._variable(name, kind)
        if isinstance(kind, GraphQLNonNull):
            return self._literal(name, kind.of_type)
        return "null" if self.draw(st.integers(0, 9)) == 0 else self._literal(name, kind)

    def _literal(self, name: str, kind: Any, *, variables: bool = True) -> str:
        """One that is not null. `variables`: whether there may be some in it."""

        def inner(name: str, kind: Any) -> str:
            return self._value(name, kind) if variables else self._literal(name, _nullable(kind), variables=False)

        if isinstance(kind, GraphQLList):
            items = [inner(name, kind.of_type) for _ in range(self.draw(st.integers(0, 3)))]
            # The spec takes one item for a list of it (section 3.11).
            return items[0] if len(items) == 1 and self.draw(st.booleans()) else f"[{', '.join(items)}]"
        if isinstance(kind, GraphQLEnumType):
            return str(self.draw(st.sampled_from(sorted(kind.values))))
        if isinstance(kind, GraphQLInputObjectType):
            chosen = [
                one
                for one, its in kind.fields.items()
                if isinstance(its.type, GraphQLNonNull) or self.draw(st.integers(0, 3)) == 0
            ]
            return "{" + ", ".join(f"{one}: {inner(one, kind.fields[one].type)}" for one in chosen) + "}"
        return str(self.draw(st.sampled_from(self.values.get(name) or self.values[kind.name])))

    def _variable(self, name: str, kind: Any) -> str:
        """A new variable where this type is expected: with a default or without, given, null or left out."""
        variable = f"v{len(self.declared)}"
        required = isinstance(kind, GraphQLNonNull)
        nullable = _nullable(kind)
        default = self.draw(st.integers(0, 2)) == 0
        strict = (required and not default) or self.draw(st.booleans())
        self.declared[variable] = f"{nullable}{'!' if strict else ''}" + (
            f" = {self._literal(name, nullable, variables=False)}" if default else ""
        )
        given = self.draw(st.sampled_from(["value", "value", "value", "null", "nothing"]))
        # What is required and missing is one error of the whole operation: seldom enough.
        if given == "value" or (strict and self.draw(st.integers(0, 9))):
            given = "nothing" if default and given == "nothing" else "value"
        if given == "value":
            literal = self._literal(name, nullable, variables=False)
            self.variables[variable] = value_from_ast_untyped(parse_value(literal))
        elif given == "null":
            self.variables[variable] = None
        return f"${variable}"

    def _directive(self) -> str:
        form = self.draw(st.sampled_from(["", "", "", "", "", "include", "skip"]))
        if not form:
            return ""
        condition = self.draw(st.sampled_from(["true", "false", "$yes", "$no", "$usually", "$perhaps"]))
        match condition:
            case "$yes" | "$no":
                self.declared[condition[1:]], self.variables[condition[1:]] = "Boolean!", condition == "$yes"
            case "$usually":
                self.declared["usually"] = "Boolean! = true"
                if "usually" not in self.variables and self.draw(st.booleans()):
                    self.variables["usually"] = False
            case "$perhaps":
                # With a default it may stand where null may not; null is an error there all the same.
                self.declared["perhaps"] = "Boolean = false"
                if "perhaps" not in self.variables and self.draw(st.integers(0, 2)) == 0:
                    self.variables["perhaps"] = self.draw(st.sampled_from([True, False, None]))
        return f"@{form}(if: {condition})"


def _nullable(kind: Any) -> Any:
    return kind.of_type if isinstance(kind, GraphQLNonNull) else kind


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
    # The deepest ask for more than an operation may, more often than not.
    return _whole("query", writing, writing.selection(root, draw(st.sampled_from([1, 2, 2, 3, 4]))))


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
    heads = [f"${name}: {declared}" for name, declared in writing.declared.items()]
    head = f"{kind} Random{'(' + ', '.join(heads) + ')' if heads else ''} "
    definitions = [head + selection, *writing.fragments]
    name = writing.draw(st.sampled_from([None, None, None, "Random"]))
    if writing.draw(st.integers(0, 4)) == 0:
        # Which of several is meant, a name must say.
        definitions.insert(writing.draw(st.integers(0, 1)), "query Another { __typename }")
        name = writing.draw(st.sampled_from(["Random", "Random", "Random", "Another", "Third", None]))
    return Operation("\n".join(definitions), writing.variables, name)
