"""Fields whose values are found for many objects at once: one query for a page, not one for every row of it.

Such a field is one function of all the objects that ask for it. The planned executor calls it with a whole list; where
graphql-core executes, which asks object by object, a data loader brings the calls of one turn of the loop together.
Loaders batch and do not cache: they live as long as their operation, and a subscription may last for hours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple, TypeVar

import strawberry
from strawberry.dataloader import DataLoader

from graph.context import Context, Info

Key = TypeVar("Key", bound=Hashable)

Wanted = frozenset[str] | None
"""The fields of records that will be looked at; None: any. A function of many objects that takes it as `wanted`, by
keyword, is told by the planned executor, and a resolver by `wanted_below`: they need not read the others."""

BATCH = "batch"
"""Where a field's metadata hold its function of many objects."""
JOINED = "joined"
"""Where they hold its `Joined`, or None."""
AHEAD = "ahead"
"""Where they hold whether it may be read with the list of its objects."""


class Joined(NamedTuple):
    """The columns of what a field shows may have been read with the row of its object, behind that one's columns.

    Attributes:
        view: the type that shows them; its key is null where there is none.
        at: the place of the first of them.
    """

    view: type[Any]
    at: int


class Below(NamedTuple):
    """A field of the objects of a list, which the list's resolver may read with them.

    Attributes:
        arguments: gives its arguments, by their Python names; what it raises is no matter of the list's.
        wanted: the fields of records that will be looked at below it.
    """

    arguments: Callable[[], dict[str, Any]]
    wanted: Wanted


def batched_field(
    load: Callable[..., Awaitable[Sequence[Any]]],
    *,
    description: str,
    joined: Joined | None = None,
    ahead: bool = False,
) -> Any:
    """A field that is resolved for many objects at once.

    Args:
        load: an async function of the objects, the context and the field's arguments, annotated to return a list: one
            value for each object in their order, or an exception where one object has none. Its annotations are
            strings, as `from __future__ import annotations` makes them.
        description: the field's.
        joined: where the planned executor looks before it calls `load`.
        ahead: whether resolvers of lists of these objects are told of it (`field_below`).
    """
    form = signature(load)
    arguments = [one for one in form.parameters.values() if one.kind is Parameter.POSITIONAL_OR_KEYWORD][2:]
    returned: str = form.return_annotation
    if not returned.startswith("list["):
        raise TypeError(f"{load.__qualname__} must return a list")

    async def resolve(self: Any, info: Info, **given: Any) -> Any:
        return await _loader(info.context, load, given).load(self)

    resolve.__module__ = load.__module__
    resolve.__doc__ = load.__doc__
    resolve.__annotations__ = {}
    resolve.__signature__ = form.replace(  # type: ignore[attr-defined]
        parameters=[
            Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
            Parameter("info", Parameter.POSITIONAL_OR_KEYWORD, annotation=Info),
            *arguments,
        ],
        return_annotation=returned.removeprefix("list[").removesuffix("]"),
    )
    metadata = {BATCH: load, JOINED: joined, AHEAD: ahead}
    return strawberry.field(resolver=resolve, description=description, metadata=metadata)


def wanted_below(info: Info) -> Wanted:
    """The fields of records that will be looked at below the field that is resolved."""
    wanted: Wanted = getattr(info, "wanted", None)
    return wanted


def field_below(info: Info) -> Below | None:
    """What is asked of the objects of the list that is resolved, where that may be read with them."""
    below: Below | None = getattr(info, "below", None)
    return below


def unique(keys: Sequence[Key]) -> list[Key]:
    """Each key once, in the order of their first appearance."""
    return list(dict.fromkeys(keys))


def _loader(
    context: Context, load: Callable[..., Awaitable[Sequence[Any]]], given: dict[str, Any]
) -> DataLoader[Any, Any]:
    place = (load, tuple(given.items()))
    loader: DataLoader[Any, Any] | None = context.loaders.get(place)
    if loader is None:

        async def load_many(objects: list[Any]) -> Sequence[Any]:
            return await load(objects, context, **given)

        loader = context.loaders[place] = DataLoader(load_many, cache=False)
    return loader
