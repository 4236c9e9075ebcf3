"""The tables. Columns and constraints are here; the queries live with the services that own them.

Every row that a user can reach carries its owner. Keys are UUIDv7. Times are set by the database's clock, so that
leases and orders do not depend on a server's. Parts of the schema that Tortoise cannot express (deferred foreign keys)
are in the migrations and named in the docstring of their table.
"""

from __future__ import annotations

from typing import Any

from tortoise import fields
from tortoise.contrib.postgres.fields import ArrayField, TSVectorField
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
    # From then on the account is being deleted, in batches: nothing of it is shown or written any more.
    deleted_at = fields.DatetimeField(null=True)
    # The last change of the viewer's feed that is not kept any more.
    changes_purged_to = fields.BigIntField(db_default=0)

    class Meta:
        table = "users"
        constraints = (UniqueConstraint(fields=("issuer", "subject"), name="users_identity"),)


class Project(Model):
    """A folder of threads, with what turns in it are told and asked of.

    `thread_count` counts the threads in it that are neither archived nor temporary; the trigger `threads_count` keeps
    it in the transaction of every change, whoever makes it.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    name = fields.TextField()
    description = fields.TextField(null=True)
    color = fields.TextField(null=True)
    icon = fields.TextField(null=True)
    prompt = fields.TextField(null=True)
    default_model = fields.TextField(null=True)
    archived = fields.BooleanField(db_default=False)
    thread_count = fields.IntField(db_default=0)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "projects"
        # Serves the order of the list (newest first) and its keyset.
        indexes = (Index(fields=("owner_id", "id"), name="projects_by_age"),)


class Thread(Model):
    """A conversation. `updated_at` is its last activity: a send, an end of an answer; not a rename or a pin.

    A temporary thread is in no list, no search and no count, and is deleted at `expires_at`; others may have an
    `expires_at` too.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    title = fields.TextField()
    title_source = fields.CharField(max_length=5)
    pinned = fields.BooleanField(db_default=False)
    archived = fields.BooleanField(db_default=False)
    temporary = fields.BooleanField(db_default=False)
    project: fields.ForeignKeyNullableRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Project", related_name=False, on_delete=fields.SET_NULL, null=True, db_index=False
    )
    expires_at = fields.DatetimeField(null=True)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "threads"
        # The first two each serve the order of a list (pinned, then last activity) and its keyset, forwards and
        # backwards; the third the sweep of retention. In the migrations, because it is partial: threads_expiring.
        indexes = (
            Index(fields=("owner_id", "archived", "temporary", "pinned", "updated_at", "id"), name="threads_listed"),
            Index(
                fields=("project_id", "archived", "temporary", "pinned", "updated_at", "id"),
                name="threads_of_project",
            ),
            Index(fields=("updated_at",), name="threads_by_activity"),
        )
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
    # Of an answer: which attempt to write it this is. It grows where a server was lost before anything had come.
    attempt = fields.SmallIntField(db_default=1)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "messages"
        indexes = (
            Index(fields=("thread_id", "depth"), name="messages_by_depth"),
            Index(fields=("owner_id",), name="messages_of_owner"),
        )
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
    # What the turn may consume at most, held against its owner's budget until it ends.
    reserved_tokens = fields.BigIntField(db_default=0)
    reserved_cost_micros = fields.BigIntField(db_default=0)
    # What its model was asked with, so that another server can ask again.
    reasoning_effort = fields.TextField(null=True)
    answer_tokens = fields.BigIntField(null=True)
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
    """What one finished generation consumed. Append-only; it outlives its message, because it was billed.

    `thread_id` is null for a temporary thread's: nothing but the totals remembers it. Prices are a snapshot, in
    millionths of the currency for a million tokens; `cost_micros` is null where they were not known.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    message_id = fields.UUIDField()
    thread_id = fields.UUIDField(null=True)
    kind = fields.CharField(max_length=6)
    model = fields.TextField()
    status = fields.CharField(max_length=11)
    prompt_tokens = fields.IntField()
    completion_tokens = fields.IntField()
    reasoning_tokens = fields.IntField()
    cached_tokens = fields.IntField()
    estimated = fields.BooleanField()
    prompt_price = fields.BigIntField(null=True)
    cached_price = fields.BigIntField(null=True)
    completion_price = fields.BigIntField(null=True)
    cost_micros = fields.BigIntField(null=True)
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "usage_events"
        indexes = (
            Index(fields=("owner_id", "created_at"), name="usage_events_by_time"),
            Index(fields=("thread_id",), name="usage_events_of_thread"),
        )
        constraints = (
            UniqueConstraint(fields=("message_id", "kind"), name="usage_events_once"),
            CheckConstraint(check="kind in ('ANSWER', 'TITLE')", name="usage_events_kind"),
        )


class UsageQuarter(Model):
    """Usage events of one user and model, summed up by quarters of an hour (UTC): every zone's hours begin at one.

    The trigger `usage_events_roll_up` keeps it in the transaction of the event. The index of its constraint includes
    the sums (see the migrations), so that a report reads no row.
    """

    id = fields.BigIntField(primary_key=True, generated=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    began_at = fields.DatetimeField()
    model = fields.TextField()
    requests = fields.BigIntField()
    prompt_tokens = fields.BigIntField()
    completion_tokens = fields.BigIntField()
    reasoning_tokens = fields.BigIntField()
    cached_tokens = fields.BigIntField()
    priced_requests = fields.BigIntField()
    cost_micros = fields.BigIntField()

    class Meta:
        table = "usage_quarters"
        constraints = (UniqueConstraint(fields=("owner_id", "began_at", "model"), name="usage_quarters_once"),)


class Share(Model):
    """A thread's active path as it was when it was shared, for whoever has the token."""

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    thread: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Thread", related_name=False, on_delete=fields.CASCADE, db_index=True
    )
    token = fields.TextField()
    title = fields.TextField()
    includes_attachments = fields.BooleanField()
    expires_at = fields.DatetimeField(null=True)
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "shares"
        indexes = (Index(fields=("owner_id", "id"), name="shares_by_age"),)
        constraints = (UniqueConstraint(fields=("token",), name="shares_token"),)


