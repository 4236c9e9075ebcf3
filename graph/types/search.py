"""What a search finds."""

from __future__ import annotations

from datetime import datetime

import strawberry

from graph.scalars import Cursor
from graph.types.connection import PageInfo, page_info
from graph.types.message import Message, MessageRole
from graph.types.thread import Thread
from services.paging import Page
from services.search import SearchHit


@strawberry.input(description="Where to search. A title is of the time at which its thread was begun, and of no role.")
class SearchFilter:
    """Argument of `search`."""

    project_id: strawberry.ID | None = strawberry.field(default=None, description="Only in threads of this project.")
    role: MessageRole | None = strawberry.field(default=None, description="Only messages of this role, and no titles.")
    since: datetime | None = strawberry.field(default=None, description="Only what was begun at this time or later.")
    before: datetime | None = strawberry.field(default=None, description="Only what was begun before this time.")
    archived: bool = strawberry.field(default=False, description="True for archived threads only, false for others.")
    any_branch: bool = strawberry.field(
        default=False, description="Whether messages off the active path are found as well."
    )


@strawberry.type(description="A stretch of a snippet. Plain text: nothing in it is markup.")
class SnippetPart:
    """A stretch."""

    text: str = strawberry.field(description="As it stands in the title or message, with white space folded.")
    matched: bool = strawberry.field(description="Whether it is what was looked for.")


@strawberry.type(description="A message that matches, or a thread whose title does.")
class SearchResult:
    """A hit."""

    thread: Thread = strawberry.field(description="The thread.")
    message: Message | None = strawberry.field(description="The message; null where the title matches.")
    snippet: list[SnippetPart] = strawberry.field(
        description="About 200 characters of the title or message around the first match, in order; an ellipsis where "
        "it is cut. At most 21 parts."
    )

    @classmethod
    def of(cls, hit: SearchHit) -> SearchResult:
        """From what the service found."""
        return cls(
            thread=Thread.of(hit.thread),
            message=None if hit.message is None else Message.of(hit.message, hit.thread),
            snippet=[SnippetPart(text=part.text, matched=part.matched) for part in hit.snippet],
        )


@strawberry.type(description="A hit in its place.")
class SearchResultEdge:
    """An edge."""

    cursor: Cursor = strawberry.field(description="This place, in this search only.")
    node: SearchResult = strawberry.field(description="The hit.")


@strawberry.type(description="A page of hits: titles before messages, then by rank, then the newest first.")
class SearchResultConnection:
    """A connection of hits."""

    page: strawberry.Private[Page[SearchHit]]

    @strawberry.field(description="The hits with their places.")
    def edges(self) -> list[SearchResultEdge]:
        return [
            SearchResultEdge(cursor=Cursor(_place(record)), node=SearchResult.of(record))
            for record in self.page.records
        ]

    @strawberry.field(description="Where this page lies.")
    def page_info(self) -> PageInfo:
        return page_info(self.page, _place)

    @strawberry.field(description="The hits without their places.")
    def nodes(self) -> list[SearchResult]:
        return [SearchResult.of(record) for record in self.page.records]


def _place(record: SearchHit) -> str:
    return record.position.cursor()
