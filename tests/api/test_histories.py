"""Random histories: several devices of one user do everything at once; then the database is whole.

The seed is in the test's name; a failure is run again by it.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from typing import Any

import asyncpg
import pytest

from models.ids import IdKind, parse_id
from server.runtime import Server
from tests.client import Client, GraphQLErrors, text_of

MODELS = [
    *("two-words", "scripted-echo", "fails-midway", "hangs-up", "slow", "hangs", "says-nothing", "thinks-and-calls"),
    *("draws", "thinks-signed"),
]
# What a device may be told while others act; anything else is a defect.
EXPECTED = {"THREAD_BUSY", "NOT_FOUND", "BAD_USER_INPUT"}


class Devices:
    """Several devices of one user on a few threads."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.chance = random.Random(seed)
        self.threads: list[str] = []
        self.questions: list[str] = []
        self.answers: list[str] = []
        self.readings: list[asyncio.Task[None]] = []
        self.unexpected: list[GraphQLErrors] = []

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            try:
                await self.step()
            except GraphQLErrors as refused:
                if refused.code not in EXPECTED:
                    self.unexpected.append(refused)

    async def step(self) -> None:
        client, chance = self.client, self.chance
        model = chance.choice(MODELS)
        text = f"{chance.random()} 🦉"
        match chance.randrange(9):
            case 0 | 1 | 2 if len(self.threads) < 4:
                self.note(await client.send(text, model=model))
            case 0 | 1 | 2:
                self.note(await client.send(text, model=model, threadId=chance.choice(self.threads)))
            case 3 if self.questions:
                self.note(await client.edit(chance.choice(self.questions), text, model=model))
            case 4 if self.answers:
                self.note(await client.retry(chance.choice(self.answers), model=model))
            case 5 | 6 if self.answers:
                await client.stop(chance.choice(self.answers[-4:]))
            case 7 if self.questions:
                query = "mutation($id: ID!) { selectMessage(input: {messageId: $id}) { message { id } } }"
                await client.run(query, {"id": chance.choice(self.questions + self.answers)})
            case 8 if self.threads and chance.random() < 0.2:
                query = "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }"
                await client.run(query, {"id": chance.choice(self.threads)})

    def note(self, turn: dict[str, Any]) -> None:
        if turn["thread"]["id"] not in self.threads:
            self.threads.append(turn["thread"]["id"])
        self.questions.append(turn["userMessage"]["id"])
        self.answers.append(turn["assistantMessage"]["id"])
        if self.chance.random() < 0.5:
            self.readings.append(asyncio.create_task(self.read(turn["assistantMessage"]["id"])))

    async def read(self, message_id: str) -> None:
        """What a reader saw is what is stored, unless the thread was deleted under it."""
        try:
            events = await self.client.read(message_id)
        except GraphQLErrors as gone:
            if gone.code != "NOT_FOUND":
                raise
            return
        assert [event["__typename"] for event in events].count("MessageEnded") == 1
        assert text_of(events) == events[-1]["message"]["text"]


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_devices_do_at_once_the_tree_and_the_counts_are_whole(
    client: Client, server: Server, seed: int
) -> None:
    devices = Devices(client, seed)
    await devices.run(6)
    await asyncio.gather(*(devices.run(25) for _ in range(6)))
    assert devices.unexpected == []
    for thread in devices.threads:
        live = await client.run("query($id: ID!) { thread(id: $id) { liveMessage { id } } }", {"id": thread})
        if live["thread"] and live["thread"]["liveMessage"]:
            await client.stop(live["thread"]["liveMessage"]["id"])
    await asyncio.wait_for(asyncio.gather(*devices.readings), 60)
    assert await wrongs(server, client) == {}
    key = str(uuid.uuid4())
    for thread in devices.threads:
        try:
            turn = await client.send("Still alive?", threadId=thread, idempotencyKey=key + thread)
        except GraphQLErrors as refused:
            if refused.code != "NOT_FOUND":
                raise
        else:
            await client.finish(turn["assistantMessage"]["id"])
    assert await wrongs(server, client) == {}


WRONGS = {
    "left live": "SELECT id FROM messages WHERE owner_id = $1 AND status = 'STREAMING'",
    "stream left": "SELECT message_id FROM streams WHERE owner_id = $1",
    "active child of an inactive parent": """
        SELECT c.id FROM messages c LEFT JOIN messages p ON p.id = c.parent_id
        WHERE c.owner_id = $1 AND c.active AND c.parent_id IS NOT NULL AND NOT p.active""",
    "gap in the active path": """
        SELECT thread_id FROM messages WHERE owner_id = $1 AND active
        GROUP BY thread_id HAVING count(*) <> max(depth) + 1""",
    "thread without a path": """
        SELECT id FROM threads t WHERE owner_id = $1
        AND NOT EXISTS (SELECT FROM messages WHERE thread_id = t.id AND active)""",
    "depth that is not its parent's and one": """
        SELECT c.id FROM messages c LEFT JOIN messages p ON p.id = c.parent_id
        WHERE c.owner_id = $1 AND c.depth <> coalesce(p.depth + 1, 0)""",
    "parent of another thread": """
        SELECT c.id FROM messages c JOIN messages p ON p.id = c.parent_id
        WHERE c.owner_id = $1 AND p.thread_id <> c.thread_id""",
    "active leaf in the middle of a branch": """
        SELECT m.id FROM messages m WHERE m.owner_id = $1 AND m.active
        AND NOT EXISTS (SELECT FROM messages c WHERE c.parent_id = m.id AND c.active)
        AND m.active_child_id IS NOT NULL""",
    "remembered child that is none": """
        SELECT m.id FROM messages m WHERE m.owner_id = $1 AND m.active_child_id IS NOT NULL
        AND NOT EXISTS (SELECT FROM messages c WHERE c.id = m.active_child_id AND c.parent_id = m.id)""",
    # One that was stopped before the model was asked has consumed nothing.
    "answer without its one usage event": """
        SELECT m.id FROM messages m WHERE m.owner_id = $1 AND m.role = 'ASSISTANT' AND m.status <> 'STREAMING'
        AND NOT (m.status = 'STOPPED' AND m.prompt_tokens = 0 AND m.completion_tokens = 0)
        AND (SELECT count(*) FROM usage_events u WHERE u.message_id = m.id AND u.kind = 'ANSWER') <> 1""",
    "turn that names half": """
        SELECT id FROM turns WHERE owner_id = $1
        AND num_nonnulls(thread_id, user_message_id, assistant_message_id) NOT IN (0, 3)""",
}


async def wrongs(server: Server, client: Client) -> dict[str, list[Any]]:
    """Rows of this user that break a rule, by rule."""
    connection = await asyncpg.connect(server.database.url)
    try:
        owner = parse_id(IdKind.USER, client.id)
        found = {rule: await connection.fetch(query, owner) for rule, query in WRONGS.items()}
    finally:
        await connection.close()
    return {rule: [tuple(row) for row in rows] for rule, rows in found.items() if rows}