class ShareMessage(Model):
    """A message of a share: a copy, with nothing in it that leads back to the thread."""

    id = fields.BigIntField(primary_key=True, generated=True)
    share: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Share", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    position = fields.IntField()
    role = fields.CharField(max_length=9)
    status = fields.CharField(max_length=11)
    parts: fields.JSONField[list[dict[str, object]]] = fields.JSONField()
    model = fields.TextField(null=True)
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "share_messages"
        constraints = (
            UniqueConstraint(fields=("share_id", "position"), name="share_messages_once"),
            CheckConstraint(check="role in ('USER', 'ASSISTANT', 'SYSTEM')", name="share_messages_role"),
        )


class Blob(Model):
    """Stored bytes. Nobody's: what refers to it has an owner, and the sweeper deletes it with the last of those.

    A row is written when its bytes are there, and gone before they are (`SweepTask`).
    """

    id = fields.UUIDField(primary_key=True)
    key = fields.TextField()
    size = fields.BigIntField()
    sha256 = fields.BinaryField()
    content_type = fields.TextField()
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "blobs"
        constraints = (UniqueConstraint(fields=("key",), name="blobs_key"),)


class Attachment(Model):
    """A user's file: reserved before its bytes are there, stored, and linked once a message refers to it.

    Of a reservation `size` is what it may be at most and `upload_key` where its bytes go; a file that came by a link
    keeps it, and a reservation without one stands for a link whose attachment was deleted. `expires_at` is when a
    reservation, or a file that no message ever referred to, is swept. The trigger `attachments_gone` has the sweeper
    look at the blob.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    blob: fields.ForeignKeyNullableRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Blob", related_name=False, on_delete=fields.NO_ACTION, null=True, db_index=True
    )
    state = fields.CharField(max_length=8)
    name = fields.TextField()
    content_type = fields.TextField()
    size = fields.BigIntField()
    tokens = fields.IntField(null=True)
    pages = fields.IntField(null=True)
    width = fields.IntField(null=True)
    height = fields.IntField(null=True)
    upload_key = fields.TextField(null=True)
    expires_at = fields.DatetimeField(null=True)
    created_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "attachments"
        # Serves the order of the list (newest first), its keyset, and the sum that the quota is about.
        indexes = (Index(fields=("owner_id", "id"), name="attachments_by_age"),)
        constraints = (
            CheckConstraint(check="state in ('RESERVED', 'STORED', 'LINKED')", name="attachments_state"),
            CheckConstraint(check="(blob_id is null) = (state = 'RESERVED')", name="attachments_blob"),
        )


class AttachmentLink(Model):
    """A message refers to an attachment of the same owner. The trigger `attachment_links_gone` tells the sweeper."""

    id = fields.BigIntField(primary_key=True, generated=True)
    attachment: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Attachment", related_name=False, on_delete=fields.CASCADE, db_index=True
    )
    message: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Message", related_name=False, on_delete=fields.CASCADE, db_index=False
    )

    class Meta:
        table = "attachment_links"
        constraints = (UniqueConstraint(fields=("message_id", "attachment_id"), name="attachment_links_once"),)


class ShareAttachment(Model):
    """A file of a share: a reference of its own to the bytes, ended by the trigger `share_attachments_gone`."""

    id = fields.BigIntField(primary_key=True, generated=True)
    share: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Share", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    position = fields.IntField()
    blob: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Blob", related_name=False, on_delete=fields.NO_ACTION, db_index=True
    )
    name = fields.TextField()
    content_type = fields.TextField()
    size = fields.BigIntField()
    width = fields.IntField(null=True)
    height = fields.IntField(null=True)

    class Meta:
        table = "share_attachments"
        constraints = (UniqueConstraint(fields=("share_id", "position"), name="share_attachments_once"),)


class SweepTask(Model):
    """What the sweeper is to look at, from when on.

    ATTACHMENT and BLOB (the subject is an id): a reference went or a time came; delete the row if it was the last. KEY
    (of the storage): delete its bytes. That one is written before any bytes are, and goes in the transaction that
    writes the blob's row; so whenever a server dies, bytes have a row of either kind. `taken`: their deletion has
    begun, the row can not be had any more.
    """

    id = fields.BigIntField(primary_key=True, generated=True)
    kind = fields.CharField(max_length=10)
    subject = fields.TextField()
    taken = fields.BooleanField(db_default=False)
    due_at = fields.DatetimeField(db_default=Now(), db_index=True)

    class Meta:
        table = "sweep_tasks"
        indexes = (Index(fields=("subject",), name="sweep_tasks_of_subject"),)
        constraints = (CheckConstraint(check="kind in ('ATTACHMENT', 'BLOB', 'KEY')", name="sweep_tasks_kind"),)


class Setting(Model):
    """What a user chose; one row a user, made by the first choice."""

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    default_model = fields.TextField(null=True)
    title_model = fields.TextField(null=True)
    # What models are told of the user.
    user_name = fields.TextField(null=True)
    user_traits = fields.TextField(null=True)
    user_context = fields.TextField(null=True)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "settings"
        constraints = (UniqueConstraint(fields=("owner_id",), name="settings_once"),)


class ProviderKey(Model):
    """A user's own key for a provider, encrypted (services/encryption.py); `last_four` is empty where it is short.

    `provider` is a name that the server knows, or `custom:` and the slug of a custom provider of the same owner.
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    provider = fields.TextField()
    ciphertext = fields.BinaryField()
    last_four = fields.TextField()
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "provider_keys"
        constraints = (UniqueConstraint(fields=("owner_id", "provider"), name="provider_keys_once"),)


