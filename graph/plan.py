"""Plans: an operation compiled once, and then executed without graphql-core.

graphql-core walks a document anew for every request, and resolves each field of each object by itself: on a page of 50
threads 6 of 7 ms. A plan knows beforehand what is selected of which type. It goes through an answer level by level,
with all objects of a level at once: plain fields are one generated dict display, a field that needs a query is one call
for all its objects (`graph.batching`), and nothing waits that need not. Values go out as orjson writes them: a time
stays a `datetime`.

graphql-core remains what decides. It parses, validates, merges selections and coerces variables and arguments. Whatever
a plan does not know is executed there; and where anything fails below a root field, the plan is given up and the
operation executed there as well, which finds the errors, their paths and what becomes null. Queries can be asked twice.
A mutation cannot: there is a plan where it has one root field, and graphql-core is then handed what that has returned
(`Context.returned`). A property test compares both over generated operations.

Measurements: docs/decisions/0023-planned-execution.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any, NamedTuple, cast

import orjson
from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    GraphQLBoolean,
    GraphQLEnumType,
    GraphQLError,
    GraphQLField,
    GraphQLID,
    GraphQLLeafType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLOutputType,
    GraphQLSchema,
    GraphQLString,
    Node,
    OperationDefinitionNode,
    OperationType,
    VariableNode,
    Visitor,
    is_abstract_type,
    is_leaf_type,
    visit,
)
from graphql.error import located_error
from graphql.execution.collect_fields import FieldDetails, FragmentDetails, collect_fields, collect_subfields
from graphql.execution.values import VariableValues, get_argument_values
from strawberry.schema.schema_converter import GraphQLCoreConverter
from strawberry.types import ExecutionResult
from strawberry.types.field import StrawberryField

from graph.arguments import arguments_converter
from graph.batching import AHEAD, BATCH, JOINED, Below, Joined, Wanted
from graph.context import Context
from graph.types.node import Needs, RecordView, Views
from models.records import WRITTEN_TIME_CHARS, written_time


class UnplannedError(Exception):
    """An operation that no plan is made for."""


class AbandonedError(Exception):
    """Something did not go as a plan has it: graphql-core shall execute the operation, and say what is wrong."""


class PlannedInfo:
    """What a resolver is given in place of Strawberry's Info: the context, which is all that ours look at of it.

    Attributes:
        wanted: the fields of records that will be looked at below.
        below: a field of the objects of a list that may be read with them.
    """

    __slots__ = ("below", "context", "wanted")

    def __init__(self, context: Context, wanted: Wanted, below: Below | None) -> None:
        self.context = context
        self.wanted = wanted
        self.below = below


class Run(NamedTuple):
    """One execution of a plan."""

    context: Context
    variables: VariableValues


Values = list[Any]
Complete = Callable[[Values, Run], Awaitable[Values]]
"""From what resolvers returned to what is answered, for many at once; AbandonedError where that is not clear."""


Rows = Callable[[Sequence[Any]], list[dict[str, Any]]]
"""From the rows of many objects to their dicts, without a view of any; IndexError where what is joined is not there."""


_Arguments = Callable[[Run], dict[str, Any]]


class Ahead(NamedTuple):
    """A field that may be read with the list of its objects (see `Below`)."""

    arguments: _Arguments
    wanted: Wanted

    def of(self, run: Run) -> Below:
        """As the list's resolver is told."""
        return Below(partial(self.arguments, run), self.wanted)


class Completion(NamedTuple):
    """How a field's values are completed, and what is looked at below it.

    Attributes:
        wanted: the fields of records.
        ahead: what may be read with a list.
        rows: completes values that were not made yet, from their rows; None where that takes more than the rows.
    """

    run: Complete
    wanted: Wanted
    rows: Rows | None = None
    ahead: Ahead | None = None


class Plan:
    """A compiled query or mutation."""

    __slots__ = ("_make", "_once", "_steps")

    def __init__(self, selection: Selection, *, once: bool) -> None:
        self._make = selection.make
        self._steps = selection.steps
        self._once = once

    async def execute(self, context: Context, variables: VariableValues) -> ExecutionResult | None:
        """The answer, or None where graphql-core must find it."""
        run = Run(context, variables)
        steps = self._steps
        try:
            data = self._make([None], run)[0]
            if len(steps) == 1:
                step = steps[0]
                try:
                    values = await step.resolve([None], run)
                except Exception as error:
                    # Its place in the data holds null already.
                    return ExecutionResult(None if step.required else data, [step.located(error)])
                if self._once:
                    context.returned = values[0]
                data[step.key] = (await step.complete(values, run))[0]
            else:
                await _fill(steps, [None], [data], run)
        except Exception:
            return None
        return ExecutionResult(data, None)


