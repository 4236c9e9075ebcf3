"""CHECKLIST R12: whatever a mutation changes, the viewer's feed tells of it. Made from the rows of test_ownership."""

from __future__ import annotations

import uuid

import pytest

from tests.api.test_changes import Copy, create_project, following, next_change, now
from tests.api.test_ownership import ROWS, client, filled, owned, session
from tests.api.test_ownership import run as run_row
from tests.client import Client

__all__ = ["client", "owned", "session"]  # fixtures of test_ownership


@pytest.mark.parametrize("name", sorted(name for name in ROWS if name.startswith("mutation.")))
async def test_every_mutation_is_told_of_as_it_is_stored(client: Client, owned: dict[str, str], name: str) -> None:
    cursor = await now(client)
    copy = await Copy.of(client)
    await run_row(client, name, filled(name, owned))
    if name == "mutation.deleteAccount":
        # The token of an issuer is still good: whoever has it begins anew, with nothing.
        assert (await Copy.of(client)).threads == {}
        return
    turns = await client.run("{ threads(first: 100) { nodes { liveMessage { id } } } }")
    for thread in turns["threads"]["nodes"]:
        if thread["liveMessage"]:
            await client.finish(thread["liveMessage"]["id"])
    marker = str(uuid.uuid4())
    await create_project(client, marker)
    async with following(client, cursor) as feed:
        while True:
            event = await next_change(feed)
            if event["__typename"] == "ChangesReset":
                copy = await Copy.of(client)
            copy.apply(event)
            if event["__typename"] == "ProjectChanged" and event["project"]["name"] == marker:
                break
    there_is = await Copy.of(client)
    assert (copy.threads, copy.projects, copy.settings) == (there_is.threads, there_is.projects, there_is.settings)
    assert copy.shares == there_is.shares
    assert copy.leaves == there_is.leaves
    assert {key: copy.messages.get(key) for key in there_is.messages} == there_is.messages
