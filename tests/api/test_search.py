"""Search, as a viewer uses it: what is found, what is not, in which order, and what is marked in it."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ids import IdKind, parse_id
from server.runtime import Server
from services import search as search_service
from services.errors import BadUserInputError
from services.search_query import MAX_SNIPPET_PARTS, Term, one_slip_away, parse_query, slips, snippet, words_of
from tests.client import Client, GraphQLErrors
from tests.scripts import SCRIPTS, TextDelta

SEARCH = """
query($query: String!, $first: Int, $after: Cursor, $filter: SearchFilter) {
  search(query: $query, first: $first, after: $after, filter: $filter) {
    edges { cursor node { thread { id title } message { id text role } snippet { text matched } } }
    pageInfo { hasNextPage hasPreviousPage endCursor }
  }
}
"""


async def results(client: Client, query: str, **variables: Any) -> list[dict[str, Any]]:
    """The first page."""
    data = await client.run(SEARCH, {"query": query} | variables)
    return [edge["node"] for edge in data["search"]["edges"]]


async def texts(client: Client, query: str, **filters: Any) -> set[str]:
    """What was found: the texts of messages, and titles in brackets."""
    found = await results(client, query, first=100, filter=filters)
    return {hit["message"]["text"] if hit["message"] else f"[{hit['thread']['title']}]" for hit in found}


async def ask(client: Client, text: str, **more: Any) -> dict[str, Any]:
    """A turn that has ended, in a thread with a title of its own that no search of these tests finds."""
    turn = await client.send(text, **more)
    await client.finish(turn["assistantMessage"]["id"])
    if "threadId" not in more:
        await rename(client, turn["thread"]["id"], "Untitled")
    return turn


async def rename(client: Client, thread_id: str, title: str) -> None:
    await client.run(
        "mutation($input: RenameThreadInput!) { renameThread(input: $input) { thread { id } } }",
        {"input": {"threadId": thread_id, "title": title}},
    )


def marked(hit: dict[str, Any]) -> list[str]:
    return [part["text"] for part in hit["snippet"] if part["matched"]]


async def refused(client: Client, query: str, **variables: Any) -> dict[str, Any]:
    with pytest.raises(GraphQLErrors) as error:
        await client.run(SEARCH, {"query": query} | variables)
    return error.value.extensions


async def test_words_prefixes_phrases_and_exclusions(client: Client) -> None:
    owl = "Owls hunt at night; barn owls, too."
    night = "At night all cats are grey"
    code = "See services/threads.py and `find_many`: don't guess"
    for text in (owl, night, code):
        await ask(client, text)
    assert await texts(client, "night") == {owl, night}
    assert await texts(client, "NIGHT hunt") == {owl}
    assert await texts(client, "nig cats") == {night}, "three letters begin a word"
    assert await texts(client, "ni cats") == set(), "two do not,"
    assert await texts(client, "cats ni") == {night}, "unless they are being typed"
    assert await texts(client, '"at night"') == {owl, night}
    assert await texts(client, '"barn owls"') == {owl}
    assert await texts(client, '"owls barn"') == set()
    assert await texts(client, '"barn ow') == {owl}, "a phrase that is being typed"
    assert await texts(client, "“barn owls”") == {owl}, "as telephones quote"
    assert await texts(client, "night -cats") == {owl}
    assert await texts(client, 'night -"barn owls"') == {night}
    assert await texts(client, "night -cat") == {owl, night}, "an excluded word is a whole one"
    assert await texts(client, "threads.py") == {code}
    assert await texts(client, "find_many") == {code}
    assert await texts(client, "many") == {code}
    assert await texts(client, "don't") == {code}
    assert await texts(client, "hello -world") == set(), "the answers of the model are all Hello world"
    assert await texts(client, "hello") == {"Hello world"}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("Kubernets", "kubernetes"),
        ("recieve", "receive"),
        ("tset", "test"),
        ("Muller", "Müller"),
        ("photosythesys", "photosynthesis"),
        ("приветт", "привет"),
    ],
)
async def test_a_misspelt_word_finds_what_was_meant(client: Client, wrong: str, right: str) -> None:
    text = f"About {right}: it is here"
    await ask(client, text)
    (hit,) = await results(client, f"{wrong} here")
    assert hit["message"]["text"] == text
    assert marked(hit) == [right, "here"]


async def test_a_word_that_is_there_is_not_taken_as_misspelt(client: Client) -> None:
    await ask(client, "a horse of course")
    await ask(client, "a house of cards")
    assert await texts(client, "house ") == {"a house of cards"}
    assert await texts(client, "house course") == set()
    assert await texts(client, "hxuse") == {"a house of cards"}
    assert await texts(client, "xyzzyxyzzy") == set()
    assert await texts(client, '"hxuse of"') == await texts(client, '"hxuse"') == set(), "what is in quotes is exact"
    assert await texts(client, "hxuse xyzzyxyzzy") == set(), "all words must match"
    assert await texts(client, "hxuse of carsd hxuse") == {"a house of cards"}


@pytest.mark.parametrize(
    ("text", "query", "mark"),
    [
        ("私は東京都に住んでいます", "東京", ["東京"]),
        ("请问如何学习编程?", "学习", ["学习"]),
        ("안녕하세요 세계", "안녕", ["안녕하세요"]),
        ("Ich ÄRGERE mich über Öl", "ärgere öl", ["ÄRGERE", "Öl"]),
        ("Cafe\u0301 au lait", "café", ["Café"]),
        ("ship it 🚀 now", "🚀", ["🚀"]),
        ("family 👨‍👩‍👧 photo", "👨‍👩‍👧", ["👨‍👩‍👧"]),
        ("שלום עולם", "שלום", ["שלום"]),
        ("مرحبا بالعالم", "مرحبا", ["مرحبا"]),
        ("ΟΔΥΣΣΕΥΣ and more", "οδυσσευσ", ["ΟΔΥΣΣΕΥΣ"]),
        ("สวัสดีครับ", "สวัสดี", ["สวัสดี"]),
        ("the “quoted”—word", "quoted", ["quoted"]),
        ("an ofﬁce of ＡＢＣ", "office abc", ["office", "ABC"]),
    ],
)
async def test_every_script_is_found_and_marked(client: Client, text: str, query: str, mark: list[str]) -> None:
    await ask(client, text)
    (hit,) = await results(client, query)
    assert hit["message"]["text"] == text
    assert marked(hit) == mark


@pytest.mark.parametrize(
    "query",
    ["100%", "a_b", "fo:*", "foo & bar", "foo | bar", "!foo", "(foo", "foo <-> bar", "'foo", "foo'", "\\foo", "'; --",
     "foo:A", "# foo", "$1 foo", '"foo', '"" foo', "-", "foo -", "--foo", "%foo%", "foo\n\tbar", "*", "{foo}"],
)  # fmt: skip
async def test_whatever_is_typed_is_data(client: Client, query: str) -> None:
    await ask(client, "nothing of this kind")
    status, body = await client.post(SEARCH, {"query": query})
    assert status == 200
    if "errors" in body:
        extensions = body["errors"][0]["extensions"]
        assert (extensions["code"], extensions["field"]) == ("BAD_USER_INPUT", "query")
    else:
        assert body["data"]["search"]["edges"] == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("", "BAD_USER_INPUT"),
        ("  ", "BAD_USER_INPUT"),
        ("?!", "BAD_USER_INPUT"),
        ("-foo", "BAD_USER_INPUT"),
        ("nul \0", "BAD_USER_INPUT"),
        (" ".join(map(str, range(17))), "BAD_USER_INPUT"),
        ("x" * 201, "PAYLOAD_TOO_LARGE"),
    ],
)
async def test_what_cannot_be_looked_for_is_refused(client: Client, query: str, code: str) -> None:
    extensions = await refused(client, query)
    assert (extensions["code"], extensions["field"]) == (code, "query")


async def test_titles_are_found_and_stand_above_messages(client: Client) -> None:
    first = await ask(client, "zebra zebra zebra zebra")
    second = await ask(client, "anything")
    await rename(client, second["thread"]["id"], "A zebra crossing")
    title, message = await results(client, "zebra")
    assert (title["message"], title["thread"]["id"], marked(title)) == (None, second["thread"]["id"], ["zebra"])
    assert message["message"]["id"] == first["userMessage"]["id"]
    await rename(client, second["thread"]["id"], "A pedestrian one")
    assert await texts(client, "zebra") == {"zebra zebra zebra zebra"}, "renamed: found no more by the old title,"
    assert await texts(client, "pedestrian") == {"[A pedestrian one]"}, "and at once by the new one"
    await client.run(
        f'mutation {{ deleteThread(input: {{threadId: "{first["thread"]["id"]}"}}) {{ deletedThreadId }} }}'
    )
    assert await texts(client, "zebra") == set()


async def test_an_answer_is_found_once_it_has_ended(client: Client) -> None:
    question = f"driven {uuid.uuid4()}"
    turn = await client.send(question, model="driven")
    queue = SCRIPTS.driven.queue(question)
    await queue.put(TextDelta("A quagga "))
    async with client.reading(turn["assistantMessage"]["id"]) as reader:
        assert await reader.next()
        assert await texts(client, "quagga") == set()
        await queue.put(TextDelta("is extinct."))
        await queue.put(None)
        async for _ in reader.events():
            pass
    assert await texts(client, "quagga") == {"A quagga is extinct."}


@pytest.mark.parametrize("end", ["complete", "failed", "stopped"])
async def test_a_question_and_the_title_of_its_thread_are_found_when_its_answer_has_ended(
    server: Server, client: Client, end: str
) -> None:
    question = f"a {end} tapir {uuid.uuid4()}"
    first = await client.send(question, model="driven")
    thread_id, live = first["thread"]["id"], first["assistantMessage"]["id"]
    count = "SELECT count(*) FROM search_documents WHERE thread_id = $1"
    connection = await asyncpg.connect(server.database.url)
    try:
        # Whoever asked waits for what is written then, and a long text is a long work.
        assert await connection.fetchval(count, parse_id(IdKind.THREAD, thread_id)) == 0
    finally:
        await connection.close()
    queue = SCRIPTS.driven.queue(question)
    if end == "stopped":
        await client.stop(live)
    else:
        await queue.put(TextDelta("A word."))
        await queue.put(None if end == "complete" else RuntimeError("of a model"))
    await client.finish(live)
    assert await texts(client, f"{end} tapir") == {question, f"[{first['thread']['title']}]"}
    sent = await client.send(f"{end} bongo", threadId=thread_id)
    await client.finish(sent["assistantMessage"]["id"])
    assert f"{end} bongo" in await texts(client, f"{end} bongo", anyBranch=True)
    edited = await client.edit(first["userMessage"]["id"], f"{end} bongo again")
    await client.finish(edited["assistantMessage"]["id"])
    assert f"{end} bongo again" in await texts(client, f"{end} bongo", anyBranch=True)


async def test_a_title_that_is_given_while_the_answer_is_written_is_the_one_that_is_found(client: Client) -> None:
    question = f"a numbat {uuid.uuid4()}"
    turn = await client.send(question, model="driven")
    await rename(client, turn["thread"]["id"], "A bandicoot")
    assert await texts(client, "bandicoot") == {"[A bandicoot]"}
    await SCRIPTS.driven.queue(question).put(None)
    await client.finish(turn["assistantMessage"]["id"])
    assert await texts(client, "bandicoot") == {"[A bandicoot]"}
    assert await texts(client, "numbat") == {question}


async def test_filters_narrow_what_is_found(client: Client) -> None:
    project = (await client.run('mutation { createProject(input: {name: "P"}) { project { id } } }'))["createProject"]
    project_id = project["project"]["id"]
    inside = await ask(client, "llama inside", projectId=project_id)
    outside = await ask(client, "llama outside")
    await rename(client, outside["thread"]["id"], "llama title")
    everything = {"llama inside", "llama outside", "[llama title]"}
    assert await texts(client, "llama") == everything
    assert await texts(client, "llama", projectId=project_id) == {"llama inside"}
    assert await texts(client, "llama", role="USER") == {"llama inside", "llama outside"}
    assert await texts(client, "llama", role="ASSISTANT") == set()
    now = datetime.now(UTC)
    soon, ago = (now + timedelta(hours=1)).isoformat(), (now - timedelta(hours=1)).isoformat()
    assert await texts(client, "llama", since=ago, before=soon) == everything
    assert await texts(client, "llama", since=soon) == set()
    assert await texts(client, "llama", before=ago) == set()
    assert (
        await texts(client, "llama", since="0001-01-01T00:00:00+14:00", before="9999-12-31T23:59:59-14:00")
        == everything
    )
    thread_id = inside["thread"]["id"]
    archive = "mutation($id: ID!) { archiveThread(input: {threadId: $id, archived: true}) { thread { id } } }"
    await client.run(archive, {"id": thread_id})
    assert await texts(client, "llama") == everything - {"llama inside"}
    assert await texts(client, "llama", archived=True) == {"llama inside"}


async def test_only_the_active_path_is_searched_unless_asked(client: Client) -> None:
    turn = await ask(client, "the first kiwi")
    edited = await client.edit(turn["userMessage"]["id"], "the second kiwi")
    await client.finish(edited["assistantMessage"]["id"])
    assert await texts(client, "kiwi") == {"the second kiwi"}
    assert await texts(client, "kiwi", anyBranch=True) == {"the first kiwi", "the second kiwi"}
    await client.run("mutation($id: ID!) { selectMessage(input: {messageId: $id}) { message { id } } }",
                     {"id": turn["userMessage"]["id"]})  # fmt: skip
    assert await texts(client, "kiwi") == {"the first kiwi"}


async def test_nothing_temporary_is_found(server: Server, client: Client) -> None:
    turn = await client.send("a secret okapi", temporary=True)
    await client.finish(turn["assistantMessage"]["id"])
    thread_id = parse_id(IdKind.THREAD, turn["thread"]["id"])
    assert await texts(client, "okapi", anyBranch=True) == set()
    connection = await asyncpg.connect(server.database.url)
    try:
        count = "SELECT count(*) FROM search_documents WHERE thread_id = $1"
        assert await connection.fetchval(count, thread_id) == 0, "nothing of it is kept to be found"
        await connection.execute("UPDATE threads SET temporary = false, expires_at = NULL WHERE id = $1", thread_id)
        assert await texts(client, "okapi") == {"a secret okapi", f"[{turn['thread']['title']}]"}
        await connection.execute("UPDATE threads SET temporary = true WHERE id = $1", thread_id)
        assert await connection.fetchval(count, thread_id) == 0
        assert await texts(client, "okapi", anyBranch=True) == set()
    finally:
        await connection.close()


async def test_another_users_are_never_found(client: Client, other: Client) -> None:
    await ask(client, "my own axolotl")
    await ask(other, "their axolotl")
    assert await texts(client, "axolotl") == {"my own axolotl"}
    assert await texts(client, "their") == set()
    assert await texts(client, "axolotll") == {"my own axolotl"}
    project = (await other.run('mutation { createProject(input: {name: "P"}) { project { id } } }'))["createProject"]
    foreign = await refused(client, "axolotl", filter={"projectId": project["project"]["id"]})
    missing = await refused(client, "axolotl", filter={"projectId": f"project_{uuid.uuid4().hex}"})
    assert foreign == missing
    assert (missing["code"], missing["field"]) == ("NOT_FOUND", "projectId")


async def test_pages_joined_are_the_list_without_repeats(client: Client) -> None:
    turn = await ask(client, "puffin 0")
    for number in range(1, 12):
        await ask(client, "puffin " * (number % 4 + 1) + str(number), threadId=turn["thread"]["id"])
    await rename(client, turn["thread"]["id"], "puffin")
    whole = [edge["node"] for edge in (await client.run(SEARCH, {"query": "puffin", "first": 100}))["search"]["edges"]]
    assert len(whole) == 13
    assert whole[0]["message"] is None
    for size in (1, 5, 13):
        joined: list[dict[str, Any]] = []
        page: dict[str, Any] = {"hasNextPage": True, "endCursor": None}
        while page["hasNextPage"]:
            before = page["endCursor"]
            found = (await client.run(SEARCH, {"query": "puffin", "first": size, "after": before}))["search"]
            page = found["pageInfo"]
            assert page["hasPreviousPage"] == (before is not None)
            joined += [edge["node"] for edge in found["edges"]]
        assert joined == whole
    last = (await client.run(SEARCH, {"query": "pufin", "first": 5}))["search"]
    rest = (await client.run(SEARCH, {"query": "pufin", "first": 100, "after": last["pageInfo"]["endCursor"]}))[
        "search"
    ]
    assert [edge["node"] for edge in last["edges"] + rest["edges"]] == whole, "a misspelt search goes on as it began"
    cursor = last["pageInfo"]["endCursor"]
    for query, filters in (("puffin", {}), ("pufin", {"anyBranch": True})):
        extensions = await refused(client, query, after=cursor, filter=filters)
        assert (extensions["code"], extensions["field"]) == ("CURSOR_INVALID", "after")


async def test_of_many_matches_the_newest_are_ranked(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await ask(client, "dodo")
    newer = "dodo with many other words beside it"
    await ask(client, newer, threadId=old["thread"]["id"])
    assert [hit["message"]["text"] for hit in await results(client, "dodo")] == ["dodo", newer]
    most = search_service._FIND.replace(str(search_service.RANKED_MATCHES), "1")
    monkeypatch.setattr(search_service, "_FIND", most)
    assert [hit["message"]["text"] for hit in await results(client, "dodo")] == [newer]


async def test_documents_of_every_time_are_found(server: Server, client: Client) -> None:
    """Messages of many years lie in many slices of the index."""
    turn = await ask(client, "a phoenix")
    thread_id = parse_id(IdKind.THREAD, turn["thread"]["id"])
    connection = await asyncpg.connect(server.database.url)
    try:
        for depth, year in enumerate((1971, 1999, 2025, 2250), 10):
            milliseconds = int(datetime(year, 1, 1, tzinfo=UTC).timestamp() * 1000)
            key = uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | 0b10 << 62 | uuid.uuid4().int & (1 << 62) - 1)
            await connection.execute(
                """
                INSERT INTO messages (id, owner_id, thread_id, depth, active, role, status, parts)
                SELECT $1, owner_id, id, $3, true, 'USER', 'COMPLETE', $4::jsonb FROM threads WHERE id = $2
                """,
                key, thread_id, depth, f'[{{"type": "text", "text": "a phoenix of {year}"}}]',
            )  # fmt: skip
        assert len(await texts(client, "phoenix")) == 5
        assert await texts(client, "phoenix 1999") == {"a phoenix of 1999"}
        assert len(await texts(client, "phoenixx")) == 5
    finally:
        await connection.close()


async def test_a_snippet_shows_the_first_match_in_its_surroundings(client: Client) -> None:
    text = "alpha " * 100 + "the  needle\n\nin the haystack " + "omega " * 100
    await ask(client, text)
    (hit,) = await results(client, "needle hayst")
    shown = "".join(part["text"] for part in hit["snippet"])
    assert marked(hit) == ["needle", "haystack"]
    assert "the needle in the haystack" in shown
    assert shown.startswith("…alpha")
    assert shown.endswith("…")
    assert len(shown) < 300


@pytest.mark.parametrize(
    "text",
    ["word " * 30_000, "字" * 150_000, "x" * 200_000, " ".join(f"w{n}" for n in range(20_000)), "ﷺ" * 30_000],
    ids=["words", "characters", "one", "different", "growing"],
)
async def test_no_text_is_too_much_to_be_stored(server: Server, client: Client, text: str) -> None:
    turn = await ask(client, "a placeholder")
    key = parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"])
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute(
            "UPDATE messages SET parts = jsonb_build_array(jsonb_build_object('type', 'text', 'text', $2::text)) "
            "WHERE id = $1",
            key, text,
        )  # fmt: skip
        assert await connection.fetchval("SELECT length(document) FROM search_documents WHERE id = $1", key) > 0
    finally:
        await connection.close()
    assert len(await results(client, text[:3])) == 1


async def test_a_text_that_no_document_can_be_made_of_is_stored_all_the_same(server: Server, client: Client) -> None:
    connection = await asyncpg.connect(server.database.url)
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute("ALTER FUNCTION search_words(text) RENAME TO search_words_lost")
        owner, thread = uuid.uuid4(), uuid.uuid4()
        await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", owner)
        await connection.execute(
            "INSERT INTO threads (id, owner_id, title, title_source) VALUES ($1, $2, 'x', 'TEXT')", thread, owner
        )
        assert await connection.fetchval("SELECT count(*) FROM threads WHERE id = $1", thread) == 1
        assert await connection.fetchval("SELECT count(*) FROM search_documents WHERE id = $1", thread) == 0
    finally:
        await transaction.rollback()
        await connection.close()


async def test_searches_at_once_do_not_disturb_one_another(client: Client) -> None:
    await ask(client, "a lone numbat")
    found = await asyncio.gather(*(texts(client, query) for query in ("numbat", "numbbat", "lone", "wolf") * 3))
    assert found == [{"a lone numbat"}, {"a lone numbat"}, {"a lone numbat"}, set()] * 3


WORDS = st.lists(st.text("abcäöü東京🚀-., \n", min_size=1, max_size=6), max_size=60).map(" ".join)


@given(WORDS, st.text("abcäöü東京", min_size=1, max_size=4))
def test_a_snippet_is_a_stretch_of_the_text(text: str, word: str) -> None:
    terms = [Term(tuple(words_of(word)), prefix=True)]
    parts = snippet(text, terms, {})
    shown = "".join(part.text for part in parts).removeprefix("…").removesuffix("…")
    assert shown.strip() in " ".join(text.split())
    assert len(parts) <= MAX_SNIPPET_PARTS + 1
    assert all(part.text for part in parts)


@given(st.text("abcdefgh", min_size=4, max_size=8), st.data())
def test_what_is_one_slip_away_is_guessed(word: str, data: st.DataObject) -> None:
    guesses = one_slip_away(word)
    assert word not in guesses
    guess = data.draw(st.sampled_from(guesses))
    assert slips(word, guess) == slips(guess, word) == 1


@given(st.text(max_size=200))
def test_a_query_holds_only_words_whatever_is_typed(query: str) -> None:
    try:
        terms = parse_query(query)
    except BadUserInputError:
        return
    for term in terms:
        for word in term.words:
            assert words_of(word) == [word] or len(word) == 64
            assert not set(word) & set("'\\:*&|!()<>#\" ")
