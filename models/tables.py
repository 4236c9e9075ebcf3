"""The tables. Columns and constraints are here; the queries live with the services that own them.

Every row that a user can reach carries its owner. Keys are UUIDv7. Times are set by the database's clock, so that
leases and orders do not depend on a server's. Parts of the schema that Tortoise cannot express (deferred foreign keys)
are in the migrations and named in the docstring of their table.
"""

from __future__ import annotations

from typing import Any

from tortoise import fields
from tortoise.fields.db_defaults import Now
from tortoise.indexes import Index
from tortoise.migrations.constraints import CheckConstraint, UniqueConstraint
from tortoise.models import Model


class User(Model):
    """Somebody who owns rows: an anonymous session, or (by issuer and subject) a signed-in person."""

    id = fields.UUIDField(primary_key=True)
    anonymous = fields.BooleanField()
    issuer = fields.TextField(null=True)
    subject = fields.TextField(null=True)
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "users"
        constraints = (UniqueConstraint(fields=("issuer", "subject"), name="users_identity"),)


class Thread(Model):
    """A conversation. `updated_at` is its last activity: a send, an end of an answer; not a rename or a pin."""

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    title = fields.TextField()
    title_source = fields.CharField(max_length=5)
    pinned = fields.BooleanField(db_default=False)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "threads"
        # Serves the order of the list (pinned, then last activity) and its keyset, forwards and backwards.
        indexes = (Index(fields=("owner_id", "pinned", "updated_at", "id"), name="threads_by_activity"),)
        constraints = (CheckConstraint(check="title_source in ('TEXT', 'MODEL', 'USER')", name="threads_title_source"),)


class Message(Model):
    """A node in a thread's message tree.

    The *active path* runs from a root to the thread's active leaf: its messages have `active` set, and the unique
    index on (thread, depth) of active messages makes two active siblings impossible. `active_child_id` remembers which
    child was on the path last, so that selecting a branch again finds the leaf that was left.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE
    )
    thread: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Thread", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    parent: fields.ForeignKeyNullableRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Message", related_name=False, on_delete=fields.CASCADE, null=True, db_index=True
    )
    active_child_id = fields.UUIDField(null=True)
    depth = fields.IntField()
    active = fields.BooleanField()
    role = fields.CharField(max_length=9)
    status = fields.CharField(max_length=11)
    parts: fields.JSONField[list[dict[str, object]]] = fields.JSONField()
    model = fields.TextField(null=True)
    error_code = fields.TextField(null=True)
    error_message = fields.TextField(null=True)
    error_retry_after = fields.IntField(null=True)
    prompt_tokens = fields.IntField(null=True)
    completion_tokens = fields.IntField(null=True)
    reasoning_tokens = fields.IntField(null=True)
    cached_tokens = fields.IntField(null=True)
    tokens_estimated = fields.BooleanField(db_default=False)
    duration_ms = fields.IntField(null=True)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "messages"
        indexes = (Index(fields=("thread_id", "parent_id"), name="messages_siblings"),)
        constraints = (
            UniqueConstraint(fields=("thread_id", "depth"), name="messages_active_path", condition="active"),
            UniqueConstraint(fields=("thread_id",), name="messages_one_live", condition="status = 'STREAMING'"),
            CheckConstraint(check="role in ('USER', 'ASSISTANT', 'SYSTEM')", name="messages_role"),
            CheckConstraint(
                check="status in ('STREAMING', 'COMPLETE', 'STOPPED', 'FAILED', 'INTERRUPTED')", name="messages_status"
            ),
        )


class Stream(Model):
    """An answer that is being written, by whom, and until when that is believed. Deleted by the end of the answer.

    `epoch` fences: it is raised whenever somebody else takes the stream over, and every write of a producer names the
    epoch it holds.
    """

    # A foreign key all the same (see the migrations): Tortoise 1.1 cannot migrate one that is the primary key too.
    message_id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    holder = fields.UUIDField()
    epoch = fields.IntField(db_default=1)
    lease_expires_at = fields.DatetimeField(db_index=True)
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "streams"


class StreamCheckpoint(Model):
    """What an answer grew by since the checkpoint before: parts from `from_offset` on. Folded in order by recovery."""

    id = fields.BigIntField(primary_key=True, generated=True)
    stream: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Stream", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    from_offset = fields.BigIntField()
    parts: fields.JSONField[list[dict[str, object]]] = fields.JSONField()

    class Meta:
        table = "stream_checkpoints"
        constraints = (UniqueConstraint(fields=("stream_id", "from_offset"), name="stream_checkpoints_once"),)


class Turn(Model):
    """The result of a send, edit or retry, kept under its idempotency key.

    The three ids are foreign keys checked at commit (see the migrations), because the row is written first: it is what
    makes twenty equal requests wait for one. They become null when the thread is deleted; the row stays, so that a late
    repeat is told so instead of sending again.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    idempotency_key = fields.TextField()
    fingerprint = fields.BinaryField()
    thread_id = fields.UUIDField(null=True, db_index=True)
    user_message_id = fields.UUIDField(null=True, db_index=True)
    assistant_message_id = fields.UUIDField(null=True, db_index=True)
    created_at = fields.DatetimeField(db_default=Now(), db_index=True)

    class Meta:
        table = "turns"
        constraints = (UniqueConstraint(fields=("owner_id", "idempotency_key"), name="turns_once"),)


class UsageEvent(Model):
    """What one finished generation consumed. Append-only; it outlives its message, because it was billed."""

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    message_id = fields.UUIDField()
    kind = fields.CharField(max_length=6)
    model = fields.TextField()
    status = fields.CharField(max_length=11)
    prompt_tokens = fields.IntField()
    completion_tokens = fields.IntField()
    reasoning_tokens = fields.IntField()
    cached_tokens = fields.IntField()
    estimated = fields.BooleanField()
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "usage_events"
        indexes = (Index(fields=("owner_id", "created_at"), name="usage_events_by_time"),)
        constraints = (
            UniqueConstraint(fields=("message_id", "kind"), name="usage_events_once"),
            CheckConstraint(check="kind in ('ANSWER', 'TITLE')", name="usage_events_kind"),
        )