class Selection:
    """What is selected of an object type: the plain fields in a generated function, the others in steps.

    Attributes:
        make: makes the dicts of many objects, with a place for what the steps fill in.
        make_joined: also fills in what was read with the rows; IndexError where it was not. None: nothing is.
        rows: see `Completion`.
        wanted: the fields of its record, or of the records below it, that are looked at.
        ahead: see `Completion`.
    """

    __slots__ = ("_rest", "ahead", "make", "make_joined", "rows", "steps", "wanted")

    def __init__(self, code: _Code, steps: list[Step], wanted: Wanted, ahead: Ahead | None) -> None:
        self.make: Callable[[Values, Run], list[dict[str, Any]]] = code.compile()
        self.steps = steps
        self._rest = [step for step in steps if step.key not in code.joined]
        self.make_joined = code.compile(joined=True) if code.joined else None
        self.rows: Rows | None = code.compile(joined=True, rows=True) if code.of_rows and not self._rest else None
        self.wanted = wanted
        self.ahead = ahead

    async def run(self, objects: Values, run: Run) -> list[dict[str, Any]]:
        """The dicts of many objects, whole."""
        steps = self.steps
        if self.make_joined is None:
            made = self.make(objects, run)
        else:
            try:
                made, steps = self.make_joined(objects, run), self._rest
            except IndexError:
                made = self.make(objects, run)
        if steps and objects:
            await _fill(steps, objects, made, run)
        return made


async def _fill(steps: list[Step], objects: Values, made: list[dict[str, Any]], run: Run) -> None:
    waiting = None
    for step in steps:
        if not step.waits:
            await step.fill(objects, made, run)
        elif waiting is None:
            waiting = [step]
        else:
            waiting.append(step)
    if waiting is None:
        return
    if len(waiting) == 1:
        await waiting[0].fill(objects, made, run)
        return
    for result in await asyncio.gather(*[step.fill(objects, made, run) for step in waiting], return_exceptions=True):
        # Only once all have ended: none is left behind that nobody waits for.
        if isinstance(result, BaseException):
            raise result


class Step:
    """One field that takes more than an expression."""

    __slots__ = ("_field", "_nodes", "complete", "key", "resolve", "waits")

    def __init__(
        self,
        key: str,
        field: GraphQLField,
        nodes: list[FieldNode],
        resolve: Callable[[Values, Run], Awaitable[Values]],
        complete: Complete,
        *,
        waits: bool,
    ) -> None:
        self.key = key
        self.resolve = resolve
        self.complete = complete
        self.waits = waits
        self._field = field
        self._nodes = nodes

    async def fill(self, objects: Values, made: list[dict[str, Any]], run: Run) -> None:
        """Put the field into the dicts of its objects."""
        key = self.key
        values = await self.complete(await self.resolve(objects, run), run)
        for one, value in zip(made, values, strict=True):
            one[key] = value

    @property
    def required(self) -> bool:
        """Whether it must not be null."""
        return isinstance(self._field.type, GraphQLNonNull)

    def located(self, error: Exception) -> GraphQLError:
        """What its resolver raised, where it is the only root field (spec, section 6.4.4)."""
        return located_error(error, self._nodes, [self.key])


