"""Titles: from the question at once, by a model where one is set, and never at the cost of the turn."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ids import IdKind, parse_id
from providers.base import TokenUsage
from server.runtime import Server
from services.titles import _INSTRUCTION, MAX_TITLE_CHARS, title_from_text
from tests.client import DEADLINE_SECONDS, Client, connect
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, TextDelta

# Every kind of space and line end that Python knows, among words.
spaced = st.text(st.characters() | st.sampled_from(" \t\n\r\x0b\x0c\x1c\x1d\x1e\x85\xa0\u2028\u2029\u3000"))
long_lines = st.lists(st.text("abc", min_size=1, max_size=90), min_size=1, max_size=30).map(" ".join)


@given(spaced.filter(str.strip) | long_lines)
def test_a_title_from_a_text_is_one_short_line_with_something_in_it(text: str) -> None:
    title = title_from_text(text)
    assert 1 <= len(title) <= MAX_TITLE_CHARS
    assert len(title.splitlines()) == 1
    assert title == title.strip()
    assert "  " not in title


@given(spaced.filter(str.strip) | long_lines)
def test_a_title_is_the_beginning_of_the_first_line_that_has_something_in_it(text: str) -> None:
    first = " ".join(next(line for line in text.splitlines() if line.strip()).split())
    title = title_from_text(text)
    if len(first) <= MAX_TITLE_CHARS:
        assert title == first
    else:
        assert title.endswith("…")
        assert first.startswith(title[:-1])


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("What is love?", "What is love?"),
        ("\n \n  Second\tline \n third", "Second line"),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 79 + "…"),
        ("words " * 40, "words " * 12 + "words…"),
        ("short " + "x" * 100, "short " + "x" * 73 + "…"),  # a cut at the word would leave almost nothing
        ("🦉" * 81, "🦉" * 79 + "…"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_a_long_line_is_cut_at_a_word_where_that_keeps_half_of_it(text: str, title: str) -> None:
    assert title_from_text(text) == title


def test_a_word_that_just_fits_is_kept() -> None:
    assert title_from_text("word " * 15 + "four more") == "word " * 15 + "four…"


@asynccontextmanager
async def titling(postgres_url: str, folder: Path, model: str) -> AsyncIterator[Server]:
    """A server of its own whose new threads are titled by this model."""
    settings = test_settings(await make_database(postgres_url), folder, title_model=model)
    server = Server(settings, providers=SCRIPTS.models())
    await server.start()
    try:
        yield server
    finally:
        await server.drain()
        await server.close()


@pytest.fixture(scope="module")
async def made(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server whose titles are made by a model that says one with quotes and a second line."""
    async with titling(postgres_url, tmp_path_factory.mktemp("data"), "title-maker") as server:
        yield server


