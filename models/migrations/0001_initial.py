from uuid import uuid4

from orjson import loads
from tortoise import fields, migrations
from tortoise.fields.base import OnDelete
from tortoise.fields.data import JSON_DUMPS
from tortoise.fields.db_defaults import Now
from tortoise.indexes import Index
from tortoise.migrations import operations as ops
from tortoise.migrations.constraints import CheckConstraint, UniqueConstraint


class Migration(migrations.Migration):
    initial = True

    operations = [
        ops.CreateModel(
            name="User",
            fields=[
                ("id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                ("anonymous", fields.BooleanField()),
                ("issuer", fields.TextField(null=True, unique=False)),
                ("subject", fields.TextField(null=True, unique=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "users",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("issuer", "subject"), name="users_identity")],
                "pk_attr": "id",
                "table_description": "Somebody who owns rows: an anonymous session, or (by issuer and subject) a signed-in person.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Stream",
            fields=[
                ("message_id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                (
                    "owner",
                    fields.ForeignKeyField(
                        "threadgraph.User",
                        source_field="owner_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("holder", fields.UUIDField()),
                ("epoch", fields.IntField(db_default=1)),
                ("lease_expires_at", fields.DatetimeField(db_index=True, auto_now=False, auto_now_add=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "streams",
                "app": "threadgraph",
                "pk_attr": "message_id",
                "table_description": "An answer that is being written, by whom, and until when that is believed. Deleted by the end of the answer.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="StreamCheckpoint",
            fields=[
                ("id", fields.BigIntField(generated=True, primary_key=True, unique=True, db_index=True)),
                (
                    "stream",
                    fields.ForeignKeyField(
                        "threadgraph.Stream",
                        source_field="stream_id",
                        db_constraint=True,
                        to_field="message_id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("from_offset", fields.BigIntField()),
                ("parts", fields.JSONField(encoder=JSON_DUMPS, decoder=loads)),
            ],
            options={
                "table": "stream_checkpoints",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("stream_id", "from_offset"), name="stream_checkpoints_once")],
                "pk_attr": "id",
                "table_description": "What an answer grew by since the checkpoint before: parts from `from_offset` on. Folded in order by recovery.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Thread",
            fields=[
                ("id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                (
                    "owner",
                    fields.ForeignKeyField(
                        "threadgraph.User",
                        source_field="owner_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("title", fields.TextField(unique=False)),
                ("title_source", fields.CharField(max_length=5)),
                ("pinned", fields.BooleanField(db_default=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "threads",
                "app": "threadgraph",
                "constraints": [
                    CheckConstraint(check="title_source in ('TEXT', 'MODEL', 'USER')", name="threads_title_source")
                ],
                "indexes": [Index(fields=["owner_id", "pinned", "updated_at", "id"], name="threads_by_activity")],
                "pk_attr": "id",
                "table_description": "A conversation. `updated_at` is its last activity: a send, an end of an answer; not a rename or a pin.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Message",
            fields=[
                ("id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                (
                    "owner",
                    fields.ForeignKeyField(
                        "threadgraph.User",
                        source_field="owner_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                (
                    "thread",
                    fields.ForeignKeyField(
                        "threadgraph.Thread",
                        source_field="thread_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                (
                    "parent",
                    fields.ForeignKeyField(
                        "threadgraph.Message",
                        source_field="parent_id",
                        null=True,
                        db_index=True,
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("active_child_id", fields.UUIDField(null=True)),
                ("depth", fields.IntField()),
                ("active", fields.BooleanField()),
                ("role", fields.CharField(max_length=9)),
                ("status", fields.CharField(max_length=11)),
                ("parts", fields.JSONField(encoder=JSON_DUMPS, decoder=loads)),
                ("model", fields.TextField(null=True, unique=False)),
                ("error_code", fields.TextField(null=True, unique=False)),
                ("error_message", fields.TextField(null=True, unique=False)),
                ("error_retry_after", fields.IntField(null=True)),
                ("prompt_tokens", fields.IntField(null=True)),
                ("completion_tokens", fields.IntField(null=True)),
                ("reasoning_tokens", fields.IntField(null=True)),
                ("cached_tokens", fields.IntField(null=True)),
                ("tokens_estimated", fields.BooleanField(db_default=False)),
                ("duration_ms", fields.IntField(null=True)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "messages",
                "app": "threadgraph",
                "constraints": [
                    UniqueConstraint(fields=("thread_id", "depth"), name="messages_active_path", condition="active"),
                    UniqueConstraint(fields=("thread_id",), name="messages_one_live", condition="status = 'STREAMING'"),
                    CheckConstraint(check="role in ('USER', 'ASSISTANT', 'SYSTEM')", name="messages_role"),
                    CheckConstraint(
                        check="status in ('STREAMING', 'COMPLETE', 'STOPPED', 'FAILED', 'INTERRUPTED')",
                        name="messages_status",
                    ),
                ],
                "indexes": [Index(fields=["thread_id", "parent_id"], name="messages_siblings")],
                "pk_attr": "id",
                "table_description": "A node in a thread's message tree.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Turn",
            fields=[
                ("id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                (
                    "owner",
                    fields.ForeignKeyField(
                        "threadgraph.User",
                        source_field="owner_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("idempotency_key", fields.TextField(unique=False)),
                ("fingerprint", fields.BinaryField()),
                ("thread_id", fields.UUIDField(null=True, db_index=True)),
                ("user_message_id", fields.UUIDField(null=True, db_index=True)),
                ("assistant_message_id", fields.UUIDField(null=True, db_index=True)),
                (
                    "created_at",
                    fields.DatetimeField(db_index=True, db_default=Now(), auto_now=False, auto_now_add=False),
                ),
            ],
            options={
                "table": "turns",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("owner_id", "idempotency_key"), name="turns_once")],
                "pk_attr": "id",
                "table_description": "The result of a send, edit or retry, kept under its idempotency key.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="UsageEvent",
            fields=[
                ("id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                (
                    "owner",
                    fields.ForeignKeyField(
                        "threadgraph.User",
                        source_field="owner_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("message_id", fields.UUIDField()),
                ("kind", fields.CharField(max_length=6)),
                ("model", fields.TextField(unique=False)),
                ("status", fields.CharField(max_length=11)),
                ("prompt_tokens", fields.IntField()),
                ("completion_tokens", fields.IntField()),
                ("reasoning_tokens", fields.IntField()),
                ("cached_tokens", fields.IntField()),
                ("estimated", fields.BooleanField()),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "usage_events",
                "app": "threadgraph",
                "constraints": [
                    UniqueConstraint(fields=("message_id", "kind"), name="usage_events_once"),
                    CheckConstraint(check="kind in ('ANSWER', 'TITLE')", name="usage_events_kind"),
                ],
                "indexes": [Index(fields=["owner_id", "created_at"], name="usage_events_by_time")],
                "pk_attr": "id",
                "table_description": "What one finished generation consumed. Append-only; it outlives its message, because it was billed.",
            },
            bases=["Model"],
        ),
        # Tortoise 1.1 records Meta.constraints in its state but does not create them with the table.
        ops.RunSQL(
            """
            ALTER TABLE users ADD CONSTRAINT users_identity UNIQUE (issuer, subject);
            ALTER TABLE threads ADD CONSTRAINT threads_title_source
                CHECK (title_source in ('TEXT', 'MODEL', 'USER'));
            CREATE UNIQUE INDEX messages_active_path ON messages (thread_id, depth) WHERE active;
            CREATE UNIQUE INDEX messages_one_live ON messages (thread_id) WHERE status = 'STREAMING';
            ALTER TABLE messages
                ADD CONSTRAINT messages_role CHECK (role in ('USER', 'ASSISTANT', 'SYSTEM')),
                ADD CONSTRAINT messages_status
                    CHECK (status in ('STREAMING', 'COMPLETE', 'STOPPED', 'FAILED', 'INTERRUPTED'));
            ALTER TABLE streams
                ADD CONSTRAINT streams_message FOREIGN KEY (message_id) REFERENCES messages ON DELETE CASCADE;
            ALTER TABLE stream_checkpoints ADD CONSTRAINT stream_checkpoints_once UNIQUE (stream_id, from_offset);
            ALTER TABLE turns ADD CONSTRAINT turns_once UNIQUE (owner_id, idempotency_key);
            ALTER TABLE usage_events
                ADD CONSTRAINT usage_events_once UNIQUE (message_id, kind),
                ADD CONSTRAINT usage_events_kind CHECK (kind in ('ANSWER', 'TITLE'));
            -- The turn is written before what it names; checked at commit.
            ALTER TABLE turns
                ADD CONSTRAINT turns_thread FOREIGN KEY (thread_id) REFERENCES threads
                    ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
                ADD CONSTRAINT turns_user_message FOREIGN KEY (user_message_id) REFERENCES messages
                    ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
                ADD CONSTRAINT turns_assistant_message FOREIGN KEY (assistant_message_id) REFERENCES messages
                    ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED;
            """,
        ),
    ]
