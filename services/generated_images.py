"""Images that models make: looked at, stored as files of the answer's owner, and linked to the answer.

An image is a file like any other from its first byte on: it counts for its owner's quota, and what is stored but never
linked is swept. The link is written under the thread's lock, and only while the stream is held: nothing is added to an
answer that has ended, or belongs to another producer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from uuid import UUID

import asyncpg

from models.database import Database, DatabaseUnavailableError
from models.parts import FilePart
from models.records import MessageFailure
from services.attachments import Attachments, link_attachments, take_attachments
from services.errors import (
    BadUserInputError,
    CallerError,
    PayloadTooLargeError,
    QuotaExceededError,
)
from services.file_types import IMAGES, facts_of_beginning
from services.viewer import Viewer
from streams.ending import StreamHold

log = logging.getLogger(__name__)

_PIECE_BYTES = 256 * 1024
_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}

_NOT_KEPT = MessageFailure(
    "ATTACHMENT_UNAVAILABLE", "An image of the answer could not be kept, because the files cannot be written right now."
)
_NO_ROOM = MessageFailure(
    "ATTACHMENT_UNAVAILABLE", "An image of the answer could not be kept: it is too large, or your files are too many."
)
_NO_IMAGE = MessageFailure("PROVIDER_PROTOCOL", "The model sent an image that cannot be read. Retry.")

_LOCK_THREAD = "SELECT FROM threads WHERE id = $1 FOR UPDATE"
_IS_HELD = "SELECT EXISTS (SELECT FROM streams WHERE message_id = $1 AND epoch = $2)"


class ImageLostError(Exception):
    """An image cannot be kept; `failure` is what the answer ends with."""

    def __init__(self, failure: MessageFailure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class GeneratedImages:
    """Keeps the images of answers that are being written."""

    def __init__(self, database: Database, attachments: Attachments) -> None:
        self._database = database
        self._attachments = attachments

    async def keep(self, hold: StreamHold, data: bytes, *, number: int) -> FilePart:
        """Store an image as a file of the answer's owner, linked to the answer.

        Args:
            number: which of the answer's images it is; a part of its name.

        Raises:
            ImageLostError: it is none, or there is no room for it, or nothing can be stored.
        """
        try:
            found = facts_of_beginning(data).content_type
        except BadUserInputError as error:
            raise ImageLostError(_NO_IMAGE) from error
        if found not in IMAGES:
            raise ImageLostError(_NO_IMAGE)
        owner = Viewer(hold.owner_id, anonymous=False, expires_at=math.inf)
        try:
            record = await self._attachments.store(
                owner, _pieces(data), name=f"image-{number}.{_ENDINGS[found]}", size=len(data)
            )
            return await self._linked(hold, record.id)
        except (PayloadTooLargeError, QuotaExceededError) as error:
            raise ImageLostError(_NO_ROOM) from error
        except (CallerError, DatabaseUnavailableError, asyncpg.ForeignKeyViolationError) as error:
            log.warning("an image of an answer is lost: %s", type(error).__name__)
            raise ImageLostError(_NOT_KEPT) from error

    async def _linked(self, hold: StreamHold, attachment_id: UUID) -> FilePart:
        async with self._database.transaction() as connection:
            await connection.execute(_LOCK_THREAD, hold.thread_id)
            held = await connection.fetchval(_IS_HELD, hold.message_id, hold.epoch)
            parts = await take_attachments(connection, hold.owner_id, [attachment_id]) if held else []
            if not parts:
                raise ImageLostError(_NOT_KEPT)
            await link_attachments(connection, hold.message_id, parts)
        return parts[0]


async def _pieces(data: bytes) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(data), _PIECE_BYTES):
        yield data[at : at + _PIECE_BYTES]