@pytest.fixture(scope="module")
async def driven(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server whose titles are said by the tests."""
    async with titling(postgres_url, tmp_path_factory.mktemp("data"), "driven") as server:
        yield server


@pytest.fixture
async def client(made: Server) -> AsyncIterator[Client]:
    """A new user of the server whose titles are made."""
    async with connect(made.address) as client:
        await client.sign_in()
        yield client


@pytest.fixture
async def author(driven: Server) -> AsyncIterator[Client]:
    """A new user of the server whose titles the tests say."""
    async with connect(driven.address) as client:
        await client.sign_in()
        yield client


async def title_of(client: Client, thread_id: str) -> str:
    """The title of a thread now."""
    query = "query($id: ID!) { thread(id: $id) { title } }"
    return str((await client.run(query, {"id": thread_id}))["thread"]["title"])


async def title_other_than(client: Client, thread_id: str, before: str) -> str:
    """The title of a thread once it is another one."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (title := await title_of(client, thread_id)) == before:
            await asyncio.sleep(0.01)
    return title


async def title_usage(
    server: Server, turn: dict[str, dict[str, str]], *, wait: bool = True
) -> list[tuple[object, ...]]:
    """The usage events of a turn's title: its cost is written after it, so it is there and done with them."""
    key = parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"])
    query = """
    SELECT model, status, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, estimated
    FROM usage_events WHERE message_id = $1 AND kind = 'TITLE'
    """
    connection = await asyncpg.connect(server.database.url)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (rows := await connection.fetch(query, key)) and wait:
                await asyncio.sleep(0.01)
    finally:
        await connection.close()
    return [tuple(row) for row in rows]


def titles_being_made() -> set[asyncio.Task[object]]:
    """The tasks of this process that make titles now."""
    return {task for task in asyncio.all_tasks() if task.get_name() == "title"}


async def no_title_is_being_made() -> None:
    """Return when no title is being made any more, long before the deadline of one that hangs."""
    async with asyncio.timeout(DEADLINE_SECONDS / 3):
        while titles_being_made():
            await asyncio.sleep(0.01)


def say(question: str, *events: object) -> str:
    """Have the model of titles say this to the question, and end; what it is asked with."""
    prompt = _INSTRUCTION + question
    for event in (*events, None):
        SCRIPTS.driven.queue(prompt).put_nowait(event)  # type: ignore[arg-type]
    return prompt


async def rename(client: Client, thread_id: str, title: str) -> None:
    """Give a thread a title of its user's own."""
    query = "mutation($input: RenameThreadInput!) { renameThread(input: $input) { thread { title } } }"
    await client.run(query, {"input": {"threadId": thread_id, "title": title}})


async def test_a_new_thread_has_a_title_from_its_question_and_then_one_by_the_model(
    client: Client, made: Server
) -> None:
    turn = await client.send("What is love?")
    assert turn["thread"]["title"] == "What is love?"
    title = await title_other_than(client, turn["thread"]["id"], "What is love?")
    assert title.startswith("A short title")
    assert await title_usage(made, turn) == [("title-maker", "COMPLETE", 11, 4, 0, 0, False)]
    assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"


async def test_quotes_around_the_title_are_not_part_of_it(client: Client) -> None:
    turn = await client.send("What is love?")
    assert await title_other_than(client, turn["thread"]["id"], "What is love?") == "A short title"


async def test_the_usage_of_a_title_stands_beside_that_of_the_answer(client: Client, made: Server) -> None:
    turn = await client.send("Count both")
    answer = await client.finish(turn["assistantMessage"]["id"])
    assert (answer["usage"]["promptTokens"], answer["usage"]["completionTokens"]) == (7, 2)
    assert len(await title_usage(made, turn)) == 1


async def test_twenty_equal_requests_at_once_pay_for_one_title(author: Client, driven: Server) -> None:
    question, key = f"At once {uuid.uuid4()}", str(uuid.uuid4())
    say(question, TextDelta("The first"))
    turns = await asyncio.gather(*(author.send(question, idempotencyKey=key) for _ in range(20)))
    await title_usage(driven, turns[0])
    # A second request to the model would wait for a second end, which nobody says.
    await no_title_is_being_made()
    assert await title_of(author, turns[0]["thread"]["id"]) == "The first"


async def test_the_model_is_told_the_question_and_no_more_of_it_than_a_title_needs(
    author: Client, driven: Server
) -> None:
    question = f"{uuid.uuid4()} " + "x" * 10_000
    prompt = say(question[:4_000], TextDelta("Xs"))
    turn = await author.send(question)
    await title_usage(driven, turn)
    request = SCRIPTS.driven.requests[prompt]
    assert [(message.role, message.text) for message in request.messages] == [("user", prompt)]


async def test_a_rename_before_the_model_answers_is_not_overwritten(author: Client, driven: Server) -> None:
    question = f"Mine {uuid.uuid4()}"
    turn = await author.send(question)
    await rename(author, turn["thread"]["id"], "My own title")
    say(question, TextDelta("The model's title"), TokenUsage(3, 5))
    assert await title_usage(driven, turn) == [("driven", "COMPLETE", 3, 5, 0, 0, False)]
    assert await title_of(author, turn["thread"]["id"]) == "My own title"


async def test_a_rename_to_the_very_same_words_is_the_users_title_too(author: Client, driven: Server) -> None:
    question = f"Mine {uuid.uuid4()}"
    turn = await author.send(question)
    await rename(author, turn["thread"]["id"], question)
    say(question, TextDelta("The model's title"))
    await title_usage(driven, turn)
    assert await title_of(author, turn["thread"]["id"]) == question


async def test_a_rename_after_the_model_answered_holds(author: Client) -> None:
    question = f"Later {uuid.uuid4()}"
    say(question, TextDelta("The model's title"))
    turn = await author.send(question)
    assert await title_other_than(author, turn["thread"]["id"], question) == "The model's title"
    await rename(author, turn["thread"]["id"], "My own title")
    assert await title_of(author, turn["thread"]["id"]) == "My own title"


async def test_a_new_title_does_not_move_the_thread_in_the_list(author: Client, driven: Server) -> None:
    question = f"Old {uuid.uuid4()}"
    turn = await author.send(question)
    await author.finish(turn["assistantMessage"]["id"])
    query = "query($id: ID!) { thread(id: $id) { updatedAt } }"
    before = await author.run(query, turn["thread"])
    say(question, TextDelta("New"))
    await title_usage(driven, turn)
    assert await title_of(author, turn["thread"]["id"]) == "New"
    assert await author.run(query, turn["thread"]) == before


@pytest.mark.parametrize(
    ("said", "title"),
    [
        (["\n\n  One ", " line \n", "another"], "One line"),
        (['"Quoted"'], "Quoted"),
        (['On the word "love"'], 'On the word "love"'),
        (["“One” and “two”"], "“One” and “two”"),
        (["a\x00b", "\ud83d"], "a\ufffdb\ufffd"),
        (["words "] * 1_000, "words " * 12 + "words…"),
        (["x" * 100_000], "x" * 79 + "…"),
    ],
    ids=[
        "lines",
        "quotes",
        "a quoted word at the end",
        "quoted words at both ends",
        "unstorable",
        "long",
        "one long word",
    ],
)
async def test_what_a_model_says_becomes_one_short_line(author: Client, said: list[str], title: str) -> None:
    question = f"Say {uuid.uuid4()}"
    say(question, *map(TextDelta, said), TokenUsage(1, 1))
    turn = await author.send(question)
    assert await title_other_than(author, turn["thread"]["id"], question) == title


@pytest.mark.parametrize("words", ["words ", " "], ids=["words", "blanks"])
async def test_a_model_that_never_ends_is_left_once_it_has_said_more_than_a_title(
    author: Client, driven: Server, words: str
) -> None:
    question = f"Endless {uuid.uuid4()}"
    prompt = _INSTRUCTION + question
    for _ in range(400):
        SCRIPTS.driven.queue(prompt).put_nowait(TextDelta(words))
    turn = await author.send(question)
    async with asyncio.timeout(DEADLINE_SECONDS / 3):
        await SCRIPTS.driven.closing(prompt).wait()
    # The vendor has not counted it.
    assert [row[-1] for row in await title_usage(driven, turn)] == [True]
    assert await title_of(author, turn["thread"]["id"]) == ("words " * 12 + "words…" if words.strip() else question)
    assert SCRIPTS.driven.queue(prompt).qsize() >= 400 - 320


async def test_half_a_character_without_reported_usage_costs_no_title(author: Client) -> None:
    question = f"Half {uuid.uuid4()}"
    say(question, TextDelta("a\ud83d"))
    turn = await author.send(question)
    await no_title_is_being_made()
    assert await title_of(author, turn["thread"]["id"]) == "a\ufffd"


@pytest.mark.parametrize("said", [[], [""], [" \n "], ["“”"], ['"', '"']], ids=repr)
async def test_a_model_that_says_nothing_leaves_the_title_and_is_paid(
    author: Client, driven: Server, said: list[str]
) -> None:
    question = f"Nothing {uuid.uuid4()}"
    say(question, *map(TextDelta, said), TokenUsage(9, 1))
    turn = await author.send(question)
    assert await title_usage(driven, turn) == [("driven", "COMPLETE", 9, 1, 0, 0, False)]
    assert await title_of(author, turn["thread"]["id"]) == question


async def test_usage_that_the_model_did_not_report_is_estimated(author: Client, driven: Server) -> None:
    question = f"Estimate {uuid.uuid4()}"
    prompt = say(question, TextDelta("Eight by"))
    turn = await author.send(question)
    assert [row[2:4] for row in await title_usage(driven, turn)] == [(-(-len(prompt) // 4), 2)]


async def test_estimated_usage_of_a_title_says_that_it_is_estimated(author: Client, driven: Server) -> None:
    question = f"Estimate {uuid.uuid4()}"
    say(question, TextDelta("A title"))
    turn = await author.send(question)
    assert [row[-1] for row in await title_usage(driven, turn)] == [True]


async def test_counts_that_cannot_be_stored_are_bounded_and_the_title_is_kept(author: Client, driven: Server) -> None:
    question = f"Count {uuid.uuid4()}"
    say(question, TextDelta("Counted"), TokenUsage(2**40, -1))
    turn = await author.send(question)
    assert [row[2:4] for row in await title_usage(driven, turn)] == [(2**31 - 1, 0)]
    assert await title_of(author, turn["thread"]["id"]) == "Counted"


async def test_only_the_first_question_of_a_thread_is_titled(author: Client, driven: Server) -> None:
    question = f"First {uuid.uuid4()}"
    say(question, TextDelta("Titled once"))
    turn = await author.send(question)
    await author.finish(turn["assistantMessage"]["id"])
    await title_usage(driven, turn)
    thread = turn["thread"]["id"]
    later = [await author.send(f"Second {question}", threadId=thread)]
    await author.finish(later[0]["assistantMessage"]["id"])
    later.append(await author.edit(turn["userMessage"]["id"], f"Edited {question}"))
    await author.finish(later[1]["assistantMessage"]["id"])
    later.append(await author.retry(later[1]["assistantMessage"]["id"]))
    await author.finish(later[2]["assistantMessage"]["id"])
    asked = [prompt for prompt in SCRIPTS.driven.requests if prompt.startswith(_INSTRUCTION) and question in prompt]
    assert asked == [_INSTRUCTION + question]
    assert await title_of(author, thread) == "Titled once"
    for each in later:
        assert await title_usage(driven, each, wait=False) == []


async def test_a_thread_that_was_deleted_meanwhile_costs_its_title_all_the_same(author: Client, driven: Server) -> None:
    question = f"Gone {uuid.uuid4()}"
    turn = await author.send(question)
    await author.finish(turn["assistantMessage"]["id"])
    await author.run("mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }", turn["thread"])
    say(question, TextDelta("Too late"), TokenUsage(2, 1))
    assert await title_usage(driven, turn) == [("driven", "COMPLETE", 2, 1, 0, 0, False)]


async def test_a_model_that_fails_leaves_the_title_from_the_text_and_the_answer_whole(
    postgres_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with titling(postgres_url, tmp_path, "title-breaker") as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("What is love?")
        answer = await client.finish(turn["assistantMessage"]["id"])
        await no_title_is_being_made()
        assert (answer["status"], answer["text"]) == ("COMPLETE", "Hello world")
        assert await title_of(client, turn["thread"]["id"]) == "What is love?"
        assert await title_usage(server, turn, wait=False) == []
    logged = [record.getMessage() for record in caplog.records if record.name == "services.titles"]
    assert logged == ["a title could not be made: RuntimeError"], "the operator is told, without the user's words"


async def test_a_title_that_hangs_neither_delays_the_answer_nor_the_end_of_the_server(
    postgres_url: str, tmp_path: Path
) -> None:
    async with titling(postgres_url, tmp_path, "hangs-at-once") as server, connect(server.address) as client:
        await client.sign_in()
        before = titles_being_made()
        turn = await client.send("What is love?")
        assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
        (hanging,) = titles_being_made() - before
        async with asyncio.timeout(DEADLINE_SECONDS / 2):
            await server.drain()
            await server.close()
        assert hanging.done()
