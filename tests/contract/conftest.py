"""Fixtures of the adapters' contracts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from providers.http import make_client_session
from tests.adapters import KEY, VENDOR_TEXT


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with make_client_session() as session:
        yield session


@pytest.fixture
def no_canary_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        written = logging.Formatter().format(record) + repr(record.__dict__)
        assert KEY not in written
        assert VENDOR_TEXT not in written
