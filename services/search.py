"""Search in the titles and messages of a viewer.

The documents are kept by the database (models/migrations/0004_search.py); what a query means is in
`services/search_query.py`; why it is done so, and how long it takes, in docs/decisions/0011-search.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from uuid import UUID

from models.database import Database
from models.records import MESSAGE_COLUMNS, THREAD_COLUMNS, MessageRecord, MessageRole, ThreadRecord
from services.errors import CursorInvalidError, NotFoundError
from services.paging import LAST_ID, Page, PageRequest, SearchPosition
from services.search_query import (
    SnippetPart,
    Term,
    document_query,
    lexeme,
    one_slip_away,
    parse_query,
    slips,
    snippet,
)
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection, Record

RANKED_MATCHES = 1_000
_CORRECTIONS = 5
_CORRECTED_WORDS = 3
_READ_DOCUMENTS = 500

_MESSAGE_NAMES = MESSAGE_COLUMNS.split(", ")
_THREAD_NAMES = THREAD_COLUMNS.split(", ")
_M_COLUMNS = ", ".join(f"m.{name} AS m_{name}" for name in _MESSAGE_NAMES)
_T_COLUMNS = ", ".join(f"t.{name} AS t_{name}" for name in _THREAD_NAMES)

# A document has a word for its slice of time, and titles have one too. By a function, so that the planner does not know
# the query when it plans, and what it would (wrongly) conclude of it.
_IN_SLICE = "($2::text::tsquery && quote_literal(right($1::uuid::text, 6) || '#' || next.slice)::tsquery)"
_TITLES = "(SELECT slice FROM unnest(ARRAY['titl']) AS slice)"
_NEXT = """
SELECT left(id::text, 4) AS slice FROM search_documents WHERE owner_id = $1 AND id < s.below ORDER BY id DESC LIMIT 1
"""
# The newest matches of one slice that pass the filters, one after the other until there are enough. OFFSET 0 keeps the
# planner from reading threads and messages of all that match, and from doing anything twice. IS NOT DISTINCT FROM
# cannot use an index, and must not: the planner knows nothing of one user's words, and would at times rather read all
# documents of the user.
_MATCHES = """
ARRAY(
    SELECT d.id FROM (
        SELECT id, thread_id, message_id FROM search_documents
        WHERE document @@ {query} AND owner_id IS NOT DISTINCT FROM $1 ORDER BY id DESC OFFSET 0
    ) d
    CROSS JOIN LATERAL (
        SELECT created_at FROM threads WHERE threads.id = d.thread_id AND owner_id = $1 AND NOT temporary
            AND ($3::boolean IS NULL OR archived = $3) AND ($4::uuid IS NULL OR project_id = $4) OFFSET 0
    ) t
    LEFT JOIN LATERAL (
        SELECT active, role, created_at FROM messages WHERE messages.id = d.message_id OFFSET 0
    ) m ON true
    WHERE ($5::text IS NULL OR m.role = $5) AND ($6 OR m.active IS NOT FALSE)
        AND ($7::timestamptz IS NULL OR coalesce(m.created_at, t.created_at) >= $7)
        AND ($8::timestamptz IS NULL OR coalesce(m.created_at, t.created_at) < $8)
    ORDER BY d.id DESC LIMIT {most}
)
"""


def _slices(most: int) -> str:
    """A recursive query `slices`: first the titles, then slice by slice of the messages, the newest first.

    It ends where `most` matches are found. Slices in which the user has no document are leapt over.
    """
    first = _MATCHES.format(query=_IN_SLICE, most=most)
    more = _MATCHES.format(query=_IN_SLICE, most=f"{most} - s.total")
    return f"""
    WITH RECURSIVE slices (slice, below, found, total) AS (
        SELECT next.slice, '{LAST_ID}'::uuid, here.found, cardinality(here.found)
        FROM {_TITLES} next CROSS JOIN LATERAL (SELECT {first} AS found OFFSET 0) here
        UNION ALL
        SELECT next.slice, (next.slice || '0000-0000-0000-0000-000000000000')::uuid, here.found,
            s.total + cardinality(here.found)
        FROM slices s CROSS JOIN LATERAL ({_NEXT}) next CROSS JOIN LATERAL (SELECT {more} AS found OFFSET 0) here
        WHERE s.total < {most}
    )
    """  # noqa: S608 - only numbers of ours are put in


# The ranks of what was found: a title's above any message's (ts_rank is at most 1), short texts above long ones (1).
_FIND = f"""
{_slices(RANKED_MATCHES)}, ranked AS MATERIALIZED (
    SELECT f.id, d.thread_id, d.message_id, d.rank FROM slices s CROSS JOIN LATERAL unnest(s.found) AS f (id)
    CROSS JOIN LATERAL (
        SELECT thread_id, message_id,
            (ts_rank(document, $2::text::tsquery, 1) + (message_id IS NULL)::int)::real AS rank
        FROM search_documents WHERE search_documents.id = f.id OFFSET 0
    ) d
), page AS MATERIALIZED (
    SELECT * FROM ranked WHERE (rank, id) < ($9::real, $10::uuid) ORDER BY rank DESC, id DESC LIMIT $11
)
SELECT page.id AS hit_id, page.rank, page.message_id, t.*, m.*
FROM page CROSS JOIN LATERAL (SELECT {_T_COLUMNS} FROM threads t WHERE t.id = page.thread_id OFFSET 0) t
LEFT JOIN LATERAL (SELECT {_M_COLUMNS} FROM messages m WHERE m.id = page.message_id OFFSET 0) m ON true
ORDER BY page.rank DESC, page.id DESC
"""  # noqa: S608 - only names and numbers of ours are put in
_IS_KNOWN = f"{_slices(1)} SELECT EXISTS (SELECT FROM slices WHERE total > 0)"  # noqa: S608
# Of guesses, those that some document has, the most frequent first. Each is looked for by itself: of a query of 500
# words the planner would think that it needs the whole table. And counted: to find any one, it would read along the
# table, where a user's documents are not.
_KNOWN = f"""
SELECT word FROM unnest($2::text[], $3::text[]) AS guess (word, lexeme) CROSS JOIN LATERAL (
    SELECT count(*) AS documents FROM (
        SELECT FROM search_documents WHERE document @@ lexeme::tsquery AND owner_id IS NOT DISTINCT FROM $1
        OFFSET 0
    ) d
) known WHERE documents > 0 ORDER BY documents DESC, word LIMIT {_CORRECTIONS}
"""  # noqa: S608
_RECENT_WORDS = f"""
WITH recent AS MATERIALIZED (
    SELECT document FROM search_documents WHERE owner_id = $1 ORDER BY id DESC LIMIT {_READ_DOCUMENTS}
)
SELECT substr(lexeme, 7) AS word, count(*) AS documents
FROM recent CROSS JOIN LATERAL unnest(tsvector_to_array(document)) AS lexeme
WHERE length(lexeme) BETWEEN 6 + $2 AND 6 + $3 GROUP BY 1
"""  # noqa: S608
_PROJECT = "SELECT id FROM projects WHERE id = $1 AND owner_id = $2"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFilter:
    """Where to search; archived threads only where they are asked for, and then only they.

    A title is of the time at which its thread was begun, and of no role.
    """

    project_id: UUID | None = None
    role: MessageRole | None = None
    archived: bool = False
    since: datetime | None = None
    before: datetime | None = None
    any_branch: bool = False


EVERYWHERE = SearchFilter()


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A message that matches, or a thread whose title does (then there is no message)."""

    thread: ThreadRecord
    message: MessageRecord | None
    snippet: list[SnippetPart]
    position: SearchPosition


