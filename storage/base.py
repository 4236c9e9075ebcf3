"""What both storages do: keep bytes under a key, and hand out links that expire.

Keys are made by `new_key` alone: random, so that nothing a user names ever becomes a part of a path. Every wait ends by
a deadline, and every failure is a `StorageError`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Protocol

_KEY = re.compile(r"[0-9a-f]{32}", re.ASCII)


class StorageError(Exception):
    """The storage did not do what was asked."""


class NoSuchKeyError(StorageError):
    """There are no bytes under this key."""


class TooManyBytesError(StorageError):
    """More bytes came than were allowed; none are kept."""


class StorageFullError(StorageError):
    """There is no room."""


class StorageUnavailableError(StorageError):
    """It cannot be reached, or does not work; trying again later may help."""


def new_key() -> str:
    """A key that nobody can guess and nothing has yet."""
    return secrets.token_hex(16)


def checked_key(key: str) -> str:
    """The key, if it is one of ours.

    Raises:
        ValueError: it is not; a defect, because no key comes from outside unsigned.
    """
    if _KEY.fullmatch(key) is None:
        raise ValueError("not a storage key")
    return key


async def bounded(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The chunks, as long as they are no more than this.

    Raises:
        TooManyBytesError: they are more.
    """
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise TooManyBytesError
        yield chunk


class Storage(Protocol):
    """A place for bytes. Made and closed by the composition root."""

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        """Store what comes, all of it or nothing, without ever holding the whole; its size.

        Raises:
            TooManyBytesError, StorageFullError, StorageUnavailableError: nothing is stored.
        """
        ...

    def read(self, key: str) -> AsyncGenerator[bytes, None]:
        """The bytes in pieces; close the generator to read no further.

        Raises:
            NoSuchKeyError, StorageUnavailableError: from the generator.
        """
        ...

    async def size(self, key: str) -> int | None:
        """How many bytes there are; None where there is nothing."""
        ...

    async def copy(self, source: str, target: str) -> None:
        """Give the bytes of `source` a second key. What is written to `source` later does not change `target`.

        Raises:
            NoSuchKeyError: there is nothing to copy.
        """
        ...

    async def delete(self, key: str) -> None:
        """Delete the bytes, also those of a write that was broken off. That there are none is no error."""
        ...

    async def signed_get(self, key: str, *, content_type: str, disposition: str, seconds: int) -> str:
        """A link that anyone may read the bytes with for so long, served with this type and disposition."""
        ...

    async def signed_put(self, key: str, *, content_type: str, size: int, seconds: int) -> str:
        """A link that anyone may write the bytes with for so long: exactly so many, under this type."""
        ...

    async def close(self) -> None:
        """Let threads and connections go."""
        ...
