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
    dependencies = [("threadgraph", "0001_initial")]

    initial = False

    operations = [
        ops.CreateModel(
            name="Backfill",
            fields=[
                ("name", fields.CharField(primary_key=True, unique=True, db_index=True, max_length=60)),
                ("position", fields.TextField(null=True, unique=False)),
                ("rows_done", fields.BigIntField(db_default=0)),
                ("started_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("finished_at", fields.DatetimeField(null=True, auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "backfills",
                "app": "threadgraph",
                "pk_attr": "name",
                "table_description": "How far a backfill has come: `position` is its own, null at the start; done when `finished_at` is set.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Change",
            fields=[
                ("id", fields.BigIntField(generated=True, primary_key=True, unique=True, db_index=True)),
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
                ("kind", fields.CharField(max_length=16)),
                ("object_id", fields.UUIDField(null=True)),
                (
                    "created_at",
                    fields.DatetimeField(db_index=True, db_default=Now(), auto_now=False, auto_now_add=False),
                ),
            ],
            options={
                "table": "changes",
                "app": "threadgraph",
                "constraints": [
                    CheckConstraint(
                        check="kind in ('THREAD', 'THREAD_DELETED', 'MESSAGE_ADDED', 'MESSAGE_ENDED', 'MESSAGE_SELECTED', 'PROJECT', 'PROJECT_DELETED', 'SHARE', 'SHARE_REVOKED', 'SETTINGS', 'USAGE', 'RESET')",
                        name="changes_kind",
                    )
                ],
                "indexes": [Index(fields=["owner_id", "id"], name="changes_in_order")],
                "pk_attr": "id",
                "table_description": "One entry of a viewer's feed: which object changed how. What it is like now is read when the entry is.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Project",
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
                ("name", fields.TextField(unique=False)),
                ("description", fields.TextField(null=True, unique=False)),
                ("color", fields.TextField(null=True, unique=False)),
                ("icon", fields.TextField(null=True, unique=False)),
                ("prompt", fields.TextField(null=True, unique=False)),
                ("default_model", fields.TextField(null=True, unique=False)),
                ("archived", fields.BooleanField(db_default=False)),
                ("thread_count", fields.IntField(db_default=0)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "projects",
                "app": "threadgraph",
                "indexes": [Index(fields=["owner_id", "id"], name="projects_by_age")],
                "pk_attr": "id",
                "table_description": "A folder of threads, with what turns in it are told and asked of.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Setting",
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
                ("default_model", fields.TextField(null=True, unique=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "settings",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("owner_id",), name="settings_once")],
                "pk_attr": "id",
                "table_description": "What a user chose; one row a user, made by the first choice.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="Share",
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
                        db_index=True,
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("token", fields.TextField(unique=False)),
                ("title", fields.TextField(unique=False)),
                ("includes_attachments", fields.BooleanField()),
                ("expires_at", fields.DatetimeField(null=True, auto_now=False, auto_now_add=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "shares",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("token",), name="shares_token")],
                "indexes": [Index(fields=["owner_id", "id"], name="shares_by_age")],
                "pk_attr": "id",
                "table_description": "A thread's active path as it was when it was shared, for whoever has the token.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="ShareMessage",
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
                ("role", fields.CharField(max_length=9)),
                ("status", fields.CharField(max_length=11)),
                ("parts", fields.JSONField(encoder=JSON_DUMPS, decoder=loads)),
                ("model", fields.TextField(null=True, unique=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "share_messages",
                "app": "threadgraph",
                "constraints": [
                    UniqueConstraint(fields=("share_id", "position"), name="share_messages_once"),
                    CheckConstraint(check="role in ('USER', 'ASSISTANT', 'SYSTEM')", name="share_messages_role"),
                ],
                "pk_attr": "id",
                "table_description": "A message of a share: a copy, with nothing in it that leads back to the thread.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="UsageQuarter",
            fields=[
                ("id", fields.BigIntField(generated=True, primary_key=True, unique=True, db_index=True)),
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
                ("began_at", fields.DatetimeField(auto_now=False, auto_now_add=False)),
                ("model", fields.TextField(unique=False)),
                ("requests", fields.BigIntField()),
                ("prompt_tokens", fields.BigIntField()),
                ("completion_tokens", fields.BigIntField()),
                ("reasoning_tokens", fields.BigIntField()),
                ("cached_tokens", fields.BigIntField()),
                ("priced_requests", fields.BigIntField()),
                ("cost_micros", fields.BigIntField()),
            ],
            options={
                "table": "usage_quarters",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("owner_id", "began_at", "model"), name="usage_quarters_once")],
                "pk_attr": "id",
                "table_description": "Usage events of one user and model, summed up by quarters of an hour (UTC): every zone's hours begin at one.",
            },
            bases=["Model"],
        ),
        ops.AddIndex(
            model_name="Message",
            index=Index(fields=["owner_id"], name="messages_of_owner"),
        ),
        ops.AddField(
            model_name="Stream",
            name="reserved_cost_micros",
            field=fields.BigIntField(db_default=0),
        ),
        ops.AddField(
            model_name="Stream",
            name="reserved_tokens",
            field=fields.BigIntField(db_default=0),
        ),
        ops.RemoveIndex(
            model_name="Thread",
            name="threads_by_activity",
            fields=None,
        ),
        ops.AddField(
            model_name="Thread",
            name="archived",
            field=fields.BooleanField(db_default=False),
        ),
        ops.AddField(
            model_name="Thread",
            name="expires_at",
            field=fields.DatetimeField(null=True, auto_now=False, auto_now_add=False),
        ),
        ops.AddField(
            model_name="Thread",
            name="project",
            field=fields.ForeignKeyField(
                "threadgraph.Project",
                source_field="project_id",
                null=True,
                db_constraint=True,
                to_field="id",
                related_name=False,
                on_delete=OnDelete.SET_NULL,
            ),
        ),
        ops.AddField(
            model_name="Thread",
            name="temporary",
            field=fields.BooleanField(db_default=False),
        ),
        ops.AddIndex(
            model_name="Thread",
            index=Index(
                fields=["owner_id", "archived", "temporary", "pinned", "updated_at", "id"], name="threads_listed"
            ),
        ),
        ops.AddIndex(
            model_name="Thread",
            index=Index(
                fields=["project_id", "archived", "temporary", "pinned", "updated_at", "id"], name="threads_of_project"
            ),
        ),
        ops.AddIndex(
            model_name="Thread",
            index=Index(fields=["updated_at"], name="threads_by_activity"),
        ),
        ops.AddField(
            model_name="UsageEvent",
            name="cached_price",
            field=fields.BigIntField(null=True),
        ),
        ops.AddField(
            model_name="UsageEvent",
            name="completion_price",
            field=fields.BigIntField(null=True),
        ),
        ops.AddField(
            model_name="UsageEvent",
            name="cost_micros",
            field=fields.BigIntField(null=True),
        ),
        ops.AddField(
            model_name="UsageEvent",
            name="prompt_price",
            field=fields.BigIntField(null=True),
        ),
        ops.AddField(
            model_name="UsageEvent",
            name="thread_id",
            field=fields.UUIDField(null=True),
        ),
        ops.AddIndex(
            model_name="UsageEvent",
            index=Index(fields=["thread_id"], name="usage_events_of_thread"),
        ),
        ops.AddField(
            model_name="User",
            name="changes_purged_to",
            field=fields.BigIntField(db_default=0),
        ),
        ops.AddField(
            model_name="User",
            name="deleted_at",
            field=fields.DatetimeField(null=True, auto_now=False, auto_now_add=False),
        ),
        # Tortoise 1.1 records Meta.constraints in its state but does not create them with the table.
        ops.RunSQL(
            """
            CREATE INDEX threads_expiring ON threads (expires_at) WHERE expires_at IS NOT NULL;
            -- With the sums, so that a report reads the index alone: the rows of one user lie among those of all.
            ALTER TABLE usage_quarters ADD CONSTRAINT usage_quarters_once UNIQUE (owner_id, began_at, model)
                INCLUDE (requests, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, priced_requests,
                    cost_micros);
            ALTER TABLE shares ADD CONSTRAINT shares_token UNIQUE (token);
            ALTER TABLE share_messages
                ADD CONSTRAINT share_messages_once UNIQUE (share_id, position),
                ADD CONSTRAINT share_messages_role CHECK (role in ('USER', 'ASSISTANT', 'SYSTEM'));
            ALTER TABLE settings ADD CONSTRAINT settings_once UNIQUE (owner_id);
            ALTER TABLE changes ADD CONSTRAINT changes_kind CHECK (
                kind in ('THREAD', 'THREAD_DELETED', 'MESSAGE_ADDED', 'MESSAGE_ENDED', 'MESSAGE_SELECTED', 'PROJECT',
                    'PROJECT_DELETED', 'SHARE', 'SHARE_REVOKED', 'SETTINGS', 'USAGE', 'RESET'));

            -- projects.thread_count: kept by whoever changes a thread, in the same transaction. Both projects of a move
            -- are locked in the order of their ids, so that two opposite moves cannot wait for one another.
            CREATE FUNCTION keep_thread_count() RETURNS trigger LANGUAGE plpgsql AS $$
            DECLARE
                before_id uuid; after_id uuid;
            BEGIN
                IF TG_OP <> 'INSERT' AND NOT OLD.archived AND NOT OLD.temporary THEN before_id := OLD.project_id; END IF;
                IF TG_OP <> 'DELETE' AND NOT NEW.archived AND NOT NEW.temporary THEN after_id := NEW.project_id; END IF;
                IF before_id IS NOT DISTINCT FROM after_id THEN RETURN NULL; END IF;
                IF after_id < before_id THEN
                    UPDATE projects SET thread_count = thread_count + 1 WHERE id = after_id;
                END IF;
                UPDATE projects SET thread_count = thread_count - 1 WHERE id = before_id;
                IF before_id IS NULL OR after_id > before_id THEN
                    UPDATE projects SET thread_count = thread_count + 1 WHERE id = after_id;
                END IF;
                RETURN NULL;
            END $$;
            CREATE TRIGGER threads_count AFTER INSERT OR DELETE ON threads
                FOR EACH ROW EXECUTE FUNCTION keep_thread_count();
            CREATE TRIGGER threads_recount AFTER UPDATE ON threads FOR EACH ROW
                WHEN (OLD.project_id IS DISTINCT FROM NEW.project_id OR OLD.archived <> NEW.archived
                    OR OLD.temporary <> NEW.temporary)
                EXECUTE FUNCTION keep_thread_count();

            -- The viewer's feed. The lock makes the ids of one owner's changes come in the order of their commits; it is
            -- taken at the commit, behind all other locks of the transaction, so it cannot be part of a deadlock.
            CREATE FUNCTION record_change(owner uuid, change_kind text, object uuid) RETURNS void LANGUAGE plpgsql AS $$
            BEGIN
                IF current_setting('threadgraph.quiet', true) = 'on' THEN RETURN; END IF;
                PERFORM pg_advisory_xact_lock(1952999269, hashtext(owner::text));
                INSERT INTO changes (owner_id, kind, object_id)
                SELECT owner, change_kind, object FROM users WHERE id = owner AND deleted_at IS NULL;
            END $$;

            CREATE FUNCTION record_thread_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF TG_OP = 'DELETE' THEN PERFORM record_change(OLD.owner_id, 'THREAD_DELETED', OLD.id);
                ELSE PERFORM record_change(NEW.owner_id, 'THREAD', NEW.id); END IF;
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER threads_made_or_deleted AFTER INSERT OR DELETE ON threads
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_thread_change();
            CREATE CONSTRAINT TRIGGER threads_changed AFTER UPDATE ON threads
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
                EXECUTE FUNCTION record_thread_change();

            CREATE FUNCTION record_message_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM record_change(
                    NEW.owner_id, CASE TG_OP WHEN 'INSERT' THEN 'MESSAGE_ADDED' ELSE 'MESSAGE_ENDED' END, NEW.id);
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER messages_added AFTER INSERT ON messages
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_message_change();
            CREATE CONSTRAINT TRIGGER messages_ended AFTER UPDATE ON messages
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
                WHEN (OLD.status = 'STREAMING' AND NEW.status <> 'STREAMING')
                EXECUTE FUNCTION record_message_change();

            CREATE FUNCTION record_project_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF TG_OP = 'DELETE' THEN PERFORM record_change(OLD.owner_id, 'PROJECT_DELETED', OLD.id);
                ELSE PERFORM record_change(NEW.owner_id, 'PROJECT', NEW.id); END IF;
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER projects_made_or_deleted AFTER INSERT OR DELETE ON projects
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_project_change();
            CREATE CONSTRAINT TRIGGER projects_changed AFTER UPDATE ON projects
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
                EXECUTE FUNCTION record_project_change();

            CREATE FUNCTION record_share_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF TG_OP = 'DELETE' THEN PERFORM record_change(OLD.owner_id, 'SHARE_REVOKED', OLD.id);
                ELSE PERFORM record_change(NEW.owner_id, 'SHARE', NEW.id); END IF;
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER shares_changed AFTER INSERT OR UPDATE OR DELETE ON shares
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_share_change();

            CREATE FUNCTION record_settings_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM record_change(NEW.owner_id, 'SETTINGS', NULL);
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER settings_changed AFTER INSERT OR UPDATE ON settings
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_settings_change();

            CREATE FUNCTION record_usage_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM record_change(NEW.owner_id, 'USAGE', NULL);
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER usage_events_added AFTER INSERT ON usage_events
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_usage_change();

            -- usage_quarters, in the transaction of the events; ordered, so that two batches cannot deadlock.
            CREATE FUNCTION roll_up_usage() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO usage_quarters AS q (owner_id, began_at, model, requests, prompt_tokens, completion_tokens,
                    reasoning_tokens, cached_tokens, priced_requests, cost_micros)
                SELECT owner_id, date_bin('15 minutes', created_at, '2000-01-01 00:00:00+00') AS began, model, count(*),
                    sum(prompt_tokens), sum(completion_tokens), sum(reasoning_tokens), sum(cached_tokens),
                    count(cost_micros), coalesce(sum(cost_micros), 0)
                FROM added GROUP BY owner_id, began, model ORDER BY owner_id, began, model
                ON CONFLICT (owner_id, began_at, model) DO UPDATE SET
                    requests = q.requests + excluded.requests,
                    prompt_tokens = q.prompt_tokens + excluded.prompt_tokens,
                    completion_tokens = q.completion_tokens + excluded.completion_tokens,
                    reasoning_tokens = q.reasoning_tokens + excluded.reasoning_tokens,
                    cached_tokens = q.cached_tokens + excluded.cached_tokens,
                    priced_requests = q.priced_requests + excluded.priced_requests,
                    cost_micros = q.cost_micros + excluded.cost_micros;
                RETURN NULL;
            END $$;
            CREATE TRIGGER usage_events_roll_up AFTER INSERT ON usage_events
                REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION roll_up_usage();
            -- What was there before the trigger was.
            INSERT INTO usage_quarters (owner_id, began_at, model, requests, prompt_tokens, completion_tokens,
                reasoning_tokens, cached_tokens, priced_requests, cost_micros)
            SELECT owner_id, date_bin('15 minutes', created_at, '2000-01-01 00:00:00+00'), model, count(*),
                sum(prompt_tokens), sum(completion_tokens), sum(reasoning_tokens), sum(cached_tokens), 0, 0
            FROM usage_events GROUP BY 1, 2, 3;
            -- Too many to update here; the server does it, batch by batch, once it serves.
            INSERT INTO backfills (name) SELECT 'usage-threads' WHERE EXISTS (SELECT FROM usage_events);
            """,
        ),
    ]
