"""What every object with an id shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import strawberry

from graph.batching import Wanted
from models.ids import IdKind, outside_id
from models.records import RowRecord

View = TypeVar("View")

Needs = Mapping[str, tuple[str, ...] | Callable[[Wanted], Wanted]]
"""What fields of a type look at in the rows it shows, by the fields' Python names.

The names of fields of the record, or what finds them from what is looked at below the field. A field that is not named
looks at all.
"""


def selected_below(wanted: Wanted) -> Wanted:
    """The need of a field that hands the same records on."""
    return wanted


@strawberry.interface(description="An object with an id of its own, found again by `node`.")
class Node:
    """The Node interface of the GraphQL Global Object Identification specification."""

    id: strawberry.ID = strawberry.field(description="Opaque and unique among all objects.")


class RecordView:
    """A type of the schema whose plain fields are those of a row, read when they are asked for and not before.

    An answer has hundreds of objects and selects a few fields of each: to copy each row into an object of all its
    fields took longer than to write the answer (docs/decisions/0023-planned-execution.md).
    """

    kind: ClassVar[IdKind]
    columns: ClassVar[type[RowRecord] | None] = None
    """What its records are, where all of them are rows of known columns."""
    needs: ClassVar[Needs] = {}
    written: ClassVar[Mapping[str, str]] = {}
    """Fields that are written just as another field of the record is: an enum's, which has its names."""
    made_of: ClassVar[Mapping[str, tuple[str, str, Callable[[Any], Any]]]] = {}
    """Fields that are one of the record's where that was read, else made of another one, and how."""
    record: strawberry.Private[Any]

    @classmethod
    def of(cls, record: Any) -> Self:
        """From its row."""
        view = cls.__new__(cls)
        view.record = record
        return view

    @classmethod
    def of_each(cls, records: Sequence[Any]) -> Views[Self]:
        """From the rows of a page."""
        return Views(cls.of, records)

    def __getattr__(self, name: str) -> Any:
        """Whatever is not here is in the row, but for the id, which looks different outside."""
        if name == "record":
            raise AttributeError(name)
        if name == "id":
            return outside_id(self.kind, self.record.id)
        return getattr(self.record, name)


class Views(Sequence[View], Generic[View]):
    """The views of a page's rows, each made when it is looked at: a plan that needs none writes from the rows."""

    __slots__ = ("_view", "records")

    def __init__(self, view: Callable[[Any], View], records: Sequence[Any]) -> None:
        self._view = view
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[View]:
        return map(self._view, self.records)

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> Views[View]: ...
    def __getitem__(self, index: int | slice) -> View | Views[View]:
        if isinstance(index, slice):
            return Views(self._view, self.records[index])
        return self._view(self.records[index])
