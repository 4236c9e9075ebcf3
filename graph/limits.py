"""What one operation may ask for, decided before anything of it is executed.

Documents are parsed and validated once and kept: the limits that depend on the document alone are one validation rule
(built once; a rule class made per request would defeat the cache), and the cost, which depends on the variables' page
sizes, is a small tree evaluated for each request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    IntValueNode,
    OperationDefinitionNode,
    SelectionSetNode,
    VariableNode,
    get_operation_ast,
    validate,
)
from graphql.validation import ASTValidationRule, NoSchemaIntrospectionCustomRule, ValidationContext
from strawberry.extensions import SchemaExtension
from strawberry.schema.schema import validate_document

from graph.context import Context
from graph.errors import code_error
from graph.plan import Plan
from graph.subscription_plan import SubscriptionPlan
from services.custom_providers import MAX_MODELS, MAX_PROVIDERS
from services.errors import ErrorCode
from services.messages import MAX_SIBLINGS
from services.paging import DEFAULT_PAGE, MAX_NODES, MAX_PAGE
from services.search_query import MAX_SNIPPET_PARTS
from services.sharing import MAX_SHARES

MAX_TOKENS = 2_000
MAX_DEPTH = 12
MAX_FIELDS = 1_000
MAX_ALIASES = 30
MAX_DIRECTIVES = 20
MAX_OPERATIONS = 20
MAX_ROOT_FIELDS = 20
MAX_COST = 50_000
_INTROSPECTION_DEPTH = 16
_CACHED_DOCUMENTS = 1_000
_CACHED_CHARS = 100_000
# A key may stand in the document itself; none is kept for longer than it takes to store it.
_NEVER_CACHED = ("setProviderKey", "saveCustomProvider")

# Fields that give lists, and how long they can be; pages are as long as they are asked to be.
_PAGES = frozenset({"threads", "messages", "projects", "attachments", "search"})
_LISTS = {
    "siblings": MAX_SIBLINGS,
    "shares": MAX_SHARES,
    "parts": 4,
    "models": MAX_MODELS,
    "providerKeys": 20,
    "customProviders": MAX_PROVIDERS,
    "customModels": MAX_MODELS,
    "buckets": 30,
    "byModel": 20,
    "snippet": MAX_SNIPPET_PARTS,
}


class LimitsRule(ASTValidationRule):
    """Depth, fields, aliases and directives of the whole document, fragments unfolded but never walked twice."""

    def __init__(self, context: ValidationContext) -> None:
        super().__init__(context)
        document = context.document
        self._fragments = {
            node.name.value: node for node in document.definitions if isinstance(node, FragmentDefinitionNode)
        }
        self._shapes: dict[str, _Shape | None] = {}
        self._aliases = 0
        self._directives = 0
        operations = [node for node in document.definitions if isinstance(node, OperationDefinitionNode)]
        if len(operations) > MAX_OPERATIONS:
            self._refuse(f"A document has at most {MAX_OPERATIONS} operations.")
        for operation in operations:
            self._check(operation)

    def _check(self, operation: OperationDefinitionNode) -> None:
        shape = self._shape(operation.selection_set)
        roots = [node.name.value for node in operation.selection_set.selections if isinstance(node, FieldNode)]
        deepest = _INTROSPECTION_DEPTH if roots and all(name.startswith("__") for name in roots) else MAX_DEPTH
        if shape.depth > deepest:
            self._refuse(f"An operation is at most {deepest} fields deep.")
        elif shape.fields > MAX_FIELDS:
            self._refuse(f"An operation selects at most {MAX_FIELDS} fields.")
        elif len(operation.selection_set.selections) > MAX_ROOT_FIELDS:
            self._refuse(f"An operation selects at most {MAX_ROOT_FIELDS} root fields.")
        elif self._aliases > MAX_ALIASES:
            self._refuse(f"A document has at most {MAX_ALIASES} aliases.")
        elif self._directives + len(operation.directives or ()) > MAX_DIRECTIVES:
            self._refuse(f"A document has at most {MAX_DIRECTIVES} directives.")

    def _refuse(self, message: str) -> None:
        self.report_error(code_error(ErrorCode.QUERY_TOO_COMPLEX, message))

    def _shape(self, selection_set: SelectionSetNode | None) -> _Shape:
        whole = _Shape()
        for node in selection_set.selections if selection_set else ():
            self._directives += len(node.directives or ())
            if isinstance(node, FieldNode):
                self._aliases += node.alias is not None
                below = self._shape(node.selection_set)
                whole.add(_Shape(below.depth + 1, below.fields + 1))
            elif isinstance(node, InlineFragmentNode):
                whole.add(self._shape(node.selection_set))
            elif isinstance(node, FragmentSpreadNode):
                whole.add(self._fragment(node.name.value))
        return whole

    def _fragment(self, name: str) -> _Shape:
        if name not in self._shapes:
            # Ends cycles, which another rule refuses.
            self._shapes[name] = None
            fragment = self._fragments.get(name)
            self._shapes[name] = self._shape(fragment.selection_set) if fragment else _Shape()
        return self._shapes[name] or _Shape()


@dataclass(slots=True)
class _Shape:
    depth: int = 0
    fields: int = 0

    def add(self, other: _Shape) -> None:
        self.depth = max(self.depth, other.depth)
        # Bounded: an exponential spread must not make a number of a million digits.
        self.fields = min(self.fields + other.fields, 10 * MAX_FIELDS)


@dataclass(slots=True)
class _Cost:
    """Objects that a selection can make: itself (a scalar is none), times the length of its list."""

    length: int = 1
    variables: tuple[str, ...] = ()
    below: list[_Cost] = field(default_factory=list)

    def of(self, variables: Mapping[str, Any]) -> float:
        """The cost with these variables; a page size that is no number is refused later, by its type."""
        length: float = self.length
        for name in self.variables:
            given = variables.get(name)
            # A whole number may be written as 100.0.
            size = min(given, MAX_PAGE) if isinstance(given, int | float) and given > 0 else DEFAULT_PAGE
            length = max(length, size)
        return length * (1 + sum([cost.of(variables) for cost in self.below]))

    @property
    def varies(self) -> bool:
        """Whether it depends on variables."""
        return bool(self.variables) or any(cost.varies for cost in self.below)


@dataclass(slots=True)
class _OperationCost:
    """What an operation can give.

    Attributes:
        defaults: of its variables, where these are numbers.
        light: whether it was found to cost little enough whatever its variables are.
    """

    costs: list[_Cost]
    defaults: dict[str, int]
    light: bool = False

    def refusal(self, variables: dict[str, Any]) -> list[GraphQLError]:
        """The refusal of what could give too many objects with these variables."""
        if self.light:
            return []
        given = self.defaults | variables if self.defaults else variables
        cost = sum([cost.of(given) for cost in self.costs])
        self.light = cost <= MAX_COST and not any(cost.varies for cost in self.costs)
        if cost > MAX_COST:
            return [code_error(ErrorCode.QUERY_TOO_COMPLEX, f"This operation could give more than {MAX_COST} objects.")]
        return []


@dataclass(slots=True)
class Checked:
    """What is remembered of a document."""

    document: DocumentNode
    errors: list[GraphQLError]
    operations: dict[str | None, OperationDefinitionNode]
    """By name; one that stands alone also by None."""
    costs: dict[str | None, _OperationCost]
    """Of its operations, by the same names, where it has no errors."""
    plans: dict[Hashable, Plan | SubscriptionPlan | None] = field(default_factory=dict)
    """Of its operations, by the operation and the values of the variables that decide which fields are left out."""
    deciding: tuple[str, ...] | None = None
    """The names of those variables, once they were looked for."""

    def weigh(self, operation_name: str | None, variables: dict[str, Any]) -> list[GraphQLError]:
        """The refusal of an operation that could give too many objects; one that does not exist is refused later."""
        cost = self.costs.get(operation_name)
        return [] if cost is None else cost.refusal(variables)


class Documents:
    """The documents of a schema that were checked, the latest 1,000 of them."""

    def __init__(self) -> None:
        self._checked: OrderedDict[str, Checked] = OrderedDict()

    def find(self, query: str) -> Checked | None:
        """What is known of a document, if anything."""
        checked = self._checked.get(query)
        if checked is not None:
            self._checked.move_to_end(query)
        return checked

    def remember(self, query: str, checked: Checked) -> None:
        """Keep a document, unless it is very long or may hold a key."""
        if len(query) <= _CACHED_CHARS and not any(name in query for name in _NEVER_CACHED):
            self._checked[query] = checked
        if len(self._checked) > _CACHED_DOCUMENTS:
            self._checked.popitem(last=False)


class DocumentLimits(SchemaExtension):
    """Parses and validates each document once, and refuses what is too much.

    One instance a request; the documents belong to the class made by `document_limits`.
    """

    documents: Documents
    introspection: bool

    def on_parse(self) -> Iterator[None]:
        """Take the parsed document from the cache."""
        context = self.execution_context
        context.parse_options["max_tokens"] = MAX_TOKENS
        known = self.documents.find(context.query or "")
        if known is not None:
            context.graphql_document = known.document
        yield

    def on_validate(self) -> Iterator[None]:
        """Take the verdict from the cache, or find it; then weigh the operation with its variables."""
        context = self.execution_context
        query = context.query or ""
        known = self.documents.find(query)
        if known is None:
            assert context.graphql_document is not None
            known = self._check(context.graphql_document)
            self.documents.remember(query, known)
        # Not None: Strawberry then does not validate again.
        context.pre_execution_errors = (
            known.errors or self._unnamed(known) or known.weigh(self._asked, context.variables or {})
        )
        if not context.pre_execution_errors:
            self._tell(known.document)
        yield

    @property
    def _asked(self) -> str | None:
        """The name of the operation to run, where the request has one."""
        name: str | None = self.execution_context._provided_operation_name  # noqa: SLF001
        return name

    def _tell(self, document: DocumentNode) -> None:
        """Let whoever counts operations know which one this is: only names of such as are executed are kept."""
        operation, context = get_operation_ast(document, self._asked), self.execution_context.context
        if operation is not None and isinstance(context, Context):
            context.begin(operation)

    def _check(self, document: DocumentNode) -> Checked:
        context = self.execution_context
        # The limits first and alone: the other rules take quadratic time on what the limits refuse.
        errors = validate(context.schema._schema, document, [LimitsRule])  # noqa: SLF001
        if not errors:
            rules = (*context.validation_rules, *(() if self.introspection else (NoSchemaIntrospectionCustomRule,)))
            errors = validate_document(context.schema._schema, document, rules)  # noqa: SLF001
        operations = [node for node in document.definitions if isinstance(node, OperationDefinitionNode)]
        named = {node.name.value if node.name is not None else None: node for node in operations}
        if len(operations) == 1:
            named[None] = operations[0]
        costs = {} if errors else _costs(document, named)
        return Checked(document, [_validation_error(error) for error in errors], named, costs)

    def _unnamed(self, known: Checked) -> list[GraphQLError]:
        """Strawberry would run the first of several operations (spec, section 6.1: it is an error)."""
        if self._asked is not None or None in known.operations:
            return []
        return [code_error(ErrorCode.GRAPHQL_VALIDATION_FAILED, "Of several operations, operationName must name one.")]


def document_limits(documents: Documents, *, introspection: bool) -> type[DocumentLimits]:
    """The extension of one schema, which remembers its documents."""
    return type("DocumentLimits", (DocumentLimits,), {"documents": documents, "introspection": introspection})


def _validation_error(error: GraphQLError) -> GraphQLError:
    if not (error.extensions and "code" in error.extensions):
        error.extensions = {"code": ErrorCode.GRAPHQL_VALIDATION_FAILED.value}
    return error


def _costs(
    document: DocumentNode, operations: dict[str | None, OperationDefinitionNode]
) -> dict[str | None, _OperationCost]:
    fragments = {node.name.value: node for node in document.definitions if isinstance(node, FragmentDefinitionNode)}
    known: dict[str, list[_Cost]] = {}

    def costs(selection_set: SelectionSetNode | None) -> list[_Cost]:
        found: list[_Cost] = []
        for node in selection_set.selections if selection_set else ():
            if isinstance(node, FieldNode):
                found.append(_field_cost(node, costs(node.selection_set)))
            elif isinstance(node, InlineFragmentNode):
                found += costs(node.selection_set)
            elif isinstance(node, FragmentSpreadNode):
                name = node.name.value
                if name not in known:
                    known[name] = costs(fragments[name].selection_set)
                found += known[name]
        return found

    return {
        name: _OperationCost(costs(operation.selection_set), _default_sizes(operation))
        for name, operation in operations.items()
    }


def _default_sizes(operation: OperationDefinitionNode) -> dict[str, int]:
    return {
        definition.variable.name.value: _size(definition.default_value)
        for definition in operation.variable_definitions or ()
        if isinstance(definition.default_value, IntValueNode)
    }


def _size(node: IntValueNode) -> int:
    # A number of thousands of digits, as an ID may have, cannot be read at all.
    return max(0, min(int(node.value[:12]), MAX_PAGE))


def _field_cost(node: FieldNode, below: list[_Cost]) -> _Cost:
    name = node.name.value
    if node.selection_set is None:
        return _Cost(0)
    if name == "nodes" and node.arguments:
        return _Cost(MAX_NODES, (), below)
    if name not in _PAGES:
        return _Cost(_LISTS.get(name, 1), (), below)
    sizes = [argument.value for argument in node.arguments or () if argument.name.value in ("first", "last")]
    length = max([_size(size) for size in sizes if isinstance(size, IntValueNode)], default=0)
    variables = tuple(size.name.value for size in sizes if isinstance(size, VariableNode))
    return _Cost(length or (0 if variables else DEFAULT_PAGE), variables, below)