class Search:
    """Searches of viewers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, viewer: Viewer, query: str, request: PageRequest[SearchPosition], wanted: SearchFilter = EVERYWHERE
    ) -> Page[SearchHit]:
        """One page of what matches, the best first: titles before messages, then by rank, then the newest.

        Raises:
            BadUserInputError: nothing can be looked for by this query.
            NotFoundError: no such project of the viewer's.
            CursorInvalidError: the cursor is of another search.
        """
        terms = parse_query(query)
        search = _digest(query, wanted)
        if request.after is not None and request.after.search != search:
            raise CursorInvalidError("This is a cursor of another search.", field="after")
        after = request.after or SearchPosition(search, float("inf"), LAST_ID)
        corrections: dict[Term, list[str]] = {}
        async with self._database.acquire() as connection:
            if wanted.project_id is not None and not await connection.fetchval(_PROJECT, wanted.project_id, viewer.id):
                raise NotFoundError("project", field="projectId")

            where = (wanted.archived, wanted.project_id, wanted.role, wanted.any_branch, wanted.since, wanted.before)

            async def found() -> list[Record]:
                pattern = document_query(viewer.id, terms, corrections)
                rows: list[Record] = await connection.fetch(
                    _FIND, viewer.id, pattern, *where, after.rank, after.id, request.limit + 1
                )
                return rows

            rows = await found()
            if not rows:
                corrections = await _corrections(connection, viewer, terms, any_branch=wanted.any_branch)
                rows = await found() if corrections else []
        return Page.of(request, [_hit(row, search, terms, corrections) for row in rows])


async def _corrections(
    connection: Connection, viewer: Viewer, terms: list[Term], *, any_branch: bool
) -> dict[Term, list[str]]:
    """For each word that nothing of the viewer's has, wherever: words that it may have been meant to be.

    Empty where one has none, or where there are more than three: then it is not a matter of spelling.
    """
    found: dict[Term, list[str]] = {}
    anywhere = (None, None, None, any_branch, None, None)
    for term in terms:
        if not term.may_be_misspelt:
            continue
        if await connection.fetchval(_IS_KNOWN, viewer.id, document_query(viewer.id, [term], {}), *anywhere):
            continue
        guesses = one_slip_away(term.words[0])
        rows = await connection.fetch(_KNOWN, viewer.id, guesses, [lexeme(viewer.id, guess) for guess in guesses])
        words = [row["word"] for row in rows]
        if not words and term.allowed_slips > 1:
            words = await _alike(connection, viewer, term)
        if not words or len(found) == _CORRECTED_WORDS:
            # All words must match: nothing will.
            return {}
        found[term] = words
    return found


async def _alike(connection: Connection, viewer: Viewer, term: Term) -> list[str]:
    """Words of the newest documents. Too many are two slips away to guess them: those that are there are compared."""
    word, allowed = term.words[0], term.allowed_slips
    rows = await connection.fetch(_RECENT_WORDS, viewer.id, len(word) - allowed, len(word) + allowed)
    letters = set(word)
    # A slip changes at most two letters of the set: this leaves few words to compare.
    near = [row for row in rows if len(letters.symmetric_difference(row["word"])) <= 2 * allowed]
    near = [row for row in near if slips(word, row["word"]) <= allowed]
    near.sort(key=lambda row: (-row["documents"], row["word"]))
    return [row["word"] for row in near[:_CORRECTIONS]]


def _hit(row: Record, search: bytes, terms: list[Term], corrections: dict[Term, list[str]]) -> SearchHit:
    thread = ThreadRecord.from_row(_named(row, "t_", _THREAD_NAMES))
    message = None
    if row["message_id"] is not None:
        message = MessageRecord.from_row(_named(row, "m_", _MESSAGE_NAMES))
    text = thread.title if message is None else message.text
    position = SearchPosition(search, row["rank"], row["hit_id"])
    return SearchHit(thread, message, snippet(text, terms, corrections), position)


def _named(row: Record, prefix: str, names: list[str]) -> dict[str, Any]:
    return {name: row[prefix + name] for name in names}


def _digest(query: str, wanted: SearchFilter) -> bytes:
    """What a cursor is bound to."""
    return sha256(repr((query, wanted)).encode()).digest()[:4]
