from uuid import uuid4

from tortoise import fields, migrations
from tortoise.contrib.postgres.fields import ArrayField
from tortoise.fields.base import OnDelete
from tortoise.fields.db_defaults import Now
from tortoise.migrations import operations as ops
from tortoise.migrations.constraints import CheckConstraint, UniqueConstraint


class Migration(migrations.Migration):
    dependencies = [("threadgraph", "0005_deleted_owners")]

    initial = False

    operations = [
        ops.CreateModel(
            name="CustomModel",
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
                ("provider", fields.TextField(unique=False)),
                ("vendor_name", fields.TextField(unique=False)),
                ("name", fields.TextField(unique=False)),
                ("abilities", ArrayField(element_type="text")),
                ("context_tokens", fields.IntField(null=True)),
                ("max_output_tokens", fields.IntField(null=True)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "custom_models",
                "app": "threadgraph",
                "constraints": [
                    UniqueConstraint(fields=("owner_id", "provider", "vendor_name"), name="custom_models_once")
                ],
                "pk_attr": "id",
                "table_description": "A model that a user named. `provider` is the slug of one of theirs, or a name that the server knows.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="CustomProvider",
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
                ("slug", fields.TextField(unique=False)),
                ("name", fields.TextField(unique=False)),
                ("base_url", fields.TextField(unique=False)),
                ("format", fields.CharField(max_length=18)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "custom_providers",
                "app": "threadgraph",
                "constraints": [
                    UniqueConstraint(fields=("owner_id", "slug"), name="custom_providers_once"),
                    CheckConstraint(
                        check="format in ('CHAT_COMPLETIONS', 'ANTHROPIC_MESSAGES')", name="custom_providers_format"
                    ),
                ],
                "pk_attr": "id",
                "table_description": "An endpoint that a user named. Its key, if it has one, is in `provider_keys` as `custom:` and the slug.",
            },
            bases=["Model"],
        ),
        ops.CreateModel(
            name="ProviderKey",
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
                ("provider", fields.TextField(unique=False)),
                ("ciphertext", fields.BinaryField()),
                ("last_four", fields.TextField(unique=False)),
                ("created_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
                ("updated_at", fields.DatetimeField(db_default=Now(), auto_now=False, auto_now_add=False)),
            ],
            options={
                "table": "provider_keys",
                "app": "threadgraph",
                "constraints": [UniqueConstraint(fields=("owner_id", "provider"), name="provider_keys_once")],
                "pk_attr": "id",
                "table_description": "A user's own key for a provider, encrypted (services/encryption.py); `last_four` is empty where it is short.",
            },
            bases=["Model"],
        ),
        ops.AddField(
            model_name="Setting",
            name="title_model",
            field=fields.TextField(null=True, unique=False),
        ),
        ops.AddField(
            model_name="Setting",
            name="user_context",
            field=fields.TextField(null=True, unique=False),
        ),
        ops.AddField(
            model_name="Setting",
            name="user_name",
            field=fields.TextField(null=True, unique=False),
        ),
        ops.AddField(
            model_name="Setting",
            name="user_traits",
            field=fields.TextField(null=True, unique=False),
        ),
        # Tortoise 1.1 records Meta.constraints in its state but does not create them with the table.
        ops.RunSQL(
            """
            ALTER TABLE provider_keys ADD CONSTRAINT provider_keys_once UNIQUE (owner_id, provider);
            ALTER TABLE custom_providers
                ADD CONSTRAINT custom_providers_once UNIQUE (owner_id, slug),
                ADD CONSTRAINT custom_providers_format CHECK (format in ('CHAT_COMPLETIONS', 'ANTHROPIC_MESSAGES'));
            ALTER TABLE custom_models ADD CONSTRAINT custom_models_once UNIQUE (owner_id, provider, vendor_name);

            -- Nothing of these is made for an account that is being deleted (see the migration of deleted owners).
            CREATE TRIGGER provider_keys_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON provider_keys
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();
            CREATE TRIGGER custom_providers_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON custom_providers
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();
            CREATE TRIGGER custom_models_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON custom_models
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();

            -- They are parts of the viewer's settings, and told as a change of those.
            CREATE FUNCTION record_provider_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF TG_OP = 'DELETE' THEN PERFORM record_change(OLD.owner_id, 'SETTINGS', NULL);
                ELSE PERFORM record_change(NEW.owner_id, 'SETTINGS', NULL); END IF;
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER provider_keys_changed AFTER INSERT OR UPDATE OR DELETE ON provider_keys
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_provider_change();
            CREATE CONSTRAINT TRIGGER custom_providers_changed AFTER INSERT OR UPDATE OR DELETE ON custom_providers
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_provider_change();
            CREATE CONSTRAINT TRIGGER custom_models_changed AFTER INSERT OR UPDATE OR DELETE ON custom_models
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION record_provider_change();
            """
        ),
    ]
