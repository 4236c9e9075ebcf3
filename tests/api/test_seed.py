"""What `threadgraph seed` makes is what the API itself could have made: it can be read, taken out and in again."""

from __future__ import annotations

from datetime import UTC, datetime

from server.runtime import Server
from services.seed import SeedPlan, seed
from services.viewer import Sessions
from tests.accounts import comparable, download, upload
from tests.client import Client

READ = """
{
  projects(first: 10) { nodes { name color description prompt threadCount threads(first: 3) { nodes { id } } } }
  threads(first: 30) {
    nodes { id title project { color } usage { totalTokens } messages(first: 20) {
      nodes { role status text error { code message } model { id } usage { totalTokens costMicros } }
    } }
  }
  usage(timeframe: MONTH) { totals { requests } byModel { id } }
  search(query: "stream") { nodes { snippet { text } } }
}
"""


async def test_all_that_is_seeded_can_be_read_and_exported_and_imported(
    server: Server, client: Client, other: Client
) -> None:
    plan = SeedPlan(users=1, threads=30, messages=900, seed=1, now=datetime.now(UTC))
    user_id = await seed(server.database, plan)
    sessions = Sessions(server.database, secret="s" * 32, ttl_seconds=600, allowed=True)
    client.token = sessions.session_of(user_id).token
    read = await client.run(READ)
    assert any(project["color"] for project in read["projects"]["nodes"])
    messages = [message for thread in read["threads"]["nodes"] for message in thread["messages"]["nodes"]]
    assert {message["status"] for message in messages} >= {"COMPLETE", "STOPPED", "FAILED", "INTERRUPTED"}
    for message in messages:
        assert (message["error"] is not None) == (message["status"] in ("FAILED", "INTERRUPTED"))
    exported = await download(client)
    status, body = await upload(other, exported)
    assert status == 200, body
    assert comparable(await download(other)) == comparable(exported)