class Planner:
    """Makes the plan of one operation, for one choice of the variables that decide what is left out.

    Args:
        converter: Strawberry's, which knows how arguments become Python values.

    Raises:
        UnplannedError: from `plan`, where the operation holds something that no plan covers.
    """

    def __init__(
        self,
        schema: GraphQLSchema,
        converter: GraphQLCoreConverter,
        document: DocumentNode,
        operation: OperationDefinitionNode,
        variables: VariableValues,
    ) -> None:
        self._schema = schema
        self._converter = converter
        self._document = document
        self._operation = operation
        self._variables = variables
        self._fragments = {
            node.name.value: FragmentDetails(node)
            for node in document.definitions
            if isinstance(node, FragmentDefinitionNode)
        }

    def plan(self) -> Plan:
        """The plan."""
        root = self._schema.get_root_type(self._operation.operation)
        assert root is not None
        fields = collect_fields(self._schema, self._fragments, self._variables, root, self._operation).grouped_field_set
        once = self._operation.operation is not OperationType.QUERY
        if once and len(fields) != 1:
            raise UnplannedError
        selection = self._selection(root, fields, None)
        if once and len(selection.steps) != 1:
            raise UnplannedError
        return Plan(selection, once=once)

    def _selection(
        self, kind: GraphQLObjectType, fields: dict[str, list[FieldDetails]], origin: type | None
    ) -> Selection:
        code = _Code(kind, origin)
        steps: list[Step] = []
        needs: Needs | None = getattr(origin, "needs", None)
        wanted: set[str] | None = None if needs is None else set()
        ahead: Ahead | None = None
        for key, details in fields.items():
            nodes = [detail.node for detail in details]
            name = nodes[0].name.value
            if name == "__typename":
                code.literal(key, kind.name)
                continue
            definition, field = definition_of(kind, name)
            below: Wanted = None
            if _plain(definition, field):
                code.attribute(key, field.python_name, definition.type)
            else:
                completion = self._complete(definition.type, details)
                joined: Joined | None = field.metadata.get(JOINED)
                text = None if joined is None else self._joined(code, definition.type, details, joined)
                # What cannot be written as it was read is not read so.
                below = None if joined is not None and text is None else completion.wanted
                code.later(key, text)
                steps.append(self._step(key, definition, field, nodes, completion))
                if field.metadata.get(AHEAD):
                    ahead = ahead or Ahead(self._arguments(definition, field, nodes[0]), completion.wanted)
                elif needs is not None and _view(origin) is None:
                    ahead = ahead or completion.ahead
            if wanted is not None and needs is not None:
                needed = needs.get(field.python_name)
                more = needed(below) if callable(needed) else needed
                wanted = None if more is None else wanted | set(more)
        return Selection(code, steps, None if wanted is None else frozenset(wanted), ahead)

    def _joined(self, code: _Code, kind: GraphQLOutputType, details: list[FieldDetails], joined: Joined) -> str | None:
        """The display of an object whose columns are behind those of another; None where that takes more."""
        if not isinstance(kind, GraphQLObjectType):
            return None
        inner = code.behind(kind, joined)
        for key, below in self._subfields(kind, details).items():
            name = below[0].node.name.value
            if name == "__typename":
                inner.literal(key, kind.name)
                continue
            definition, field = definition_of(kind, name)
            if not _plain(definition, field):
                return None
            inner.attribute(key, field.python_name, definition.type)
        return inner.display() if inner.of_rows else None

    def _step(
        self,
        key: str,
        definition: GraphQLField,
        field: StrawberryField,
        nodes: list[FieldNode],
        completion: Completion,
    ) -> Step:
        complete = completion.run
        resolver = field.base_resolver
        if resolver is None:
            return Step(key, definition, nodes, _attribute(field.python_name), complete, waits=False)
        if resolver.parent_parameter or resolver.root_parameter:
            raise UnplannedError(key)
        arguments = self._arguments(definition, field, nodes[0])
        batch = field.metadata.get(BATCH)
        if batch is not None:
            if "wanted" in signature(batch).parameters:
                batch = partial(batch, wanted=completion.wanted)
            called, complete = _batch(batch, arguments), _once_each(complete)
            return Step(key, definition, nodes, called, complete, waits=True)
        info = resolver.info_parameter.name if resolver.info_parameter else None
        make = _call_each if not resolver.is_async else _await_each
        function = cast("Callable[..., Any]", resolver.wrapped_func)
        called = make(function, bool(resolver.self_parameter), info, arguments, completion)
        return Step(key, definition, nodes, called, complete, waits=resolver.is_async)

    def _arguments(self, definition: GraphQLField, field: StrawberryField, node: FieldNode) -> _Arguments:
        if not definition.args:
            return _no_arguments
        convert = arguments_converter(field.arguments, self._converter)
        if not _variables_of(node.arguments):
            given = get_argument_values(definition, node, self._variables)
            if not given:
                return _no_arguments
            converted = convert(given)
            if all(value is None or isinstance(value, _UNCHANGING) for value in converted.values()):
                return lambda run: dict(converted)
            # Others are made anew for each run: a resolver may keep what it is given.
            return lambda run: convert(given)
        return lambda run: convert(get_argument_values(definition, node, run.variables))

    def _complete(self, kind: GraphQLOutputType, details: list[FieldDetails]) -> Completion:
        if isinstance(kind, GraphQLNonNull):
            completion = self._complete_nullable(kind.of_type, details)
            return completion._replace(run=_required(completion.run))
        completion = self._complete_nullable(kind, details)
        return completion._replace(run=_optional(completion.run))

    def _complete_nullable(self, kind: GraphQLOutputType, details: list[FieldDetails]) -> Completion:
        """For values that are not None."""
        if isinstance(kind, GraphQLList):
            one = self._complete(kind.of_type, details)
            return Completion(_lists(one.run, one.rows), one.wanted, ahead=one.ahead)
        if is_leaf_type(kind):
            return Completion(_leaves(_writer(kind)), None)
        if isinstance(kind, GraphQLObjectType):
            selection = self._subselection(kind, details)
            return Completion(selection.run, selection.wanted, selection.rows, selection.ahead)
        if is_abstract_type(kind):
            selections = {}
            for possible in self._schema.get_possible_types(kind):
                origin = _origin(possible)
                if origin is None:
                    raise UnplannedError(possible.name)
                selections[origin] = self._subselection(possible, details)
            return Completion(_by_class(selections), None)
        raise UnplannedError(str(kind))

    def _subselection(self, kind: GraphQLObjectType, details: list[FieldDetails]) -> Selection:
        return self._selection(kind, self._subfields(kind, details), _origin(kind))

    def _subfields(self, kind: GraphQLObjectType, details: list[FieldDetails]) -> dict[str, list[FieldDetails]]:
        collected = collect_subfields(self._schema, self._fragments, self._variables, self._operation, kind, details)
        return collected.grouped_field_set


