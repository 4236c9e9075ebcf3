"""How errors leave the server, the same over every transport.

A failure the caller caused carries its code. Whatever else was raised is shown as INTERNAL_SERVER_ERROR with an id, and
the log line with the same id carries the rest: no exception text, SQL or stack reaches a client.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any

from graphql import GraphQLError, GraphQLSyntaxError
from strawberry.schema.exceptions import CannotGetOperationTypeError

from models.database import DatabaseUnavailableError
from services.errors import BudgetExceededError, CallerError, ErrorCode, UnavailableError

log = logging.getLogger(__name__)

MAX_ERRORS = 50
_MAX_MESSAGE_CHARS = 400


def format_errors(errors: list[GraphQLError]) -> list[dict[str, Any]]:
    """The errors of a response, at most 50 of them."""
    return [format_error(error) for error in errors[:MAX_ERRORS]]


def format_error(error: GraphQLError) -> dict[str, Any]:
    """One error as the GraphQL specification (section 7.1.2) has it, with `extensions.code`."""
    shown: dict[str, Any] = {"message": _bounded(_without_values(error.message))}
    if error.locations:
        shown["locations"] = [{"line": place.line, "column": place.column} for place in error.locations]
    if error.path is not None:
        shown["path"] = error.path
    cause = _cause(error)
    if isinstance(cause, CannotGetOperationTypeError):
        shown["extensions"] = {"code": ErrorCode.GRAPHQL_VALIDATION_FAILED.value}
        return shown
    if isinstance(cause, DatabaseUnavailableError):
        cause = UnavailableError()
    if isinstance(cause, CallerError):
        shown["message"] = cause.message
        shown["extensions"] = caller_extensions(cause)
    elif cause is not None:
        error_id = secrets.token_hex(8)
        log.error("error %s at %s", error_id, error.path, exc_info=cause)
        shown["message"] = f"Something went wrong on the server (error {error_id})."
        shown["extensions"] = {"code": ErrorCode.INTERNAL_SERVER_ERROR.value, "errorId": error_id}
    else:
        shown["extensions"] = {"code": _request_error_code(error)}
    return shown


def code_error(code: ErrorCode, message: str) -> GraphQLError:
    """An error about the request as a whole."""
    return GraphQLError(message, extensions={"code": code.value})


# What graphql-core repeats of what it refuses: a value of a variable or in the document, or a token of it.
_REPEATED = (
    (re.compile(r"(?<=\?) Found: .*", re.DOTALL), ""),
    (re.compile(r"[.,;]? [Ff]ound: .*", re.DOTALL), "."),
    (re.compile(r"( cannot represent [^:]*): .*", re.DOTALL), r"\1."),
    (re.compile(r"\bValue '.*' does not exist in (?='\w+' enum)", re.DOTALL), "The value does not exist in "),
    (re.compile(r"\b(Name|Int|Float|String|BlockString) '.*", re.DOTALL), r"\1."),
)


def _without_values(message: str) -> str:
    """A message of graphql-core that repeats no value: it may be a user's key, or all of an input with one in it."""
    for pattern, replacement in _REPEATED:
        message = pattern.sub(replacement, message)
    return message


def _bounded(message: str) -> str:
    """Names, which are repeated, may be long."""
    return message if len(message) <= _MAX_MESSAGE_CHARS else message[: _MAX_MESSAGE_CHARS - 1] + "…"


def _cause(error: GraphQLError) -> BaseException | None:
    cause = error.original_error
    while isinstance(cause, GraphQLError):
        cause = cause.original_error
    return cause


def caller_extensions(cause: CallerError) -> dict[str, Any]:
    """`extensions` of a failure that the caller caused."""
    extensions: dict[str, Any] = {"code": cause.code.value}
    if cause.field is not None:
        extensions["field"] = cause.field
    if cause.retry_after is not None:
        extensions["retryAfter"] = cause.retry_after
    if isinstance(cause, BudgetExceededError):
        extensions["resetsAt"] = cause.resets_at.isoformat()
    return extensions


def _request_error_code(error: GraphQLError) -> str:
    if isinstance(error, GraphQLSyntaxError):
        return ErrorCode.GRAPHQL_PARSE_FAILED.value
    if error.extensions and "code" in error.extensions:
        return str(error.extensions["code"])
    # What graphql-core refuses while it executes, without an exception of ours behind it: values of variables.
    return ErrorCode.BAD_USER_INPUT.value
