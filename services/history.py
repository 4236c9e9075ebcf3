"""What a model is told: the branch that leads to the question, oldest first, within what the model takes.

One rule decides what is left out: from the newest message to the oldest, a message goes along as long as what it says
still fits, in code points and in estimated tokens; the first that does not fit is left out with all before it. The
question is always there. Files do not decide that: what there is no room for is named instead
(docs/decisions/0018-what-a-model-is-told.md).

A plan is made of the rows alone. `estimate_prompt` counts it, and `history` reads the files for it: so both speak of
the same prompt.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import orjson

from models.database import Database
from models.parts import FilePart, Part, ReasoningPart, SourcePart, TextPart, ToolPart, parts_from_json
from models.records import MessageRecord
from providers.base import (
    PromptFile,
    PromptMessage,
    PromptPart,
    PromptReasoning,
    PromptText,
    PromptToolCall,
    Role,
)
from services.file_types import IMAGES, PDF, TEXT
from services.personalization import PERSONALIZATION_COLUMNS, Personalization, instruction
from storage.base import Storage
from streams.tokens import BYTES_PER_TOKEN, TOKENS_PER_IMAGE, estimate_tokens, estimate_tokens_of

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_HISTORY_MESSAGES = 500
# What vendors take at once, the least of them: Anthropic's 32 MB of a request in base64, 5 MB of an image in base64,
# 8,000 pixels of its sides, 100 pages; Gemini's 20 MB of a request.
MAX_SENT_FILES = 20
MAX_SENT_BYTES = 12 * 1024 * 1024
MAX_IMAGE_BYTES = 5 * 1024 * 1024 * 3 // 4
MAX_IMAGE_SIDE = 8_000
MAX_SENT_PAGES = 100
# A page is sent as its text and as an image of it.
_TOKENS_PER_PAGE = 2_500
# What formats of conversations add to each message's text (its role and its ends), and the naming of a file.
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_FILE = 40

# By parents, not by the active path: what leads to a message never changes, whatever is selected meanwhile. The first
# row is the question's, and has what stands before the conversation.
_BRANCH = f"""
WITH RECURSIVE branch AS (
    SELECT id, parent_id, role, model, parts, 1 AS steps FROM messages WHERE id = $1
    UNION ALL
    SELECT m.id, m.parent_id, m.role, m.model, m.parts, steps + 1
    FROM branch CROSS JOIN LATERAL (
        SELECT id, parent_id, role, model, parts FROM messages WHERE id = branch.parent_id LIMIT 1
    ) m WHERE steps < $2
), first AS (
    SELECT m.id, p.prompt, {", ".join(f"s.{column}" for column in PERSONALIZATION_COLUMNS.split(", "))}
    FROM messages m JOIN threads t ON t.id = m.thread_id
    LEFT JOIN projects p ON p.id = t.project_id
    LEFT JOIN settings s ON s.owner_id = m.owner_id
    WHERE m.id = $1
)
SELECT branch.id, role, model, parts, prompt, {PERSONALIZATION_COLUMNS}
FROM branch LEFT JOIN first ON first.id = branch.id ORDER BY steps
"""  # noqa: S608 - names of ours
_FILES = """
SELECT l.message_id, a.id, b.key, a.pages, a.width, a.height
FROM attachment_links l JOIN attachments a ON a.id = l.attachment_id JOIN blobs b ON b.id = a.blob_id
WHERE l.message_id = ANY($1::uuid[])
"""
_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant", "SYSTEM": "system"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """What a model takes.

    Attributes:
        max_chars: most code points of the conversation, the quoted files among them.
        context_tokens: most tokens of a prompt and its answer together; None: not known.
        reserved_tokens: how many of them are kept for the answer.
        vision: whether images are sent to it.
        pdf: whether PDFs are.
        model_id: which model it is: reasoning goes back to the one that wrote it.
    """

    max_chars: int
    context_tokens: int | None = None
    reserved_tokens: int = 0
    vision: bool = False
    pdf: bool = False
    model_id: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The messages of a request, oldest first, and about how many tokens they are without what formats add to them."""

    messages: tuple[PromptMessage, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Quote:
    """The beginning of a file of text; `tokens` at most."""

    part: FilePart
    key: str
    max_chars: int
    max_bytes: float
    tokens: int


@dataclass(frozen=True, slots=True)
class _Sent:
    """A file that goes along as its bytes."""

    part: FilePart
    key: str


_Item: TypeAlias = PromptText | PromptReasoning | PromptToolCall | _Quote | _Sent


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of the plan: what it says, how many tokens that is, and how many more its format takes at most."""

    role: Role
    items: tuple[_Item, ...]
    tokens: int
    added: int


@dataclass(frozen=True, slots=True)
class _Branch:
    """What a plan is made of: the messages, newest first, their files that are still there, and what stands first."""

    messages: Sequence[Mapping[str, Any]]
    files: Mapping[tuple[UUID, UUID], Mapping[str, Any]]
    system: Sequence[str]


async def history(database: Database, storage: Storage, message_id: UUID, limits: PromptLimits) -> Prompt:
    """The messages up to and with this one, as a model gets them; before them what stands first.

    - A file is named where it stands. Text is quoted, and images and PDFs are sent, as far as the model takes them and
      there is room; newest first, 20 files, 12 MiB and 100 pages in all, 3.75 MiB and 8,000 pixels a side an image.
    - Calls of tools go along with their results. Reasoning does where all of an answer's is signed and the same model
      wrote it, and is left out otherwise. Sources are left out.
    - Answers that nothing is left of (failed before their first word) are left out. What is left begins with a user's
      message.

    Raises:
        StorageError: a file cannot be read.
    """
    async with database.acquire() as connection:
        branch = await _branch(connection, message_id)
    return await _prompt(branch, storage, limits)


async def first_prompt(
    question: MessageRecord, personalization: Personalization, storage: Storage, limits: PromptLimits
) -> Prompt:
    """What `history` is for a question without files that begins a thread outside of projects."""
    row = {"id": question.id, "role": question.role_name, "model": None, "parts": question.parts_json}
    return await _prompt(_Branch([row], {}, _system_texts(personalization)), storage, limits)


async def _prompt(branch: _Branch, storage: Storage, limits: PromptLimits) -> Prompt:
    messages = [PromptMessage.of("system", text) for text in branch.system]
    tokens = sum(map(estimate_tokens, branch.system))
    for planned in reversed(_plan(branch, limits)):
        content: list[PromptPart] = []
        tokens += planned.tokens
        for item in planned.items:
            if isinstance(item, _Quote):
                content.append(quoted := PromptText(await _quoted(storage, item)))
                tokens += min(0, estimate_tokens(quoted.text) - item.tokens)
            elif isinstance(item, _Sent):
                if planned.role == "user":
                    content.append(PromptText(f"[{_named(item.part)}:]"))
                data = await _bytes(storage, item.key)
                content.append(PromptFile(item.part.name, item.part.content_type, data))
            else:
                content.append(item)
        messages.append(PromptMessage(planned.role, tuple(content)))
    return Prompt(tuple(messages), tokens)


async def estimate_prompt(connection: Connection, message_id: UUID, limits: PromptLimits) -> int:
    """About how many tokens `history` will be, without reading a file: in the transaction that writes the question."""
    branch = await _branch(connection, message_id)
    return _system_tokens(branch) + sum(message.tokens + message.added for message in _plan(branch, limits))


async def _branch(connection: Connection, message_id: UUID) -> _Branch:
    rows = await connection.fetch(_BRANCH, message_id, MAX_HISTORY_MESSAGES)
    # What looks like a part that is a file may be the words of a text: then there is one look in vain.
    with_files = [row["id"] for row in rows if '"file"' in row["parts"]]
    links = await connection.fetch(_FILES, with_files) if with_files else []
    files = {(link["message_id"], link["id"]): link for link in links}
    system = _system_texts(Personalization.from_row(rows[0]), rows[0]["prompt"]) if rows else []
    return _Branch(rows, files, system)


def _system_texts(personalization: Personalization, project_prompt: str | None = None) -> list[str]:
    """What a model is told before the conversation, each text as a message of its own, in this order."""
    return [text for text in (instruction(personalization), project_prompt) if text]


def _system_tokens(branch: _Branch) -> int:
    return sum(estimate_tokens(text) + _TOKENS_PER_MESSAGE for text in branch.system)


def _plan(branch: _Branch, limits: PromptLimits) -> list[_Message]:
    """What goes along, newest first."""
    room = _Room(limits, _system_tokens(branch))
    planned: list[_Message] = []
    for row in branch.messages:
        role = _ROLES[row["role"]]
        told = _told(parts_from_json(row["parts"]), own=role == "assistant" and row["model"] == limits.model_id)
        chars, tokens = _size(told)
        added = _TOKENS_PER_MESSAGE + _TOKENS_PER_FILE * sum(isinstance(part, FilePart) for part in told)
        if planned and (chars > room.chars or tokens + added > room.tokens):
            break
        room.chars, room.tokens = max(0, room.chars - chars), max(0, room.tokens - tokens - added)
        items: list[_Item] = []
        for part in told:
            if isinstance(part, FilePart):
                item, taken = room.file(part, branch.files.get((row["id"], part.attachment_id)))
                items.append(item)
                tokens += taken
            else:
                items.append(part)
        if items:
            planned.append(_Message(role, tuple(items), tokens, added))
    while len(planned) > 1 and planned[-1].role == "assistant":
        planned.pop()
    return planned


_Told: TypeAlias = PromptText | PromptReasoning | PromptToolCall | FilePart


def _told(parts: list[Part], *, own: bool) -> list[_Told]:
    """What a message says, in its order.

    Args:
        own: whether it is an answer of the model that is asked.
    """
    with_reasoning = own and all(part.signature for part in parts if isinstance(part, ReasoningPart))
    told: list[_Told] = []
    for part in parts:
        match part:
            case TextPart(text):
                before = told[-1] if told else None
                if isinstance(before, PromptText):
                    told[-1] = PromptText(before.text + text)
                else:
                    told.append(PromptText(text))
            case ReasoningPart(text, signature):
                if with_reasoning and signature:
                    told.append(PromptReasoning(text, signature))
            case ToolPart(call_id, name, arguments, result):
                told.append(PromptToolCall(call_id, name, arguments, result))
            case FilePart():
                told.append(part)
            case SourcePart():
                pass
    return told if any(not isinstance(part, PromptReasoning) for part in told) else []


def _size(told: list[_Told]) -> tuple[int, int]:
    """Code points and tokens of what a message says, without its files."""
    chars = tokens = 0
    for part in told:
        match part:
            case PromptText(text):
                chars += len(text)
                tokens += estimate_tokens(text)
            case PromptReasoning(text, signature):
                chars += len(text)
                # The signature holds the thinking that the text may be a summary of, encrypted and in base64.
                tokens += max(estimate_tokens(text), estimate_tokens_of(len(signature) * 3 // 4))
            case PromptToolCall(_, name, arguments, result):
                written = len(name) + len(orjson.dumps(arguments)) + len(orjson.dumps(result))
                chars += written
                tokens += estimate_tokens_of(written)
    return chars, tokens


class _Room:
    """What there is still room for."""

    def __init__(self, limits: PromptLimits, system_tokens: int) -> None:
        self._limits = limits
        self.chars = limits.max_chars
        self.tokens: float = math.inf
        if limits.context_tokens is not None:
            self.tokens = max(0, limits.context_tokens - limits.reserved_tokens - system_tokens)
        self._files = MAX_SENT_FILES
        self._bytes = MAX_SENT_BYTES
        self._pages = MAX_SENT_PAGES

    def file(self, part: FilePart, file: Mapping[str, Any] | None) -> tuple[_Item, int]:
        """How a file goes along, and how many tokens it takes beyond its name.

        Args:
            file: what is known of it; None where it was deleted.
        """
        if file is None:
            return PromptText(f"[{_named(part)}: deleted since.]"), 0
        if part.content_type == TEXT and self.chars > 0 and self.tokens > 0:
            max_chars, max_bytes = self.chars, self.tokens * BYTES_PER_TOKEN
            # No more code points than bytes; no more bytes than four a code point.
            tokens = estimate_tokens_of(int(min(part.size, max_chars * 4, max_bytes)))
            self.chars -= min(part.size, max_chars)
            self.tokens -= tokens
            return _Quote(part, file["key"], max_chars, max_bytes, tokens), tokens
        pages = 0
        if part.content_type in IMAGES:
            sides = (file["width"] or MAX_IMAGE_SIDE + 1, file["height"] or MAX_IMAGE_SIDE + 1)
            takes = self._limits.vision and part.size <= MAX_IMAGE_BYTES and max(sides) <= MAX_IMAGE_SIDE
            tokens = TOKENS_PER_IMAGE
        else:
            # One whose pages cannot be counted is encrypted or broken more often than not, and would be refused.
            takes = self._limits.pdf and part.content_type == PDF and bool(file["pages"])
            pages = file["pages"] or 0
            tokens = pages * _TOKENS_PER_PAGE
        fits = self._files > 0 and part.size <= self._bytes and pages <= self._pages and tokens <= self.tokens
        if not takes or not fits:
            return PromptText(f"[{_named(part)}: its content is not shown here.]"), 0
        self._files -= 1
        self._bytes -= part.size
        self._pages -= pages
        self.tokens -= tokens
        return _Sent(part, file["key"]), tokens


def _named(part: FilePart) -> str:
    return f'File "{part.name}" ({part.content_type}, {part.size} bytes)'


async def _quoted(storage: Storage, quote: _Quote) -> str:
    text = await _beginning(storage, quote)
    whole = len(text) <= quote.max_chars and quote.part.size <= quote.max_bytes
    ending = "End of the file" if whole else "The rest of the file is left out"
    return f"[{_named(quote.part)}:]\n{text[: quote.max_chars]}\n[{ending}.]"


async def _beginning(storage: Storage, quote: _Quote) -> str:
    """A text up to a little more than so many code points, and to no more than so many bytes."""
    decoder, text, length, left = codecs.getincrementaldecoder("utf-8")(), list[str](), 0, quote.max_bytes
    async with aclosing(storage.read(quote.key)) as pieces:
        async for piece in pieces:
            text.append(decoder.decode(piece if len(piece) <= left else piece[: int(left)]))
            length += len(text[-1])
            left -= len(piece)
            if length > quote.max_chars or left <= 0:
                break
    return "".join(text)


async def _bytes(storage: Storage, key: str) -> bytes:
    data = bytearray()
    async with aclosing(storage.read(key)) as pieces:
        async for piece in pieces:
            data += piece
    return bytes(data)