def deciding_variables(document: DocumentNode) -> tuple[str, ...]:
    """The variables of @skip and @include: which fields are selected depends on their values."""
    names: dict[str, None] = {}
    visit(document, _DirectiveVariables(names))
    return tuple(names)


class _DirectiveVariables(Visitor):
    def __init__(self, names: dict[str, None]) -> None:
        super().__init__()
        self._names = names

    def enter_directive(self, node: Any, *_: Any) -> None:
        for name in _variables_of(node.arguments):
            self._names[name] = None


_UNCHANGING = (str, int, float, Enum)


def _no_arguments(run: Run) -> dict[str, Any]:
    del run
    return {}


def _variables_of(nodes: Sequence[Node] | None) -> list[str]:
    found: list[str] = []

    class Finder(Visitor):
        def enter_variable(self, node: VariableNode, *_: Any) -> None:
            found.append(node.name.value)

    for node in nodes or ():
        visit(node, Finder())
    return found


def definition_of(kind: GraphQLObjectType, name: str) -> tuple[GraphQLField, StrawberryField]:
    """A field as graphql-core and as Strawberry have it; UnplannedError where Strawberry has none, or extensions."""
    definition = kind.fields.get(name)
    field: StrawberryField | None = None if definition is None else definition.extensions.get("strawberry-definition")
    if definition is None or field is None or field.extensions:
        raise UnplannedError(name)
    return definition, field


def _plain(definition: GraphQLField, field: StrawberryField) -> bool:
    """Whether it is a leaf that is an attribute."""
    return field.base_resolver is None and is_leaf_type(_named(definition.type))


def _named(kind: GraphQLOutputType) -> Any:
    return kind.of_type if isinstance(kind, GraphQLNonNull) else kind


def _view(origin: type | None) -> type[RecordView] | None:
    """The type where its objects are views of rows."""
    return origin if origin is not None and issubclass(origin, RecordView) else None


def _origin(kind: GraphQLObjectType) -> type | None:
    definition = kind.extensions.get("strawberry-definition")
    origin: type | None = None if definition is None else definition.origin
    return origin