class CustomProvider(Model):
    """An endpoint that a user named. Its key, if it has one, is in `provider_keys` as `custom:` and the slug."""

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    slug = fields.TextField()
    name = fields.TextField()
    base_url = fields.TextField()
    format = fields.CharField(max_length=18)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "custom_providers"
        constraints = (
            UniqueConstraint(fields=("owner_id", "slug"), name="custom_providers_once"),
            CheckConstraint(
                check="format in ('CHAT_COMPLETIONS', 'ANTHROPIC_MESSAGES')", name="custom_providers_format"
            ),
        )


class CustomModel(Model):
    """A model that a user named. `provider` is the slug of one of theirs, or a name that the server knows."""

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    provider = fields.TextField()
    vendor_name = fields.TextField()
    name = fields.TextField()
    abilities = ArrayField(element_type="text")
    context_tokens = fields.IntField(null=True)
    max_output_tokens = fields.IntField(null=True)
    created_at = fields.DatetimeField(db_default=Now())
    updated_at = fields.DatetimeField(db_default=Now())

    class Meta:
        table = "custom_models"
        constraints = (UniqueConstraint(fields=("owner_id", "provider", "vendor_name"), name="custom_models_once"),)


class Change(Model):
    """One entry of a viewer's feed: which object changed how. What it is like now is read when the entry is.

    Written by triggers (`record_change`) at the commit of the change, under a lock by owner that is held until the
    commit is visible: an owner's ids are in the order of the commits, and none appears behind one that was read.
    """

    id = fields.BigIntField(primary_key=True, generated=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    kind = fields.CharField(max_length=16)
    object_id = fields.UUIDField(null=True)
    created_at = fields.DatetimeField(db_default=Now(), db_index=True)

    class Meta:
        table = "changes"
        indexes = (Index(fields=("owner_id", "id"), name="changes_in_order"),)
        constraints = (
            CheckConstraint(
                check="kind in ('THREAD', 'THREAD_DELETED', 'MESSAGE_ADDED', 'MESSAGE_ENDED', 'MESSAGE_SELECTED', "
                "'PROJECT', 'PROJECT_DELETED', 'SHARE', 'SHARE_REVOKED', 'SETTINGS', 'USAGE', 'RESET')",
                name="changes_kind",
            ),
        )


class Backfill(Model):
    """How far a backfill has come: `position` is its own, null at the start; done when `finished_at` is set."""

    name = fields.CharField(max_length=60, primary_key=True)
    position = fields.TextField(null=True)
    rows_done = fields.BigIntField(db_default=0)
    started_at = fields.DatetimeField(db_default=Now())
    finished_at = fields.DatetimeField(null=True)

    class Meta:
        table = "backfills"


class SearchDocument(Model):
    """The words of one message, or of one thread's title, as `search` finds them. Nothing of a temporary thread.

    Made by triggers in the transaction of the message or the title (see the migrations); `id` is that of what it
    describes. A table of its own, because messages change with every choice of a branch, and the index on the words
    must not be written then. Every lexeme begins with the last six digits of its owner's id: the words of one user
    lie together in the index, and a search reads nobody else's (docs/decisions/0011-search.md).
    """

    id = fields.UUIDField(primary_key=True)
    owner: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.User", related_name=False, on_delete=fields.CASCADE, db_index=False
    )
    thread: fields.ForeignKeyRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Thread", related_name=False, on_delete=fields.CASCADE, db_index=True
    )
    # Null for a title.
    message: fields.ForeignKeyNullableRelation[Any] = fields.ForeignKeyField(
        "threadgraph.Message", related_name=False, on_delete=fields.CASCADE, null=True, db_index=True
    )
    document = TSVectorField()

    class Meta:
        table = "search_documents"
        # In the migrations, because it is of a kind of its own: search_documents_words, GIN (document).
        indexes = (Index(fields=("owner_id", "id"), name="search_documents_by_age"),)
