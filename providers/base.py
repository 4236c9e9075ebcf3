"""What every provider speaks: a request in, a stream of events out, one kind of failure.

An adapter is an async generator. It ends by returning after a `Finish`, or by raising `ProviderFailure`; returning
without a `Finish` means that the provider hung up in the middle. Closing the generator closes the connection to the
vendor. Adapters never retry after the first event and never put a key, a URL or a vendor's error body into a message
that a user can read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeAlias


@dataclass(slots=True, frozen=True)
class TextDelta:
    """The next characters of the answer; may be empty."""

    text: str


@dataclass(slots=True, frozen=True)
class ReasoningDelta:
    """The next characters of the model's shown reasoning; may be empty."""

    text: str


@dataclass(slots=True, frozen=True)
class ReasoningSignature:
    """The vendor's mark on the reasoning told just before: with it, and unchanged, it can be sent back.

    None: a part of the reasoning was withheld, so that nothing of this answer's can be sent back.
    """

    signature: str | None


@dataclass(slots=True, frozen=True)
class ImageOutput:
    """A whole image of the answer. `content_type` is what the vendor says; the bytes decide."""

    content_type: str
    data: bytes = field(repr=False)


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A whole tool call: its arguments are complete and parsed (a JSON value; the raw text where it is not JSON)."""

    call_id: str
    name: str
    arguments: Any


@dataclass(slots=True, frozen=True)
class TokenUsage:
    """What the provider counted, in tokens. `cached` is a share of `prompt`, `reasoning` a share of `completion`."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: int = 0


class FinishReason(StrEnum):
    """Why the model stopped, in the field's common terms."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"


@dataclass(slots=True, frozen=True)
class Finish:
    """The provider said that the answer is whole."""

    reason: FinishReason


ProviderEvent: TypeAlias = (
    TextDelta | ReasoningDelta | ReasoningSignature | ImageOutput | ToolCall | TokenUsage | Finish
)


class FailureCode(StrEnum):
    """Why an answer could not be had; the same names as the API's `MessageErrorCode`."""

    PROVIDER_UNAVAILABLE = "PROVIDER_UNAVAILABLE"
    PROVIDER_TIMEOUT = "PROVIDER_TIMEOUT"
    PROVIDER_REJECTED_KEY = "PROVIDER_REJECTED_KEY"
    PROVIDER_REJECTED_REQUEST = "PROVIDER_REJECTED_REQUEST"
    PROVIDER_PROTOCOL = "PROVIDER_PROTOCOL"
    RATE_LIMITED = "RATE_LIMITED"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    CONTENT_FILTERED = "CONTENT_FILTERED"


class ProviderFailure(Exception):  # noqa: N818 - a failure of theirs, not an error of ours
    """The provider could not answer.

    Args:
        code: what kind of failure, for programs.
        message: one sentence a user can act on; never vendor text, a key or an address.
        retry_after: seconds after which the provider said a retry makes sense, already capped.
        passing: the provider put the request off (429, 5xx); the same one may well be answered in a moment.
        of_reasoning: it refused the reasoning that was sent back; the same request without that may be answered.
    """

    def __init__(
        self,
        code: FailureCode,
        message: str,
        *,
        retry_after: int | None = None,
        passing: bool = False,
        of_reasoning: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.passing = passing
        self.of_reasoning = of_reasoning


ReasoningEffort: TypeAlias = Literal["LOW", "MEDIUM", "HIGH"]
Role: TypeAlias = Literal["user", "assistant", "system"]


@dataclass(slots=True, frozen=True)
class PromptText:
    """A text."""

    text: str


@dataclass(slots=True, frozen=True)
class PromptFile:
    """An image or a PDF, as its bytes; sent to models that can take it."""

    name: str
    content_type: str
    data: bytes = field(repr=False)


@dataclass(slots=True, frozen=True)
class PromptReasoning:
    """What the model thought in an answer before, as it was signed; for the model that signed it alone."""

    text: str
    signature: str = field(repr=False)


@dataclass(slots=True, frozen=True)
class PromptToolCall:
    """A tool call of an answer before. `result` None: there was none, and the model is told so."""

    call_id: str
    name: str
    arguments: Any = None
    result: Any = None


PromptPart: TypeAlias = PromptText | PromptFile | PromptReasoning | PromptToolCall


@dataclass(slots=True, frozen=True)
class PromptMessage:
    """One message of the history as the model gets it, oldest first in a request.

    What a part can be depends on the role: files are a user's or an answer's, reasoning and calls an answer's.
    """

    role: Role
    content: tuple[PromptPart, ...]

    @classmethod
    def of(cls, role: Role, text: str) -> PromptMessage:
        """A message that is a text and nothing else."""
        return cls(role, (PromptText(text),))

    @property
    def text(self) -> str:
        """Its texts, apart."""
        return "\n\n".join(part.text for part in self.content if isinstance(part, PromptText))


@dataclass(slots=True, frozen=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        model: the vendor's name of it.
        max_output_tokens: None leaves the limit to the vendor.
        possible_output_tokens: what the model can write at most behind these messages, thinking included; None: not
            known. It is no wish: a limit that is sent stays within it, because vendors refuse one that does not.
        image_output: whether images are wanted beside text.
        prompt_tokens: about how many tokens the messages are, files among them.
    """

    model: str
    messages: tuple[PromptMessage, ...]
    reasoning_effort: ReasoningEffort | None = None
    max_output_tokens: int | None = None
    user: str | None = field(default=None)
    image_output: bool = False
    prompt_tokens: int = 0
    possible_output_tokens: int | None = None

    @property
    def has_files(self) -> bool:
        """Whether bytes are to be sent."""
        return any(isinstance(part, PromptFile) for message in self.messages for part in message.content)

    def possible(self, tokens: int) -> int:
        """A limit for the answer, made as small as it has to be for the model to take it."""
        return tokens if self.possible_output_tokens is None else min(tokens, self.possible_output_tokens)

    def without_reasoning(self) -> GenerationRequest | None:
        """The same without what the model thought before; None where there is nothing of it."""
        messages = tuple(
            PromptMessage(message.role, tuple(p for p in message.content if not isinstance(p, PromptReasoning)))
            for message in self.messages
        )
        return None if messages == self.messages else replace(self, messages=messages)


class Provider(Protocol):
    """An adapter for one vendor or wire format. Owned and closed by the composition root."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Stream one answer.

        Raises:
            ProviderFailure: from the generator, before or after any number of events.
        """
        ...

    async def close(self) -> None:
        """Release connections; running streams fail."""
        ...
