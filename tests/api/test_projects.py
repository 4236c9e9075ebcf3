"""Projects: made, changed, archived, deleted, and what they do to threads and turns."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import asyncpg
import pytest

from models.ids import IdKind, parse_id
from server.runtime import Server
from services import projects
from tests.client import Client, GraphQLErrors
from tests.scripts import SCRIPTS, TextDelta

# The count of a project's threads cannot be written.
_UNCOUNTED = """
CREATE FUNCTION uncounted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'counted';
END $$;
CREATE TRIGGER uncounted BEFORE UPDATE OF thread_count ON projects FOR EACH ROW EXECUTE FUNCTION uncounted();
"""

FIELDS = "id name description color icon prompt defaultModel { id } archived threadCount createdAt updatedAt"


async def create(client: Client, **given: Any) -> dict[str, Any]:
    query = f"mutation($input: CreateProjectInput!) {{ createProject(input: $input) {{ project {{ {FIELDS} }} }} }}"
    project: dict[str, Any] = (await client.run(query, {"input": {"name": "Project"} | given}))["createProject"][
        "project"
    ]
    return project


async def update(client: Client, project_id: str, **given: Any) -> dict[str, Any]:
    query = f"mutation($input: UpdateProjectInput!) {{ updateProject(input: $input) {{ project {{ {FIELDS} }} }} }}"
    data = await client.run(query, {"input": {"projectId": project_id} | given})
    project: dict[str, Any] = data["updateProject"]["project"]
    return project


async def delete(client: Client, project_id: str, *, threads: bool = False) -> None:
    query = "mutation($input: DeleteProjectInput!) { deleteProject(input: $input) { deletedProjectId } }"
    data = await client.run(query, {"input": {"projectId": project_id, "deleteThreads": threads}})
    assert data["deleteProject"]["deletedProjectId"] == project_id


async def move(client: Client, thread_id: str, project_id: str | None) -> str | None:
    """The project that the thread is in then."""
    query = "mutation($input: MoveThreadInput!) { moveThread(input: $input) { thread { project { id } } } }"
    data = await client.run(query, {"input": {"threadId": thread_id, "projectId": project_id}})
    project = data["moveThread"]["thread"]["project"]
    return project["id"] if project else None


async def count(client: Client, project_id: str) -> int:
    query = "query($id: ID!) { project(id: $id) { threadCount } }"
    return int((await client.run(query, {"id": project_id}))["project"]["threadCount"])


async def listed(client: Client, **filters: Any) -> list[str]:
    query = "query($filter: ThreadFilter) { threads(filter: $filter) { nodes { id } } }"
    data = await client.run(query, {"filter": filters or None})
    return [node["id"] for node in data["threads"]["nodes"]]


async def project_names(client: Client, **filters: Any) -> list[str]:
    query = "query($filter: ProjectFilter) { projects(filter: $filter) { nodes { name } } }"
    return [node["name"] for node in (await client.run(query, {"filter": filters or None}))["projects"]["nodes"]]


async def thread(client: Client, **more: Any) -> str:
    """A thread with one turn that has ended."""
    turn = await client.send("Hello", **more)
    await client.finish(turn["assistantMessage"]["id"])
    return str(turn["thread"]["id"])


async def archive_thread(client: Client, thread_id: str, *, archived: bool) -> None:
    query = "mutation($input: ArchiveThreadInput!) { archiveThread(input: $input) { thread { archived } } }"
    data = await client.run(query, {"input": {"threadId": thread_id, "archived": archived}})
    assert data["archiveThread"]["thread"]["archived"] == archived


async def test_a_project_keeps_what_it_was_made_with(client: Client) -> None:
    given = {
        "name": "  Thesis \n draft ",
        "description": "Über Eulen 🦉\nzweite Zeile",
        "color": "TEAL",
        "icon": "🦉",
        "prompt": "Answer in rhymes.",
        "defaultModelId": "two-words",
    }
    project = await create(client, **given)
    assert project["name"] == "Thesis draft"
    assert project["defaultModel"] == {"id": "two-words"}
    assert {key: project[key] for key in ("description", "color", "icon", "prompt")} == {
        key: given[key] for key in ("description", "color", "icon", "prompt")
    }
    assert (project["archived"], project["threadCount"]) == (False, 0)
    query = f"query($id: ID!) {{ node(id: $id) {{ ... on Project {{ {FIELDS} }} }} }}"
    assert (await client.run(query, {"id": project["id"]}))["node"] == project


async def test_an_update_changes_what_is_given_and_no_more(client: Client) -> None:
    project = await create(client, description="d", color="RED", prompt="p", defaultModelId="two-words")
    changed = await update(client, project["id"], name="New", color=None)
    assert changed["updatedAt"] > project["updatedAt"]
    assert changed == project | {"name": "New", "color": None, "updatedAt": changed["updatedAt"]}
    cleared = await update(client, project["id"], description=None, prompt=None, defaultModelId=None)
    assert (cleared["description"], cleared["prompt"], cleared["defaultModel"]) == (None, None, None)


async def test_two_devices_that_change_different_fields_lose_neither(client: Client) -> None:
    project = (await create(client))["id"]
    await asyncio.gather(*(update(client, project, **{key: key}) for key in ("name", "description", "icon", "prompt")))
    query = f"query($id: ID!) {{ project(id: $id) {{ {FIELDS} }} }}"
    found = (await client.run(query, {"id": project}))["project"]
    assert all(found[key] == key for key in ("name", "description", "icon", "prompt"))


BAD = [
    ({"name": ""}, "BAD_USER_INPUT", "name"),
    ({"name": " \n\t"}, "BAD_USER_INPUT", "name"),
    ({"name": "x" * 401}, "PAYLOAD_TOO_LARGE", "name"),
    ({"name": "a\x00b"}, "BAD_USER_INPUT", "name"),
    ({"description": "x" * 4_001}, "PAYLOAD_TOO_LARGE", "description"),
    ({"description": "\x00"}, "BAD_USER_INPUT", "description"),
    ({"icon": "x" * 65}, "PAYLOAD_TOO_LARGE", "icon"),
    ({"prompt": "é" * 16_385}, "PAYLOAD_TOO_LARGE", "prompt"),
    ({"prompt": ""}, "BAD_USER_INPUT", "prompt"),
    ({"color": "PLAID"}, "BAD_USER_INPUT", None),
    ({"owner": "x"}, "BAD_USER_INPUT", None),
    ({"defaultModelId": "no-such-model"}, "MODEL_UNAVAILABLE", "defaultModelId"),
]


@pytest.mark.parametrize(("given", "code", "field"), BAD)
async def test_bad_values_are_refused_by_name_and_change_nothing(
    client: Client, given: dict[str, Any], code: str, field: str | None
) -> None:
    project = await create(client, description="before")
    for attempt in (create(client, **given), update(client, project["id"], **given)):
        with pytest.raises(GraphQLErrors) as refused:
            await attempt
        assert refused.value.code == code
        assert refused.value.extensions.get("field") == field
    query = f"{{ projects {{ nodes {{ {FIELDS} }} }} }}"
    assert (await client.run(query))["projects"]["nodes"] == [project]


async def test_a_lone_surrogate_in_a_name_is_refused(client: Client) -> None:
    body = (
        b'{"query":"mutation($n: String!) { createProject(input: {name: $n}) { project { id } } }",'
        b'"variables":{"n":"\\ud83d"}}'
    )
    headers = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"}
    async with client.http.post(client.url, data=body, headers=headers) as response:
        answer = await response.json()
    assert answer["errors"][0]["extensions"]["code"] == "BAD_USER_INPUT"
    assert await project_names(client) == []


async def test_a_name_cannot_be_cleared(client: Client) -> None:
    project = await create(client)
    with pytest.raises(GraphQLErrors) as refused:
        await update(client, project["id"], name=None)
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "name")


async def test_the_list_is_newest_first_and_pages_both_ways(client: Client) -> None:
    names = [f"p{n}" for n in range(7)]
    for name in names:
        await create(client, name=name)
    query = """
    query($first: Int, $after: Cursor, $last: Int, $before: Cursor) {
      projects(first: $first, after: $after, last: $last, before: $before) {
        nodes { name } pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
      }
    }
    """
    seen, after = [], None
    while True:
        page = (await client.run(query, {"first": 3, "after": after}))["projects"]
        seen += [node["name"] for node in page["nodes"]]
        if not page["pageInfo"]["hasNextPage"]:
            break
        after = page["pageInfo"]["endCursor"]
    assert seen == names[::-1]
    back = (await client.run(query, {"last": 2}))["projects"]
    assert [node["name"] for node in back["nodes"]] == ["p1", "p0"]
    assert back["pageInfo"]["hasPreviousPage"]
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(query, {"after": "x"})
    assert refused.value.code == "CURSOR_INVALID"


async def test_filters_of_projects(client: Client) -> None:
    for name in ("Work 100%", "work_2", "Home"):
        await create(client, name=name)
    old = await create(client, name="Old work")
    archive = """
    mutation($id: ID!, $to: Boolean!) { archiveProject(input: {projectId: $id, archived: $to}) { project { id } } }
    """
    await client.run(archive, {"id": old["id"], "to": True})
    assert await project_names(client) == ["Home", "work_2", "Work 100%"]
    assert await project_names(client, archived=True) == ["Old work"]
    assert await project_names(client, name="WORK") == ["work_2", "Work 100%"]
    assert await project_names(client, name="%") == ["Work 100%"]
    assert await project_names(client, name="_") == ["work_2"]
    assert await project_names(client, name="work", archived=True) == ["Old work"]
    await client.run(archive, {"id": old["id"], "to": False})
    assert await project_names(client, name="old") == ["Old work"]
    for bad in ("", "\x00", "x" * 401):
        with pytest.raises(GraphQLErrors) as refused:
            await project_names(client, name=bad)
        assert refused.value.extensions["field"] == "name"


async def test_threads_are_moved_in_out_and_between_and_counted(client: Client) -> None:
    one, two = (await create(client))["id"], (await create(client))["id"]
    inside, outside = await thread(client, projectId=one), await thread(client)
    assert (await count(client, one), await count(client, two)) == (1, 0)
    assert await listed(client, projectId=one) == [inside]
    assert await listed(client, inProject=False) == [outside]
    assert await listed(client, inProject=True) == [inside]
    assert await listed(client, projectId=one, inProject=False) == []
    assert await move(client, outside, two) == two
    assert await move(client, inside, two) == two
    assert (await count(client, one), await count(client, two)) == (0, 2)
    await archive_thread(client, inside, archived=True)
    assert await count(client, two) == 1
    assert await listed(client, projectId=two) == [outside]
    assert await listed(client, projectId=two, archived=True) == [inside]
    await archive_thread(client, inside, archived=False)
    assert await move(client, inside, None) is None
    assert await count(client, two) == 1
    delete_thread = "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }"
    await client.run(delete_thread, {"id": outside})
    assert await count(client, two) == 0


async def test_a_thread_cannot_be_moved_into_anothers_project(client: Client, other: Client) -> None:
    theirs = (await create(other))["id"]
    mine = await thread(client)
    for attempt in (theirs, f"project_{uuid.uuid4().hex}"):
        with pytest.raises(GraphQLErrors) as refused:
            await move(client, mine, attempt)
        assert (refused.value.code, refused.value.extensions["field"]) == ("NOT_FOUND", "projectId")
        with pytest.raises(GraphQLErrors) as refused:
            await client.send("x", projectId=attempt)
        assert (refused.value.code, refused.value.extensions["field"]) == ("NOT_FOUND", "projectId")
    assert await count(other, theirs) == 0
    assert await listed(client) == [mine]


async def test_deleting_a_project_moves_its_threads_out(client: Client) -> None:
    project = (await create(client))["id"]
    threads = [await thread(client, projectId=project) for _ in range(3)]
    await archive_thread(client, threads[0], archived=True)
    await delete(client, project)
    assert set(await listed(client)) | set(await listed(client, archived=True)) == set(threads)
    assert await listed(client, inProject=True) == []
    assert (await client.run("query($id: ID!) { project(id: $id) { id } }", {"id": project}))["project"] is None


async def told_of_deletion(server: Server, client: Client, project: str, *, threads: bool) -> list[tuple[str, Any]]:
    """What the feed is told when a project is deleted, in the order of kinds and ids."""
    connection = await asyncpg.connect(server.database.url)
    try:
        before = await connection.fetchval("SELECT max(id) FROM changes")
        await delete(client, project, threads=threads)
        told = await connection.fetch(
            "SELECT kind, object_id FROM changes WHERE id > $1 AND owner_id = $2",
            *(before, parse_id(IdKind.USER, client.id)),
        )
    finally:
        await connection.close()
    return sorted((row["kind"], row["object_id"]) for row in told)


async def test_the_end_of_a_project_is_told_once_and_so_is_each_thread_that_it_moves_out(
    client: Client, server: Server
) -> None:
    project = (await create(client))["id"]
    threads = [await thread(client, projectId=project) for _ in range(3)]
    assert await told_of_deletion(server, client, project, threads=False) == sorted(
        [
            ("PROJECT_DELETED", parse_id(IdKind.PROJECT, project)),
            *(("THREAD", parse_id(IdKind.THREAD, one)) for one in threads),
        ]
    )


@pytest.mark.parametrize("threads", [False, True])
async def test_the_end_of_a_project_of_very_many_threads_is_told_by_one_reset(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    monkeypatch.setattr(projects, "MAX_TOLD_THREADS", 2)
    monkeypatch.setattr(projects, "_DELETED_AT_ONCE", 2)
    project = (await create(client))["id"]
    kept = await thread(client)
    gone = [await thread(client, projectId=project) for _ in range(3)]
    assert await told_of_deletion(server, client, project, threads=threads) == [("RESET", None)]
    assert set(await listed(client)) == ({kept} if threads else {kept, *gone})
    assert await listed(client, inProject=True) == []
    # And it is loud again afterwards.
    project = (await create(client))["id"]
    assert await told_of_deletion(server, client, project, threads=threads) == [
        ("PROJECT_DELETED", parse_id(IdKind.PROJECT, project))
    ]


async def test_a_project_that_ends_with_its_threads_counts_none_of_them(client: Client, server: Server) -> None:
    project = (await create(client))["id"]
    for _ in range(3):
        await thread(client, projectId=project)
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute(_UNCOUNTED)
        await delete(client, project, threads=True)
    finally:
        await connection.execute("DROP FUNCTION uncounted CASCADE")
        await connection.close()
    assert await listed(client) == []


async def test_deleting_a_project_with_its_threads_ends_what_is_live_and_leaves_nothing(
    server: Server, client: Client
) -> None:
    project = (await create(client))["id"]
    kept = await thread(client)
    gone = await thread(client, projectId=project)
    live = await client.send("Live", model="hangs", projectId=project)
    async with client.reading(live["assistantMessage"]["id"]) as reader:
        assert (await reader.next()) is not None
        await delete(client, project, threads=True)
        # Told of its end, if it was read in time, or that it is gone; never left waiting.
        try:
            last = [event["__typename"] async for event in reader.events()][-1]
        except GraphQLErrors as gone:
            last = gone.code
        assert last in ("MessageEnded", "NOT_FOUND")
    assert await listed(client) == [kept]
    connection = await asyncpg.connect(server.database.url)
    try:
        ids = [parse_id(IdKind.THREAD, key) for key in (gone, live["thread"]["id"])]
        assert await connection.fetchval("SELECT count(*) FROM messages WHERE thread_id = ANY($1::uuid[])", ids) == 0
    finally:
        await connection.close()


async def test_turns_in_a_project_are_told_its_prompt_and_ask_its_model(client: Client) -> None:
    question = f"Which {uuid.uuid4()}"
    SCRIPTS.driven.queue(question).put_nowait(TextDelta("x"))
    SCRIPTS.driven.queue(question).put_nowait(None)
    project = (await create(client, prompt="Answer in rhymes.", defaultModelId="driven"))["id"]
    turn = await client.send(question, model=None, projectId=project)  # type: ignore[arg-type]
    answer = await client.finish(turn["assistantMessage"]["id"])
    assert answer["model"] == {"id": "driven"}
    told = [(message.role, message.text) for message in SCRIPTS.driven.requests[question].messages]
    assert told == [("system", "Answer in rhymes."), ("user", question)]


async def test_the_projects_model_goes_before_the_viewers_and_that_before_the_servers(client: Client) -> None:
    choose = (
        "mutation($id: String) { updateSettings(input: {defaultModelId: $id}) { settings { defaultModel { id } } } }"
    )

    async def model_of(turn: dict[str, Any]) -> str:
        return str((await client.finish(turn["assistantMessage"]["id"]))["model"]["id"])

    server_default = (await client.run("{ models { id } }"))["models"][0]["id"]
    assert await model_of(await client.send("x", model=None)) == server_default  # type: ignore[arg-type]
    await client.run(choose, {"id": "fails-midway"})
    first = await client.send("x", model=None)  # type: ignore[arg-type]
    assert await model_of(first) == "fails-midway"
    project = (await create(client, defaultModelId="two-words"))["id"]
    await move(client, first["thread"]["id"], project)
    assert await model_of(await client.retry(first["assistantMessage"]["id"], model=None)) == "two-words"  # type: ignore[arg-type]
    again = await client.send("x", model=None, threadId=first["thread"]["id"])  # type: ignore[arg-type]
    assert await model_of(again) == "two-words"
    await client.run(choose, {"id": None})
    assert (await client.run("{ settings { defaultModel { id } } }"))["settings"]["defaultModel"] is None
    assert await model_of(await client.send("x", model=None)) == server_default  # type: ignore[arg-type]


async def test_a_setting_that_is_not_given_stays(client: Client) -> None:
    change = (
        "mutation($input: UpdateSettingsInput!) { updateSettings(input: $input) { settings { defaultModel { id } } } }"
    )
    await client.run(change, {"input": {"defaultModelId": "two-words"}})
    data = await client.run(change, {"input": {}})
    assert data["updateSettings"]["settings"]["defaultModel"] == {"id": "two-words"}
    for bad in ("no-such-model", "", "\x00", "x" * 10_000):
        with pytest.raises(GraphQLErrors) as refused:
            await client.run(change, {"input": {"defaultModelId": bad}})
        assert (refused.value.code, refused.value.extensions["field"]) == ("MODEL_UNAVAILABLE", "defaultModelId")
    assert (await client.run("{ settings { defaultModel { id } } }"))["settings"]["defaultModel"] == {"id": "two-words"}


async def test_pages_of_many_projects_hold_each_its_own(client: Client) -> None:
    projects = [(await create(client, name=f"p{n}"))["id"] for n in range(3)]
    threads = {project: [await thread(client, projectId=project) for _ in range(3)] for project in projects[:2]}
    query = "{ projects { nodes { id threads(first: 2) { nodes { id project { id } } pageInfo { hasNextPage } } } } }"
    nodes = (await client.run(query))["projects"]["nodes"]
    found = {node["id"]: [inner["id"] for inner in node["threads"]["nodes"]] for node in nodes}
    assert found == {project: threads[project][:0:-1] for project in projects[:2]} | {projects[2]: []}
    assert [node["threads"]["pageInfo"]["hasNextPage"] for node in nodes] == [False, True, True]


async def test_filters_of_threads(client: Client) -> None:
    ids = [await thread(client) for _ in range(3)]
    rename = (
        "mutation($id: ID!, $title: String!) { renameThread(input: {threadId: $id, title: $title}) { thread { id } } }"
    )
    await client.run(rename, {"id": ids[0], "title": "Grüße 50%"})
    pin = "mutation($id: ID!) { pinThread(input: {threadId: $id, pinned: true}) { thread { id } } }"
    await client.run(pin, {"id": ids[1]})
    assert await listed(client, title="grü") == [ids[0]]
    assert await listed(client, title="0%") == [ids[0]]
    assert await listed(client, title="hello") == [ids[1], ids[2]]
    assert await listed(client, pinned=True) == [ids[1]]
    assert await listed(client, pinned=False) == [ids[2], ids[0]]
    assert await listed(client, archived=True) == []
    await archive_thread(client, ids[2], archived=True)
    assert await listed(client) == [ids[1], ids[0]]
    assert await listed(client, archived=True) == [ids[2]]
    for bad in ("", "\x00", "x" * 801):
        with pytest.raises(GraphQLErrors) as refused:
            await listed(client, title=bad)
        assert refused.value.extensions["field"] == "title"
    for filters in ({"projectId": "thread_" + "0" * 32}, {"projectId": "x" * 10_000}):
        with pytest.raises(GraphQLErrors) as refused:
            await listed(client, **filters)
        assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "projectId")


@pytest.mark.parametrize(
    ("name", "part"), [("Übersicht", "üBER"), ("ПРИВЕТ", "привет"), ("Ελλάδα", "ΛΛΆΔ"), ("I ❤ ΟΔΌΣ 50%", "οδόσ 50%")]
)
async def test_filters_know_the_cases_of_every_script(client: Client, name: str, part: str) -> None:
    await create(client, name=name)
    assert await project_names(client, name=part) == [name]
    one = await thread(client)
    rename = "mutation($id: ID!, $to: String!) { renameThread(input: {threadId: $id, title: $to}) { thread { id } } }"
    await client.run(rename, {"id": one, "to": name})
    assert await listed(client, title=part) == [one]


async def test_a_thread_that_exists_takes_no_project_and_cannot_become_temporary(client: Client) -> None:
    project = (await create(client))["id"]
    mine = await thread(client)
    for given, field in (({"projectId": project}, "projectId"), ({"temporary": True}, "temporary")):
        with pytest.raises(GraphQLErrors) as refused:
            await client.send("x", threadId=mine, **given)
        assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", field)


async def test_the_same_key_in_another_project_is_a_conflict(client: Client) -> None:
    one, two = (await create(client))["id"], (await create(client))["id"]
    key = str(uuid.uuid4())
    first = await client.send("x", idempotencyKey=key, projectId=one)
    assert (await client.send("x", idempotencyKey=key, projectId=one))["thread"] == first["thread"]
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("x", idempotencyKey=key, projectId=two)
    assert refused.value.code == "CONFLICT"
    assert (await count(client, one), await count(client, two)) == (1, 0)
