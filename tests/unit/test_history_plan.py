"""What of a conversation goes to a model, by its plan: within what it takes, the newest first, and never half."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from models.parts import FilePart, Part, ReasoningPart, SourcePart, TextPart, ToolPart, parts_to_json
from providers.base import PromptReasoning, PromptText
from services.history import (
    MAX_IMAGE_BYTES,
    MAX_SENT_BYTES,
    MAX_SENT_FILES,
    MAX_SENT_PAGES,
    PromptLimits,
    _Branch,
    _Message,
    _plan,
    _Quote,
    _Sent,
    _system_tokens,
)

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=60)
TYPES = st.sampled_from(["text/plain", "image/png", "application/pdf", "application/octet-stream"])
SIZES = st.sampled_from([1, 100, 5_000, MAX_IMAGE_BYTES, MAX_IMAGE_BYTES + 1, MAX_SENT_BYTES])
FILES = st.builds(FilePart, st.builds(uuid4), st.just("f"), TYPES, SIZES)
ANSWERS: st.SearchStrategy[list[Part]] = st.lists(
    st.builds(TextPart, TEXTS)
    | st.builds(ReasoningPart, TEXTS, st.sampled_from([None, "EqQ="]))
    | st.builds(ToolPart, st.just("c"), st.just("f"), st.just({"q": "owl"}), st.sampled_from([None, "r"]))
    | st.builds(SourcePart, st.just("https://a.example"))
    | FILES,
    max_size=4,
)
QUESTIONS: st.SearchStrategy[list[Part]] = st.builds(
    lambda files, text: [*files, TextPart(text)], st.lists(FILES, max_size=4), TEXTS
)
LIMITS = st.builds(
    PromptLimits,
    max_chars=st.integers(0, 400),
    context_tokens=st.none() | st.integers(0, 20_000),
    reserved_tokens=st.integers(0, 500),
    vision=st.booleans(),
    pdf=st.booleans(),
    model_id=st.just("m"),
)


@st.composite
def branches(draw: Any) -> _Branch:
    """Questions and answers by turns, a question last; some of their files deleted."""
    rows: list[dict[str, Any]] = []
    files: dict[tuple[UUID, UUID], dict[str, Any]] = {}
    count = draw(st.integers(0, 6))
    for place in range(count + 1):
        asked = (count - place) % 2 == 0
        parts = draw(QUESTIONS if asked else ANSWERS)
        row = {
            "id": uuid4(),
            "role": "USER" if asked else "ASSISTANT",
            "model": None if asked else draw(st.sampled_from(["m", "other"])),
            "parts": parts_to_json(parts),
            "given": parts,
        }
        rows.append(row)
        for part in parts:
            if isinstance(part, FilePart) and draw(st.integers(0, 4)):
                side = draw(st.sampled_from([None, 10, 8_000, 8_001]))
                pages = draw(st.sampled_from([None, 1, 60]))
                files[row["id"], part.attachment_id] = {"key": "k", "pages": pages, "width": side, "height": side}
    return _Branch(rows[::-1], files, draw(st.sampled_from([[], ["Be brief."]])))


def sent(plan: list[_Message]) -> list[_Sent]:
    return [item for message in plan for item in message.items if isinstance(item, _Sent)]


@given(branches(), LIMITS)
def test_what_goes_along_fits_and_the_question_always_does(branch: _Branch, limits: PromptLimits) -> None:
    plan = _plan(branch, limits)
    assert plan[0].role == "user"
    assert plan[-1].role == "user"
    question = branch.messages[0]["given"]
    assert PromptText(question[-1].text) == plan[0].items[-1]
    # A run of the newest: nothing is left out of the middle but what says nothing.
    roles = [{"USER": "user", "ASSISTANT": "assistant"}[row["role"]] for row in branch.messages]
    told = [message.role for message in plan]
    left = iter(roles)
    assert all(role in left for role in told)
    if limits.context_tokens is not None and len(plan) > 1:
        room = limits.context_tokens - limits.reserved_tokens
        assert _system_tokens(branch) + sum(message.tokens + message.added for message in plan) <= room
    files = sent(plan)
    assert len(files) <= MAX_SENT_FILES
    assert sum(item.part.size for item in files) <= MAX_SENT_BYTES
    assert all(limits.vision for item in files if item.part.content_type == "image/png")
    assert all(limits.pdf for item in files if item.part.content_type == "application/pdf")
    facts = {part: file for (_, part), file in branch.files.items()}
    assert sum(facts[item.part.attachment_id]["pages"] for item in files if item.part.content_type != "image/png") <= (
        MAX_SENT_PAGES
    )
    for item in files:
        if item.part.content_type == "image/png":
            assert item.part.size <= MAX_IMAGE_BYTES
            assert facts[item.part.attachment_id]["width"] <= 8_000
    quoted = [item for message in plan for item in message.items if isinstance(item, _Quote)]
    assert all(0 < item.max_chars <= limits.max_chars and item.max_bytes > 0 for item in quoted)


@given(branches(), LIMITS)
def test_every_file_of_what_goes_along_is_sent_quoted_or_named(branch: _Branch, limits: PromptLimits) -> None:
    plan = _plan(branch, limits)
    spoken = [
        row for row in branch.messages if any(not isinstance(p, ReasoningPart | SourcePart) for p in row["given"])
    ]
    for message, row in zip(plan, spoken, strict=False):
        files = [part for part in row["given"] if isinstance(part, FilePart)]
        told = [
            item
            for item in message.items
            if isinstance(item, _Sent | _Quote) or (isinstance(item, PromptText) and item.text.startswith('[File "f"'))
        ]
        assert len(told) == len(files)


@given(branches(), LIMITS)
def test_reasoning_goes_back_whole_and_to_the_model_that_wrote_it(branch: _Branch, limits: PromptLimits) -> None:
    spoken = [
        row for row in branch.messages if any(not isinstance(p, ReasoningPart | SourcePart) for p in row["given"])
    ]
    for message, row in zip(_plan(branch, limits), spoken, strict=False):
        thoughts = [part for part in row["given"] if isinstance(part, ReasoningPart)]
        back = [item for item in message.items if isinstance(item, PromptReasoning)]
        whole = row["model"] == "m" and all(part.signature for part in thoughts)
        assert [item.text for item in back] == ([part.text for part in thoughts] if whole else [])


@given(branches(), LIMITS, st.integers(0, 400))
def test_more_room_never_leaves_out_more(branch: _Branch, limits: PromptLimits, more: int) -> None:
    roomier = PromptLimits(
        max_chars=limits.max_chars + more,
        context_tokens=None if limits.context_tokens is None else limits.context_tokens + more,
        reserved_tokens=limits.reserved_tokens,
        model_id="m",
    )
    bare = PromptLimits(
        max_chars=limits.max_chars,
        context_tokens=limits.context_tokens,
        reserved_tokens=limits.reserved_tokens,
        model_id="m",
    )
    without_files = _Branch(
        [
            row | {"parts": parts_to_json([part for part in row["given"] if not isinstance(part, FilePart)])}  # type: ignore[operator]
            for row in branch.messages
        ],
        {},
        branch.system,
    )
    assert len(_plan(without_files, roomier)) >= len(_plan(without_files, bare))
