"""Which answers are being written in this process: one shared buffer each, found by message id."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from streams.buffer import StreamBuffer


class Hub:
    """The live buffers of one process."""

    def __init__(self) -> None:
        self._buffers: dict[UUID, StreamBuffer] = {}

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[StreamBuffer]:
        return iter(list(self._buffers.values()))

    def open(self, message_id: UUID, owner_id: UUID, attempt: int = 1) -> StreamBuffer:
        """What an answer is written into, in this attempt to write it.

        Open it before the message can be seen by anyone, or an early reader would miss it.
        """
        assert message_id not in self._buffers, "a message is produced once"
        buffer = self._buffers[message_id] = StreamBuffer(message_id, owner_id)
        return buffer

    def get(self, message_id: UUID) -> StreamBuffer | None:
        """The buffer of an answer that is written here now."""
        return self._buffers.get(message_id)

    def writes(self, message_id: UUID) -> bool:
        """Whether an answer is being written by this process."""
        return message_id in self._buffers

    async def follow(self, message_id: UUID) -> StreamBuffer | None:
        """The buffer of an answer that is written by another process; None where none can be, or none does."""
        return self.get(message_id)

    def remove(self, message_id: UUID) -> None:
        """Forget an answer that has ended and is stored; readers keep its buffer until they are through."""
        self._buffers.pop(message_id, None)
