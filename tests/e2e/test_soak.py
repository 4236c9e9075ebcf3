"""The short form of `python -m tests.soak`: seconds of churn, after which nothing is left."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import make_database
from tests.soak import soak


async def test_nothing_grows_under_churn_and_nothing_is_left_of_it(postgres_url: str, tmp_path: Path) -> None:
    report = await soak(await make_database(postgres_url), tmp_path, seconds=5, every=0.3)
    assert report.problems == []
    assert report.done["answers"] > 30
    assert len(report.samples) > 8
