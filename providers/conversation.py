"""A history made fit for any vendor: what all of them ask for alike, done once.

- Calls get ids of ours, `call00001` and so on: vendors differ in which ids they take, and a thread may hold the calls
  of several. Nine letters and digits are taken by all that are known.
- Names of tools keep letters, digits, `_` and `-`. Arguments are an object.
- A call without a result is told that it was not carried out.
- An answer does not end with a call: a short text closes it, because some vendors take no question right behind a
  result, and others then want the thinking that led to the call.
- Nor does it end with reasoning, which is refused: then all of its reasoning is left out.
- Vendors take no files in an answer, so those of an answer stand at the beginning of the question behind it.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import orjson

from providers.base import (
    PromptFile,
    PromptMessage,
    PromptPart,
    PromptReasoning,
    PromptText,
    PromptToolCall,
)

NOT_CARRIED_OUT = "This call was not carried out; there is no result."
ENDED_WITH_CALL = "(This answer ended here.)"

_NOT_IN_NAMES = re.compile("[^a-zA-Z0-9_-]")
_MAX_NAME_CHARS = 64


def fit(messages: Iterable[PromptMessage]) -> list[PromptMessage]:
    """The messages as said above; those that nothing is left of are left out."""
    fitting: list[PromptMessage] = []
    calls = 0
    shown: list[PromptPart] = []
    for message in messages:
        content: list[PromptPart] = []
        if message.role == "user":
            content, shown = shown, []
        for part in message.content:
            match part:
                case PromptText(text):
                    if text.strip():
                        content.append(part)
                case PromptFile() if message.role == "user":
                    content.append(part)
                case PromptFile(name) if message.role == "assistant":
                    shown += [PromptText(f'[File "{name}", from the answer before:]'), part]
                case PromptReasoning(text) if message.role == "assistant" and text:
                    content.append(part)
                case PromptToolCall(_, name, arguments) if message.role == "assistant":
                    calls += 1
                    content.append(
                        replace(part, call_id=f"call{calls:05}", name=_name(name), arguments=_object(arguments))
                    )
        if content and isinstance(content[-1], PromptReasoning):
            content = [part for part in content if not isinstance(part, PromptReasoning)]
        if content and isinstance(content[-1], PromptToolCall):
            content.append(PromptText(ENDED_WITH_CALL))
        if content:
            fitting.append(PromptMessage(message.role, tuple(content)))
    return fitting


@dataclass(slots=True, frozen=True)
class Stretch:
    """A piece of an answer: what the model said, then the calls it made; their results come before the next."""

    said: tuple[PromptText | PromptReasoning, ...]
    calls: tuple[PromptToolCall, ...]


def stretches(answer: PromptMessage) -> Iterator[Stretch]:
    """An answer, cut behind each run of calls."""
    said: tuple[Any, ...] = ()
    for are_calls, parts in groupby(answer.content, lambda part: isinstance(part, PromptToolCall)):
        if are_calls:
            yield Stretch(said, tuple(part for part in parts if isinstance(part, PromptToolCall)))
            said = ()
        else:
            said = tuple(parts)
    if said:
        yield Stretch(said, ())


def result_text(call: PromptToolCall) -> str:
    """What the model is told that a call came to."""
    if call.result is None:
        return NOT_CARRIED_OUT
    return call.result if isinstance(call.result, str) else orjson.dumps(call.result).decode()


def base64_of(file: PromptFile) -> str:
    """The bytes of a file, as JSON can carry them."""
    return b64encode(file.data).decode()


def _name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:_MAX_NAME_CHARS] or "tool"


def _object(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    return {} if arguments is None else {"input": arguments}
