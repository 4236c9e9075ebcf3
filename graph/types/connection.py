"""The page information of connections (GraphQL Cursor Connections specification)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import strawberry

from graph.scalars import Cursor
from services.paging import Page

Record = TypeVar("Record")

First = Annotated[
    int | None, strawberry.argument(description="Page size forwards, 1 to 100; 25 where nothing is given.")
]
After = Annotated[Cursor | None, strawberry.argument(description="Begin behind this cursor.")]
Last = Annotated[
    int | None, strawberry.argument(description="Page size backwards, 1 to 100; not together with `first`.")
]
Before = Annotated[Cursor | None, strawberry.argument(description="End before this cursor.")]


@strawberry.type(description="Where a page lies in its connection.")
class PageInfo:
    """The specification's PageInfo."""

    has_next_page: bool = strawberry.field(description="Whether there is more behind `endCursor`.")
    has_previous_page: bool = strawberry.field(description="Whether there is more before `startCursor`.")
    start_cursor: Cursor | None = strawberry.field(description="The cursor of the first edge.")
    end_cursor: Cursor | None = strawberry.field(description="The cursor of the last edge.")


def page_info(page: Page[Record], place: Callable[[Record], str]) -> PageInfo:
    """The information of a page of rows whose cursors `place` makes."""
    records = page.records
    return PageInfo(
        has_next_page=page.has_next,
        has_previous_page=page.has_previous,
        start_cursor=Cursor(place(records[0])) if records else None,
        end_cursor=Cursor(place(records[-1])) if records else None,
    )