class _Code:
    """Writes the functions that make the dicts of many objects of a type: one dict display in a comprehension.

    Calls and lookups by name are most of what a plain loop over fields costs: 0.25 µs a field against 0.04. A column is
    asked for by its place, where that is known.

    Attributes:
        joined: the displays of fields that may have been read with the row, by their keys.
        of_rows: whether rows are enough, and no view is looked at.
    """

    def __init__(self, kind: GraphQLObjectType, origin: type | None) -> None:
        self._kind = kind
        self._names: dict[str, Any] = {"null": _null}
        self._items: dict[str, str] = {}
        self.joined: dict[str, str] = {}
        # A view's attributes are its record's.
        self._view = _view(origin)
        self._at = 0
        self.of_rows = self._view is not None

    def behind(self, kind: GraphQLObjectType, joined: Joined) -> _Code:
        """For an object whose columns are behind those of this one."""
        code = _Code(kind, joined.view)
        code._names = self._names
        code._at = joined.at
        return code

    def literal(self, key: str, value: str) -> None:
        """A field that is the same for all objects."""
        self._items[key] = repr(value)

    def later(self, key: str, joined: str | None) -> None:
        """A field that is filled in later, or written as `joined` where it was read with the row."""
        self._items[key] = "None"
        if joined is not None:
            self.joined[key] = joined

    def attribute(self, key: str, name: str, kind: GraphQLOutputType) -> None:
        """A leaf that is an attribute."""
        leaf = _named(kind)
        written_as = None if self._view is None else self._view.written.get(name)
        made_of = None if self._view is None else self._view.made_of.get(name)
        if made_of is not None:
            known, source, make = made_of
            made = f"{self._bound(make)}({self._column(source)})"
            read = f"(k if (k := {self._column(known)}) is not None else {made})"
        else:
            read = self._read(name) if written_as is None else self._column(written_as)
        if written_as is not None:
            written = "v"
        elif leaf.name == _TIME and self._view is not None:
            self._names |= _TIME_NAMES
            written = f"(as_read(v) if v.__class__ is text and len(v) == {WRITTEN_TIME_CHARS} else time(v))"
        elif isinstance(leaf, GraphQLEnumType):
            written = f"{self._bound(_Names(leaf))}[v]"
        else:
            write = _writer(leaf)
            written = "v" if write is None else f"{self._bound(write)}(v)"
        if isinstance(kind, GraphQLNonNull):
            self._items[key] = f"{written} if (v := {read}) is not None else null({name!r})"
        elif written == "v":
            self._items[key] = read
        else:
            self._items[key] = f"None if (v := {read}) is None else {written}"

    def _read(self, name: str) -> str:
        if self._view is None:
            return f"o.{name}"
        if name == "id":
            return f"f'{self._view.kind.value}_{{{self._column(name)}.hex}}'"
        if hasattr(self._view, name):
            self.of_rows = False
            return f"o.{name}"
        return self._column(name)

    def _column(self, name: str) -> str:
        assert self._view is not None
        row = self._view.columns
        if row is not None and name in row.columns:
            return f"r[{self._at + row.columns.index(name)}]"
        if self._at:
            self.of_rows = False
        return f"r.{name}"

    def _bound(self, value: Any) -> str:
        name = f"w{len(self._names)}"
        self._names[name] = value
        return name

    def display(self) -> str:
        """Of an object behind another; None where there is none, as its key tells."""
        return f"None if {self._column('id')} is None else {self._display({})}"

    def _display(self, joined: dict[str, str]) -> str:
        # Nothing of a document is in it but response keys, which are names, quoted.
        return "{" + ", ".join(f"{key!r}: {joined.get(key, text)}" for key, text in self._items.items()) + "}"

    def compile(self, *, joined: bool = False, rows: bool = False) -> Callable[..., Any]:
        """The function of the objects and the run, or of their rows."""
        shown = self._display(self.joined if joined else {})
        record = " for r in (o.record,)" if self._view is not None else ""
        text = f"[{shown} for r in rows]" if rows else f"[{shown} for o in objects{record}]"
        code = f"def make({'rows' if rows else 'objects, run'}):\n    return {text}\n"
        exec(compile(code, f"<plan of {self._kind.name}>", "exec"), self._names)  # noqa: S102
        made: Callable[..., Any] = self._names["make"]
        return made


def _null(name: str) -> Any:
    raise AbandonedError(name)


_TIME = "DateTime"
# What a time of a row is written with: as a rule it is JSON already.
_TIME_NAMES = {"text": str, "as_read": orjson.Fragment, "time": written_time}
# What orjson writes as graphql-core would: a time in RFC 3339, a text and a truth as they are.
_AS_THEY_ARE = frozenset({_TIME, "JSON"})


def _writer(leaf: GraphQLLeafType) -> Callable[[Any], Any] | None:
    """How a leaf's value is written; None where it stays as it is."""
    if leaf in (GraphQLString, GraphQLID, GraphQLBoolean) or leaf.name in _AS_THEY_ARE:
        return None
    return _Names(leaf).__getitem__ if isinstance(leaf, GraphQLEnumType) else leaf.coerce_output_value


class _Names(dict[Any, str]):
    """The names of an enum's values, which come as members or as the values of members."""

    def __init__(self, enum: GraphQLEnumType) -> None:
        super().__init__({member.value: name for name, member in enum.values.items()})

    def __missing__(self, value: Any) -> str:
        return self[value.value]


