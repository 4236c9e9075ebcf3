"""Images that models make: kept as files of whoever asked, shown as they come, and never left behind."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from providers.base import ImageOutput, ProviderEvent, TextDelta
from providers.scripted import drawn
from server.runtime import Server
from services.generated_images import GeneratedImages
from storage.base import StorageUnavailableError
from storage.local import LocalStorage
from tests.accounts import comparable, download, files, upload
from tests.api.test_attachments import DELETE, DELETE_THREAD, database, is_there, later, sweep
from tests.api.test_forks import fork
from tests.api.test_sharing import content, files_of, fork_shared, share
from tests.client import Client, connect, text_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS

IMAGES = "{ attachments { nodes { id name state } } }"


def picture() -> bytes:
    """A PNG that nobody else has made."""
    return drawn(8, 8) + uuid.uuid4().bytes


async def begin(client: Client, *events: ProviderEvent, ended: bool = True, **more: Any) -> dict[str, Any]:
    """A turn whose model says this."""
    question = str(uuid.uuid4())
    for event in events:
        SCRIPTS.driven.queue(question).put_nowait(event)
    if ended:
        SCRIPTS.driven.queue(question).put_nowait(None)
    return await client.send(question, model="driven", **more)


async def answered(client: Client, *events: ProviderEvent, **more: Any) -> dict[str, Any]:
    turn = await begin(client, *events, **more)
    return await client.finish(turn["assistantMessage"]["id"])


async def stored(client: Client) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = (await client.run(IMAGES))["attachments"]["nodes"]
    return nodes


async def bytes_of(client: Client, attachment_id: str) -> bytes:
    found = await client.run("query($id: ID!) { node(id: $id) { ... on Attachment { url } } }", {"id": attachment_id})
    async with client.http.get(found["node"]["url"]) as response:
        assert response.status == 200
        return await response.read()


async def test_an_image_is_shown_as_it_comes_and_stored_as_a_file(client: Client) -> None:
    turn = await client.send("Draw", model="draws")
    events = await client.read(turn["assistantMessage"]["id"])
    (added,) = [event for event in events if event["__typename"] == "MessagePartAdded"]
    (file,) = await stored(client)
    assert (file["name"], file["state"]) == ("image-1.png", "LINKED")
    part = {
        "__typename": "FilePart",
        "name": "image-1.png",
        "contentType": "image/png",
        "size": len(drawn(64, 48)),
        "attachment": {"id": file["id"]},
    }
    assert (added["partIndex"], added["part"]) == (1, part)
    message = events[-1]["message"]
    assert message["parts"] == [
        {"__typename": "TextPart", "text": "Here: "},
        part,
        {"__typename": "TextPart", "text": "Nice?"},
    ]
    assert (message["status"], message["text"], text_of(events)) == ("COMPLETE", "Here: Nice?", "Here: Nice?")
    assert (message["usage"]["completionTokens"], message["usage"]["estimated"]) == (1_300, False)
    assert await bytes_of(client, file["id"]) == drawn(64, 48)
    # From a cursor in the middle, and after the end: the same part at the same place.
    again = await client.read(turn["assistantMessage"]["id"], after=events[0]["cursor"])
    assert added in again


async def test_an_answer_that_is_an_image_alone_is_whole_and_counted(client: Client) -> None:
    message = await answered(client, ImageOutput("image/png", picture()), ImageOutput("image/png", picture()))
    assert (message["status"], message["text"]) == ("COMPLETE", "")
    assert [part["name"] for part in message["parts"]] == ["image-1.png", "image-2.png"]
    assert (message["usage"]["completionTokens"], message["usage"]["estimated"]) == (3_200, True)


async def test_what_an_image_is_its_content_tells(client: Client) -> None:
    message = await answered(client, ImageOutput("image/webp", picture()))
    assert (message["parts"][0]["name"], message["parts"][0]["contentType"]) == ("image-1.png", "image/png")


@pytest.mark.parametrize("data", [b"words", b"<svg onload='alert(1)'/>", b"%PDF-1.7", drawn(8, 8)[:20], bytes(50)])
async def test_what_is_no_image_is_not_kept_and_the_answer_says_so(client: Client, data: bytes) -> None:
    image = ImageOutput("image/png", data)
    message = await answered(client, TextDelta("Here: "), image, TextDelta("Nice?"))
    assert (message["status"], message["error"]["code"]) == ("FAILED", "PROVIDER_PROTOCOL")
    assert message["parts"] == [{"__typename": "TextPart", "text": "Here: Nice?"}]
    assert await stored(client) == []


@pytest.fixture
async def limited(postgres_url: str, tmp_path: Path) -> AsyncIterator[Client]:
    """A user of a server with little room for files."""
    settings = test_settings(
        await make_database(postgres_url), tmp_path, max_attachment_bytes=1_000, max_attachment_quota_bytes=8_192
    )
    server = Server(settings, providers=SCRIPTS.models())
    await server.start()
    async with connect(server.address) as client:
        await client.sign_in()
        yield client
    await server.drain()
    await server.close()


async def test_an_image_beyond_the_quota_is_lost_and_the_rest_of_the_answer_is_not(limited: Client) -> None:
    images = [ImageOutput("image/png", picture()) for _ in range(3)]
    message = await answered(limited, *images, TextDelta("Three."))
    assert (message["status"], message["error"]["code"]) == ("FAILED", "ATTACHMENT_UNAVAILABLE")
    assert [part.get("name") for part in message["parts"]] == ["image-1.png", "image-2.png", None]
    assert message["text"] == "Three."
    too_large = await answered(limited, ImageOutput("image/png", picture() + bytes(1_000)), TextDelta("One."))
    assert (too_large["status"], too_large["error"]["code"]) == ("FAILED", "ATTACHMENT_UNAVAILABLE")
    assert (too_large["text"], len(await stored(limited))) == ("One.", 2)


async def test_an_image_that_the_storage_does_not_take_is_lost_and_nothing_else(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        async def refuse(*_: object, **_more: object) -> int:
            raise StorageUnavailableError

        patched.setattr(LocalStorage, "put", refuse)
        message = await answered(client, TextDelta("Here: "), ImageOutput("image/png", picture()), TextDelta("Nice?"))
    assert (message["status"], message["error"]["code"]) == ("FAILED", "ATTACHMENT_UNAVAILABLE")
    assert (message["text"], len(message["parts"])) == ("Here: Nice?", 1)
    assert await stored(client) == []


async def test_a_stop_while_an_image_is_written_leaves_nothing_of_it(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, writing = picture(), asyncio.Event()
    put = LocalStorage.put

    async def hang(self: LocalStorage, *given: Any, **more: Any) -> int:
        await put(self, *given, **more)
        writing.set()
        await asyncio.Event().wait()
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "put", hang)
        turn = await begin(client, TextDelta("Here: "), ImageOutput("image/png", image), ended=False)
        await asyncio.wait_for(writing.wait(), 10)
        stopped = await client.stop(turn["assistantMessage"]["id"])
    assert (stopped["status"], stopped["text"], len(stopped["parts"])) == ("STOPPED", "Here: ", 1)
    assert not is_there(server, image)
    assert await stored(client) == []


async def test_an_image_that_was_stored_but_never_linked_is_swept(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, linking = picture(), asyncio.Event()

    async def hang(*_: object) -> None:
        linking.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(GeneratedImages, "_linked", hang)
        turn = await begin(client, ImageOutput("image/png", image), ended=False)
        await asyncio.wait_for(linking.wait(), 10)
        await client.stop(turn["assistantMessage"]["id"])
    assert is_there(server, image)
    assert [file["state"] for file in await stored(client)] == ["STORED"]
    await later(server)
    await sweep(server)
    assert not is_there(server, image)
    assert await stored(client) == []


async def test_an_image_of_an_answer_that_was_deleted_meanwhile_is_linked_to_nothing(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, linking, deleted = picture(), asyncio.Event(), asyncio.Event()
    link = GeneratedImages._linked

    async def wait(self: GeneratedImages, *given: Any) -> Any:
        linking.set()
        await deleted.wait()
        return await link(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(GeneratedImages, "_linked", wait)
        turn = await begin(client, ImageOutput("image/png", image))
        await asyncio.wait_for(linking.wait(), 10)
        async with database(server) as connection:
            await connection.execute("DELETE FROM threads WHERE title = $1", turn["thread"]["title"])
        deleted.set()
        buffer = server.hub.get(uuid.UUID(turn["assistantMessage"]["id"].removeprefix("message_")))
        while buffer is not None and not buffer.closed:
            await buffer.wait(buffer.length)
    assert [file["state"] for file in await stored(client)] == ["STORED"]
    await later(server)
    await sweep(server)
    assert not is_there(server, image)


async def test_an_image_goes_with_its_last_answer(server: Server, client: Client) -> None:
    image = picture()
    turn = await begin(client, ImageOutput("image/png", image))
    message = await client.finish(turn["assistantMessage"]["id"])
    forked = await fork(client, message["id"])
    await client.run(DELETE_THREAD, {"id": turn["thread"]["id"]})
    await sweep(server)
    copy = (await client.path(forked["id"]))[1]
    assert copy["parts"] == message["parts"]
    assert is_there(server, image)
    await client.run(DELETE_THREAD, {"id": forked["id"]})
    await sweep(server)
    assert not is_there(server, image)
    assert await stored(client) == []


async def test_a_deleted_image_is_remembered_by_its_name(client: Client) -> None:
    turn = await begin(client, TextDelta("Here."), ImageOutput("image/png", picture()))
    message = await client.finish(turn["assistantMessage"]["id"])
    await client.run(DELETE, {"id": message["parts"][1]["attachment"]["id"]})
    again = await client.message(message["id"])
    assert (again["parts"][1]["name"], again["parts"][1]["attachment"]) == ("image-1.png", None)
    following = await client.send("And now?", threadId=turn["thread"]["id"], model="driven")
    told = SCRIPTS.driven.queue("And now?")
    told.put_nowait(TextDelta("x"))
    told.put_nowait(None)
    await client.finish(following["assistantMessage"]["id"])
    assert "deleted since" in SCRIPTS.driven.requests["And now?"].messages[1].text


@pytest.mark.parametrize("chosen", [True, False])
async def test_an_image_is_in_a_link_where_that_was_chosen(
    client: Client, other: Client, nobody: Client, chosen: bool
) -> None:
    image = picture()
    turn = await begin(client, TextDelta("Here: "), ImageOutput("image/png", image))
    await client.finish(turn["assistantMessage"]["id"])
    link = await share(client, turn["thread"]["id"], includeAttachments=chosen)
    shown = await files_of(nobody, link["token"])
    assert [file["name"] for file in shown] == (["image-1.png"] if chosen else [])
    if chosen:
        assert await content(nobody, shown[0]["path"]) == image
    theirs = (await other.path((await fork_shared(other, link["token"]))["id"]))[1]
    assert theirs["text"] == "Here: "
    assert len(theirs["parts"]) == 1 + chosen
    if chosen:
        assert await bytes_of(other, theirs["parts"][1]["attachment"]["id"]) == image


async def test_an_image_comes_along_with_an_export(client: Client, other: Client) -> None:
    image = picture()
    turn = await begin(client, TextDelta("Here: "), ImageOutput("image/png", image))
    await client.finish(turn["assistantMessage"]["id"])
    exported = await download(client)
    assert list(files(exported).values()) == [image]
    assert (await upload(other, exported))[0] == 200
    assert comparable(await download(other)) == comparable(exported)
    (thread,) = (await other.run("{ threads { nodes { id } } }"))["threads"]["nodes"]
    part = (await other.path(thread["id"]))[1]["parts"][1]
    assert await bytes_of(other, part["attachment"]["id"]) == image
    assert [file["state"] for file in await stored(other)] == ["LINKED"]


async def test_a_thread_is_found_by_what_is_said_beside_an_image(client: Client) -> None:
    word = f"owl{uuid.uuid4().hex[:8]}"
    turn = await begin(client, TextDelta(f"A {word} "), ImageOutput("image/png", picture()), TextDelta("by night."))
    await client.finish(turn["assistantMessage"]["id"])
    query = "query($q: String!) { search(query: $q, first: 5) { nodes { message { id } } } }"
    found = (await client.run(query, {"q": word}))["search"]["nodes"]
    assert [hit["message"]["id"] for hit in found] == [turn["assistantMessage"]["id"]]
