"""Scalars of the schema and how ids cross it."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass
from typing import Any, NewType
from uuid import UUID

import strawberry
from graphql import GraphQLError
from strawberry.types.scalar import ScalarDefinition

from models.ids import IdKind, MalformedIdError, parse_id
from services.errors import BadUserInputError

INPUT = strawberry.argument(description="What is asked for.")
"""The one argument of a mutation."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file of a multipart request, which comes while it is read."""

    name: str
    content_type: str | None
    chunks: AsyncIterable[bytes]


Cursor = NewType("Cursor", str)
Upload = NewType("Upload", UploadedFile)
JSON = NewType("JSON", object)
BigInt = NewType("BigInt", int)


def _cursor(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("Cursor must be a string")
    return value


def _big_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise TypeError("BigInt must be a whole number of 64 bits")
    return value


def _upload(value: Any) -> UploadedFile:
    if not isinstance(value, UploadedFile):
        raise GraphQLError("Upload must be a file of a multipart request")
    return value


def _never(_: Any) -> None:
    raise TypeError("Upload is for inputs only")


SCALARS: dict[object, ScalarDefinition] = {
    Cursor: strawberry.scalar(
        name="Cursor",
        description="An opaque position in a connection or a stream. Keep it and send it back as it came.",
        serialize=str,
        parse_value=_cursor,
    ),
    Upload: strawberry.scalar(
        name="Upload",
        description="A file of a multipart request (graphql-multipart-request-spec), one for an operation. Such a "
        "request needs the header GraphQL-Preflight or Apollo-Require-Preflight, with any value.",
        serialize=_never,
        parse_value=_upload,
    ),
    JSON: strawberry.scalar(
        name="JSON",
        description="Any JSON value.",
        serialize=lambda value: value,
        parse_value=lambda value: value,
    ),
    BigInt: strawberry.scalar(
        name="BigInt",
        description="A whole number of up to 64 bits, as a JSON number. JavaScript holds it exactly up to 2^53, which "
        "is more tokens than a person comes by.",
        serialize=_big_int,
        parse_value=_big_int,
    ),
}


def key_of(kind: IdKind, text: str, *, field: str) -> UUID:
    """The key behind an id argument.

    Raises:
        BadUserInputError: the text is not an id of this kind.
    """
    try:
        return parse_id(kind, text)
    except MalformedIdError as error:
        raise BadUserInputError(f"This is not the id of a {kind.value}.", field=field) from error
