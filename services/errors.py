"""The failures a caller can cause.

CallerError
├── UnauthenticatedError     no token, or one that is not valid (any more)
├── ForbiddenError           the operator does not allow it, or not to an anonymous session
├── NotFoundError            missing, or somebody else's: the two look the same
├── BadUserInputError        a value that cannot be accepted, with its field
│   ├── PayloadTooLargeError
│   └── ImportRefusedError   a file to import is not what it should be: which member, which line
├── QuotaExceededError       no room is left in the viewer's share of the storage
├── ConflictError            the idempotency key was used for something else
├── ThreadBusyError          an answer is being written in this thread
├── ModelUnavailableError    no such model, or none at all
├── ProviderKeyMissingError  the model is known, but no key leads this viewer to it
├── BudgetExceededError      the user has consumed what the operator allows for now
├── CursorInvalidError       not a cursor of this list or stream
│   ├── CursorMismatchError  a cursor of another stream
│   └── CursorAheadError     a position that does not exist yet
└── UnavailableError         a part of the server is out of reach; retry

Everything else that reaches the edge is a defect and is shown as INTERNAL_SERVER_ERROR with an id.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from math import ceil


class ErrorCode(StrEnum):
    """The documented values of `extensions.code`."""

    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    BAD_USER_INPUT = "BAD_USER_INPUT"
    CONFLICT = "CONFLICT"
    THREAD_BUSY = "THREAD_BUSY"
    MODEL_UNAVAILABLE = "MODEL_UNAVAILABLE"
    PROVIDER_KEY_MISSING = "PROVIDER_KEY_MISSING"
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"
    CURSOR_INVALID = "CURSOR_INVALID"
    CURSOR_MISMATCH = "CURSOR_MISMATCH"
    CURSOR_AHEAD = "CURSOR_AHEAD"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    RATE_LIMITED = "RATE_LIMITED"
    UNAVAILABLE = "UNAVAILABLE"
    GRAPHQL_PARSE_FAILED = "GRAPHQL_PARSE_FAILED"
    GRAPHQL_VALIDATION_FAILED = "GRAPHQL_VALIDATION_FAILED"
    QUERY_TOO_COMPLEX = "QUERY_TOO_COMPLEX"
    INTERNAL_SERVER_ERROR = "INTERNAL_SERVER_ERROR"


class CallerError(Exception):
    """A failure that the caller caused or can act on.

    Args:
        message: one sentence, for people; safe to show.
        field: the input that is at fault, as the API spells it.
        retry_after: seconds after which trying again makes sense.
    """

    code: ErrorCode

    def __init__(self, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after


class UnauthenticatedError(CallerError):
    """No token, or one that is not valid."""

    code = ErrorCode.UNAUTHENTICATED

    def __init__(self, message: str = "Sign in: this needs a valid token in the Authorization header.") -> None:
        super().__init__(message)


class ForbiddenError(CallerError):
    """Not allowed by the operator's settings, or not to an anonymous session."""

    code = ErrorCode.FORBIDDEN


class NotFoundError(CallerError):
    """Nothing of this id that the viewer owns."""

    code = ErrorCode.NOT_FOUND

    def __init__(self, noun: str, *, field: str | None = None) -> None:
        super().__init__(f"There is no such {noun}.", field=field)


class BadUserInputError(CallerError):
    """A value that cannot be accepted."""

    code = ErrorCode.BAD_USER_INPUT


class PayloadTooLargeError(BadUserInputError):
    """A value that is longer than the limit."""

    code = ErrorCode.PAYLOAD_TOO_LARGE


class ImportRefusedError(BadUserInputError):
    """A file to import is not what it should be. Nothing of it was taken.

    Args:
        message: what is wrong, without the place.
        member: the member of the zip; None: the file as a whole.
        line: counted from 1; None: the member as a whole.
    """

    def __init__(self, message: str, *, member: str | None = None, line: int | None = None) -> None:
        place = "" if member is None else f"{member}: " if line is None else f"{member}, line {line}: "
        super().__init__(place + message, field=member)
        self.line = line


class RateLimitedError(CallerError):
    """Too much in a short time, from one place or from all of them."""

    code = ErrorCode.RATE_LIMITED


class QuotaExceededError(CallerError):
    """The viewer's files may not take more room than they do."""

    code = ErrorCode.QUOTA_EXCEEDED


class ConflictError(CallerError):
    """The request contradicts what is stored."""

    code = ErrorCode.CONFLICT


class ThreadBusyError(CallerError):
    """A thread takes one generation at a time."""

    code = ErrorCode.THREAD_BUSY

    def __init__(self) -> None:
        super().__init__("An answer is being written in this thread; wait for its end or stop it.", retry_after=1)


class ModelUnavailableError(CallerError):
    """The model is not offered to this viewer."""

    code = ErrorCode.MODEL_UNAVAILABLE

    def __init__(
        self, message: str = "This model is not available; `models` lists those that are.", *, field: str | None
    ) -> None:
        super().__init__(message, field=field)


class ProviderKeyMissingError(CallerError):
    """The model is known, but no key that can be used leads this viewer to it."""

    code = ErrorCode.PROVIDER_KEY_MISSING

    def __init__(self, message: str, *, field: str | None) -> None:
        super().__init__(message, field=field)


class BudgetExceededError(CallerError):
    """The user's budget leaves no room for an answer.

    Args:
        resets_at: when the period is over whose budget it is.
        now: the time by the clock that `resets_at` is of.
    """

    code = ErrorCode.BUDGET_EXCEEDED

    def __init__(self, resets_at: datetime, *, now: datetime) -> None:
        super().__init__(
            "Your budget leaves no room for this question and an answer; it is renewed at "
            f"{resets_at:%Y-%m-%d %H:%M} UTC.",
            retry_after=ceil((resets_at - now).total_seconds()),
        )
        self.resets_at = resets_at


class CursorInvalidError(CallerError):
    """Not a cursor of what it was sent to."""

    code = ErrorCode.CURSOR_INVALID


class CursorMismatchError(CursorInvalidError):
    """A cursor of another message's stream."""

    code = ErrorCode.CURSOR_MISMATCH


class CursorAheadError(CursorInvalidError):
    """A cursor of a position that does not exist."""

    code = ErrorCode.CURSOR_AHEAD


class UnavailableError(CallerError):
    """A part of the server cannot be reached; nothing is known to be changed."""

    code = ErrorCode.UNAVAILABLE

    def __init__(self, message: str = "The server cannot do this right now; try again.", retry_after: int = 1) -> None:
        super().__init__(message, retry_after=retry_after)
