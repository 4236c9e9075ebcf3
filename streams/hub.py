"""Which answers are being written in this process: one shared buffer each, found by message id."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from uuid import UUID

from streams.buffer import StreamBuffer


class Hub:
    """The live buffers of one process."""

    def __init__(self) -> None:
        self._buffers: dict[UUID, StreamBuffer] = {}
        # For metrics: of answers that have ended.
        self._past_appends = 0
        self._past_characters = 0

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[StreamBuffer]:
        return iter(list(self._buffers.values()))

    def open(self, message_id: UUID, owner_id: UUID, attempt: int = 1) -> StreamBuffer:
        """What an answer is written into, in this attempt to write it.

        Open it before the message can be seen by anyone, or an early reader would miss it.
        """
        assert message_id not in self._buffers, "a message is produced once"
        buffer = self._buffers[message_id] = StreamBuffer(message_id, owner_id, attempt)
        return buffer

    def get(self, message_id: UUID) -> StreamBuffer | None:
        """The buffer of an answer that is written here now."""
        return self._buffers.get(message_id)

    def writes(self, message_id: UUID) -> bool:
        """Whether an answer is being written by this process."""
        return message_id in self._buffers

    def written_length(self, message_id: UUID) -> int | None:
        """How much of an answer this process has written, shown or not yet; None where it does not write it."""
        written = self._written(message_id)
        return None if written is None else written.length

    async def follow(self, message_id: UUID) -> StreamBuffer | None:
        """The buffer of an answer that is written by another process; None where none can be, or none does."""
        return self.get(message_id)

    def remove(self, message_id: UUID) -> None:
        """Forget an answer that has ended and is stored; readers keep its buffer until they are through."""
        if (written := self._written(message_id)) is not None:
            self._past_appends += written.appends
            self._past_characters += written.length
        self._buffers.pop(message_id, None)

    def discard(self, message_id: UUID) -> None:
        """Forget an answer that was not begun: opened for a message that is not there, or is somebody else's."""
        self._buffers.pop(message_id, None)

    @property
    def out_of_reach_seconds(self) -> float:
        """For how long what readers need has not answered; there is nothing that could not, where nothing is shared."""
        return 0.0

    @property
    def read_here(self) -> Collection[StreamBuffer]:
        """The buffers that readers of this process read."""
        return self._buffers.values()

    @property
    def written_here(self) -> Collection[StreamBuffer]:
        """What the producers of this process append to."""
        return self._buffers.values()

    @property
    def appended(self) -> tuple[int, int]:
        """How many pieces, and characters, the producers of this process have appended since it started."""
        live = self.written_here
        return (
            self._past_appends + sum(buffer.appends for buffer in live),
            self._past_characters + sum(buffer.length for buffer in live),
        )

    def _written(self, message_id: UUID) -> StreamBuffer | None:
        return self._buffers.get(message_id)
