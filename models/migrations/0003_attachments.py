from uuid import uuid4

from tortoise import fields, migrations
from tortoise.fields.base import OnDelete
from tortoise.fields.db_defaults import Now
from tortoise.indexes import Index
from tortoise.migrations import operations as ops
from tortoise.migrations.constraints import CheckConstraint, UniqueConstraint


class Migration(migrations.Migration):
    dependencies = [("threadgraph", "0002_everything_held")]

    initial = False

    operations = [
        ops.CreateModel(
            name="Blob",
            fields=[
                ("id", fields.UUIDField(primary_key=True, default=uuid4, unique=True, db_index=True)),
                ("key", fields.TextField(unique=False)),
                ("size", fields.BigIntField()),
                ("sha256", fields.BinaryField()),
                ("content_type", fields.TextField(unique=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "blobs",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("key",), name="blobs_key")],
                "pk_attr": "id",
                "table_description": "Stored bytes. Nobody's: what refers to it has an owner, and the sweeper deletes it with the last of those.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Attachment",
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
                    "blob",
                    fields.ForeignKeyField(
                        "threadgraph.Blob",
                        source_field="blob_id",
                        null=True,
                        db_index=True,
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.NO_ACTION,
                    ),
                ),
                ("state", fields.CharField(max_length=8)),
                ("name", fields.TextField(unique=False)),
                ("content_type", fields.TextField(unique=False)),
                ("size", fields.BigIntField()),
                ("tokens", fields.IntField(null=True)),
                ("pages", fields.IntField(null=True)),
                ("width", fields.IntField(null=True)),
                ("height", fields.IntField(null=True)),
                ("upload_key", fields.TextField(null=True, unique=False)),
                ("expires_at", fields.DatetimeField(null=True, auto_now=False, auto_now_add=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "attachments",
                "app": "threadgraph",
                "constraints": [
                    CheckConstraint(check="state in ('RESERVED', 'STORED', 'LINKED')", name="attachments_state"),
                    CheckConstraint(check="(blob_id is null) = (state = 'RESERVED')", name="attachments_blob"),
                ],
                "indexes": [Index(fields=["owner_id", "id"], name="attachments_by_age")],
                "pk_attr": "id",
                "table_description": "A user's file: reserved before its bytes are there, stored, and linked once a message refers to it.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="AttachmentLink",
            fields=[
                ("id", fields.BigIntField(generated=True, primary_key=True, unique=True, db_index=True)),
                (
                    "attachment",
                    fields.ForeignKeyField(
                        "threadgraph.Attachment",
                        source_field="attachment_id",
                        db_index=True,
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                (
                    "message",
                    fields.ForeignKeyField(
                        "threadgraph.Message",
                        source_field="message_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
            ],
            options={
                "table": "attachment_links",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("message_id", "attachment_id"), name="attachment_links_once")],
                "pk_attr": "id",
                "table_description": "A message refers to an attachment of the same owner. The trigger `attachment_links_gone` tells the sweeper.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="ShareAttachment",
            fields=[
                ("id", fields.BigIntField(generated=True, primary_key=True, unique=True, db_index=True)),
                (
                    "share",
                    fields.ForeignKeyField(
                        "threadgraph.Share",
                        source_field="share_id",
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("position", fields.IntField()),
                (
                    "blob",
                    fields.ForeignKeyField(
                        "threadgraph.Blob",
                        source_field="blob_id",
                        db_index=True,
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.NO_ACTION,
                    ),
                ),
                ("name", fields.TextField(unique=False)),
                ("content_type", fields.TextField(unique=False)),
                ("size", fields.BigIntField()),
                ("width", fields.IntField(null=True)),
                ("height", fields.IntField(null=True)),
            ],
            options={
                "table": "share_attachments",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("share_id", "position"), name="share_attachments_once")],
                "pk_attr": "id",
                "table_description": "A file of a share: a reference of its own to the bytes, ended by the trigger `share_attachments_gone`.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="SweepTask",
            fields=[
                ("id", fields.BigIntField(generated=True, primary_key=True, unique=True, db_index=True)),
                ("kind", fields.CharField(max_length=10)),
                ("subject", fields.TextField(unique=False)),
                ("taken", fields.BooleanField(db_default=False)),
                ("due_at", fields.DatetimeField(db_index=True, db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "sweep_tasks",
                "app": "threadgraph",
                "constraints": [
                    CheckConstraint(check="kind in ('ATTACHMENT', 'BLOB', 'KEY')", name="sweep_tasks_kind")
                ],
                "indexes": [Index(fields=["subject"], name="sweep_tasks_of_subject")],
                "pk_attr": "id",
                "table_description": "What the sweeper is to look at, from when on.",
            },
            bases=["Model"],
        ),
        # Tortoise 1.1 records Meta.constraints in its state but does not create them with the table.
        ops.RunSQL(
            """
            ALTER TABLE blobs ADD CONSTRAINT blobs_key UNIQUE (key);
            ALTER TABLE attachments
                ADD CONSTRAINT attachments_state CHECK (state in ('RESERVED', 'STORED', 'LINKED')),
                ADD CONSTRAINT attachments_blob CHECK ((blob_id is null) = (state = 'RESERVED'));
            ALTER TABLE attachment_links
                ADD CONSTRAINT attachment_links_once UNIQUE (message_id, attachment_id);
            ALTER TABLE share_attachments
                ADD CONSTRAINT share_attachments_once UNIQUE (share_id, position);
            ALTER TABLE sweep_tasks
                ADD CONSTRAINT sweep_tasks_kind CHECK (kind in ('ATTACHMENT', 'BLOB', 'KEY'));

            -- A reference went, by whomever: the sweeper looks whether it was the last. Insertions wait for nobody, so
            -- two deletions that meet cannot hold one another up, and none of them has to look.
            CREATE FUNCTION look_at_attachment() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO sweep_tasks (kind, subject) VALUES ('ATTACHMENT', OLD.attachment_id::text);
                RETURN NULL;
            END $$;
            CREATE TRIGGER attachment_links_gone AFTER DELETE ON attachment_links
                FOR EACH ROW EXECUTE FUNCTION look_at_attachment();

            CREATE FUNCTION look_at_blob() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO sweep_tasks (kind, subject) VALUES ('BLOB', OLD.blob_id::text);
                RETURN NULL;
            END $$;
            CREATE TRIGGER attachments_gone AFTER DELETE ON attachments
                FOR EACH ROW WHEN (OLD.blob_id IS NOT NULL) EXECUTE FUNCTION look_at_blob();
            CREATE TRIGGER share_attachments_gone AFTER DELETE ON share_attachments
                FOR EACH ROW EXECUTE FUNCTION look_at_blob();
            """,
        ),
    ]
