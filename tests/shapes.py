"""Whether JSON is of the shape that an official client's types describe: no unknown field, none missing, none wrong.

The types of those clients are `TypedDict`s. A library that checks data against types lets unknown fields pass, which
here are what matters most: a name that the vendor does not know is ignored by the vendor, or refused.
"""

from __future__ import annotations

import collections.abc
import types
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict


def misfits(value: Any, shape: Any, place: str = "") -> list[str]:
    """Where the value is not of the shape; empty where it is. Of a union, the misfits of the nearest member."""
    origin, arguments = get_origin(shape), get_args(shape)
    if shape is Any or shape is object:
        return []
    if origin in (Required, NotRequired, Annotated):
        return misfits(value, arguments[0], place)
    if origin in (Union, types.UnionType):
        found = [misfits(value, member, place) for member in arguments]
        return min(found, key=lambda of_one: (len(of_one), -max(map(len, of_one), default=0)))
    if origin is Literal:
        return [] if value in arguments else [f"{place}: {value!r} is none of {arguments}"]
    if is_typeddict(shape):
        return _misfits_of_object(value, shape, place)
    if origin in (list, collections.abc.Iterable, collections.abc.Sequence):
        if not isinstance(value, list):
            return [f"{place}: no list"]
        return [wrong for n, item in enumerate(value) for wrong in misfits(item, arguments[0], f"{place}[{n}]")]
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            return [f"{place}: no object"]
        return [wrong for name, item in value.items() for wrong in misfits(item, arguments[1], f"{place}.{name}")]
    if shape is None or shape is type(None):
        return [] if value is None else [f"{place}: not null"]
    if shape in (float, int):
        fits = isinstance(value, int | float if shape is float else int) and not isinstance(value, bool)
        return [] if fits else [f"{place}: no number"]
    if shape in (str, bool):
        return [] if isinstance(value, shape) else [f"{place}: no {shape.__name__}"]
    # Files that are not JSON, such as open ones.
    return [f"{place}: {shape} is no shape of JSON"]


def _misfits_of_object(value: Any, shape: Any, place: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{place}: no object"]
    hints = get_type_hints(shape, include_extras=True)
    required = {
        name for name, hint in hints.items() if get_origin(hint) is Required or name in shape.__required_keys__
    } - {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
    wrong = [f"{place}.{name}: missing" for name in required - value.keys()]
    for name, item in value.items():
        wrong += misfits(item, hints[name], f"{place}.{name}") if name in hints else [f"{place}.{name}: unknown"]
    return wrong
