"""The deltas of a message's stream, from their buffer straight into the frames of sockets.

A token stream is deltas and nearly nothing else. Where a selection takes only plain fields of `MessageDelta`, which
is what `graph.event_executor` finds, a delta is the same few bytes for all readers who asked the same, made once by a
`DeltaPlan` that they share. What else happens in a stream (a whole part, a reset, the end, an error) comes by way of
graphql-core, and so does every delta of a selection that is not plain.

Measured with its sender in `server.delta_sender`: docs/decisions/0024-deltas-without-tasks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from json.encoder import encode_basestring as quoted
from operator import itemgetter
from struct import Struct
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import orjson
from graphql import GraphQLObjectType, GraphQLSchema, OperationDefinitionNode
from graphql.execution.collect_fields import FragmentDetails, collect_fields, collect_subfields
from graphql.execution.values import VariableValues

from graph.context import Info
from graph.event_executor import plain_field
from graph.types.stream import MessageDelta
from services.message_stream import DeltaFollower
from streams.buffer import Delta

_SHORT_HEAD = Struct(">BBH").pack
_LONG_HEAD = Struct(">BBQ").pack
_TEXT = 0x81
"""The first byte of a frame of text that is whole."""
# A plan remembers the last frame while it is no longer than that: what it holds on to after a stream is bounded.
_REMEMBERED_CHARS = 4_096
_SHORT_CHARS = 40
_ATTRIBUTES = Delta._fields
_PLACES = {"cursor": '"%s"', "part_index": "%d", "kind": '"%s"', "text": "%s"}

Fields: TypeAlias = tuple[tuple[str, str], ...]
"""Response keys and attributes of a delta; `__class__` for the name of its type."""


class DeltaPlan:
    """How deltas are written for one selection.

    Args:
        root_key: the response key of `messageStream`.
        fields: what was selected below it, in its order.
    """

    __slots__ = ("__weakref__", "_body", "_delta", "_frame", "_start", "_take", "_template")

    def __init__(self, root_key: str, fields: Fields) -> None:
        pieces, taken = [], []
        for key, attribute in fields:
            if attribute == "__class__":
                value = f'"{MessageDelta.__name__}"'
            else:
                value = _PLACES[attribute]
                taken.append(_ATTRIBUTES.index(attribute))
            pieces.append(f'"{key}":{value}')
        self._template = f',"type":"next","payload":{{"data":{{"{root_key}":{{{",".join(pieces)}}}}}}}}}'
        self._take = _taker(taken)
        self._delta: Delta | None = None
        self._start = self._body = self._frame = b""

    def frame(self, delta: Delta, start: bytes) -> bytes:
        """The frame of a delta: of the last one it is known already.

        Args:
            start: the begin of the message, up to the operation's id.
        """
        if delta is self._delta:
            if start == self._start:
                return self._frame
            body = self._body
        else:
            cursor, part_index, kind, text = delta
            # Cursors and kinds have nothing to be escaped. A token is quoted in a third of the time that orjson takes,
            # which writes the same.
            text = quoted(text) if len(text) < _SHORT_CHARS else orjson.dumps(text).decode()
            body = (self._template % self._take((cursor, part_index, kind, text))).encode()
        size = len(start) + len(body)
        if size < 126:
            frame = bytes((_TEXT, size)) + start + body
        elif size < 65_536:
            frame = _SHORT_HEAD(_TEXT, 126, size) + start + body
        else:
            frame = _LONG_HEAD(_TEXT, 127, size) + start + body
        if size <= _REMEMBERED_CHARS:
            self._delta, self._body, self._start, self._frame = delta, body, start, frame
        return frame


def _taker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if places == list(range(len(_ATTRIBUTES))):
        return tuple
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


DeltaPlace: TypeAlias = tuple[str, Fields]
"""What readers who share a plan have asked for: the response key of `messageStream`, and what is below it."""

# Readers who asked the same share their plan, in whatever words they asked.
_plans: WeakValueDictionary[DeltaPlace, DeltaPlan] = WeakValueDictionary()


def delta_follower(info: Info) -> DeltaFollower | None:
    """Who tells the deltas of this subscription; None where its socket has nobody, or graphql-core must write them."""
    begin = info.context.tell_deltas
    if begin is None:
        return None
    plan = delta_plan(info)
    return None if plan is None else begin(plan)


def delta_plan(info: Info) -> DeltaPlan | None:
    """The plan for the deltas of a subscription to `messageStream`, or None where there can be none."""
    place: DeltaPlace | None
    try:
        # Where the subscription is planned (`graph.subscription_plan`), it is known.
        place = info.deltas  # type: ignore[attr-defined]
    except AttributeError:
        raw = info._raw_info  # noqa: SLF001 - there is no public way to the selection as graphql-core has it
        fragments = {name: FragmentDetails(node) for name, node in raw.fragments.items()}
        # Strawberry gives resolvers the values alone; where they came from decides nothing here.
        values = VariableValues({}, info.variable_values)
        place = delta_place(raw.schema, fragments, values, raw.operation, raw.parent_type)
    if place is None:
        return None
    if (plan := _plans.get(place)) is None:
        plan = _plans[place] = DeltaPlan(*place)
    return plan


def delta_place(
    schema: GraphQLSchema,
    fragments: dict[str, FragmentDetails],
    values: VariableValues,
    operation: OperationDefinitionNode,
    root: GraphQLObjectType,
) -> DeltaPlace | None:
    """What a subscription asks of deltas; None where that is more than plain fields."""
    event_type = schema.get_type(MessageDelta.__name__)
    if not isinstance(event_type, GraphQLObjectType):
        return None
    roots = collect_fields(schema, fragments, values, root, operation)
    ((root_key, root_nodes),) = roots.grouped_field_set.items()
    selected = collect_subfields(schema, fragments, values, operation, event_type, root_nodes)
    fields = []
    for key, nodes in selected.grouped_field_set.items():
        plain = plain_field(event_type, key, nodes[0].node.name.value)
        if plain is None or plain[1] not in (*_ATTRIBUTES, "__class__"):
            return None
        fields.append(plain[:2])
    return root_key, tuple(fields)