def _attribute(name: str) -> Callable[[Values, Run], Awaitable[Values]]:
    async def resolve(objects: Values, run: Run) -> Values:
        del run
        return [getattr(one, name) for one in objects]

    return resolve


def _batch(load: Callable[..., Awaitable[Values]], arguments: _Arguments) -> Callable[[Values, Run], Awaitable[Values]]:
    async def resolve(objects: Values, run: Run) -> Values:
        values = await load(objects, run.context, **arguments(run))
        if any(issubclass(kind, BaseException) for kind in set(map(type, values))):
            raise next(value for value in values if isinstance(value, BaseException))
        return values

    return resolve


def _planned_info(run: Run, completion: Completion) -> PlannedInfo:
    ahead = completion.ahead
    return PlannedInfo(run.context, completion.wanted, None if ahead is None else ahead.of(run))


def _call_each(
    resolver: Callable[..., Any], takes_self: bool, info: str | None, arguments: _Arguments, completion: Completion
) -> Callable[[Values, Run], Awaitable[Values]]:
    async def resolve(objects: Values, run: Run) -> Values:
        given = arguments(run)
        if info is not None:
            given[info] = _planned_info(run, completion)
        if not takes_self:
            return [resolver(**given) for _ in objects]
        if not given:
            return [resolver(one) for one in objects]
        return [resolver(one, **given) for one in objects]

    return resolve


def _await_each(
    resolver: Callable[..., Any], takes_self: bool, info: str | None, arguments: _Arguments, completion: Completion
) -> Callable[[Values, Run], Awaitable[Values]]:
    async def resolve(objects: Values, run: Run) -> Values:
        given = arguments(run)
        if info is not None:
            given[info] = _planned_info(run, completion)
        calls = [resolver(one, **given) for one in objects] if takes_self else [resolver(**given) for _ in objects]
        if len(calls) == 1:
            return [await calls[0]]
        values = await asyncio.gather(*calls, return_exceptions=True)
        for value in values:
            if isinstance(value, BaseException):
                raise value
        return values

    return resolve


def _once_each(complete: Complete) -> Complete:
    """For values among which are the same objects again and again: what becomes of one is written as often."""

    async def once_each(values: Values, run: Run) -> Values:
        distinct = {id(value): value for value in values}
        if len(distinct) == len(values):
            return await complete(values, run)
        completed = dict(zip(distinct, await complete(list(distinct.values()), run), strict=True))
        return [completed[id(value)] for value in values]

    return once_each


def _required(complete: Complete) -> Complete:
    async def required(values: Values, run: Run) -> Values:
        for value in values:
            if value is None:
                raise AbandonedError("null")
        return await complete(values, run)

    return required


def _optional(complete: Complete) -> Complete:
    async def optional(values: Values, run: Run) -> Values:
        present = [value for value in values if value is not None]
        if not present:
            return values
        completed = await complete(present, run)
        if len(present) == len(values):
            return completed
        rest = iter(completed)
        return [None if value is None else next(rest) for value in values]

    return optional


def _lists(complete: Complete, rows: Rows | None) -> Complete:
    async def lists(values: Values, run: Run) -> Values:
        made = None if rows is None else _of_rows(values, rows)
        if made is None:
            if len(values) == 1:
                return [await complete(list(values[0]), run)]
            made = await complete([item for value in values for item in value], run)
        elif len(values) == 1:
            return [made]
        rest = iter(made)
        return [list(islice(rest, len(value))) for value in values]

    return lists


def _of_rows(values: Values, rows: Rows) -> Values | None:
    """Of lists of views that nobody has looked at; None where there are others, or the rows are not enough."""
    for value in values:
        if type(value) is not Views:
            return None
    try:
        return rows(values[0].records if len(values) == 1 else [row for value in values for row in value.records])
    except IndexError:
        return None


def _leaves(write: Callable[[Any], Any] | None) -> Complete:
    async def leaves(values: Values, run: Run) -> Values:
        del run
        return values if write is None else [write(value) for value in values]

    return leaves


def _by_class(selections: dict[type, Selection]) -> Complete:
    async def by_class(values: Values, run: Run) -> Values:
        kinds = {type(value) for value in values}
        if len(kinds) == 1:
            return await selections[kinds.pop()].run(values, run)
        completed: Values = [None] * len(values)
        for kind in kinds:
            places = [place for place, value in enumerate(values) if type(value) is kind]
            made = await selections[kind].run([values[place] for place in places], run)
            for place, one in zip(places, made, strict=True):
                completed[place] = one
        return completed

    return by_class
