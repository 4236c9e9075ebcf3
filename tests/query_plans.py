"""How PostgreSQL runs a statement, for tests of what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan as `EXPLAIN (FORMAT JSON)` tells them, from the top."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes_of(below)


def rows_read(node: dict[str, Any]) -> int:
    """How many rows a node of `EXPLAIN (ANALYZE, FORMAT JSON)` has read from its table or index."""
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    rows: float = (node["Actual Rows"] + removed) * node["Actual Loops"]
    return round(rows)
