"""The root field that searches."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import key_of
from graph.types.connection import After, First
from graph.types.search import SearchFilter, SearchResultConnection
from models.ids import IdKind
from models.records import MessageRole
from services import search
from services.input import checked_time
from services.paging import SearchPosition, page_request

Query = Annotated[
    str,
    strawberry.argument(
        description="Words, of which each must match: one of three letters or more, and the last one, also as the "
        'beginning of a word. "Words in quotes" match as a phrase; a -word excludes. At most 200 characters and 16 '
        "words or phrases."
    ),
]
Filter = Annotated[
    SearchFilter | None,
    strawberry.argument(description="Where to search; null: in threads that are not archived, on their active paths."),
]


@strawberry.type
class SearchQuery:
    """Queries."""

    @strawberry.field(
        description="The viewer's messages and titles that match, the best first. A word that nothing matches finds "
        "words that are spelt alike. Of more than 1,000 matches the newest 1,000 are ranked. An answer is found once "
        "it has ended, and its question, with the title of a new thread, by then at the latest. Nothing temporary is "
        "found, and nothing behind the first 100,000 characters of a message."
    )
    async def search(
        self,
        info: Info,
        query: Query,
        first: First = None,
        after: After = None,
        filter: Filter = None,  # noqa: A002 - the argument's name in the API
    ) -> SearchResultConnection:
        viewer = info.context.viewer
        request = page_request(SearchPosition.parse, first, after, None, None)
        wanted = search.EVERYWHERE if filter is None else _wanted(filter)
        return SearchResultConnection(page=await info.context.services.search.page(viewer, query, request, wanted))


def _wanted(given: SearchFilter) -> search.SearchFilter:
    return search.SearchFilter(
        project_id=None if given.project_id is None else key_of(IdKind.PROJECT, given.project_id, field="projectId"),
        role=None if given.role is None else MessageRole[given.role.name],
        since=None if given.since is None else checked_time(given.since),
        before=None if given.before is None else checked_time(given.before),
        archived=given.archived,
        any_branch=given.any_branch,
    )
