from tortoise import migrations
from tortoise.migrations import operations as ops


class Migration(migrations.Migration):
    dependencies = [("threadgraph", "0004_search")]

    initial = False

    operations = [
        ops.RunSQL(
            """
            -- What begins something for an account that is being deleted is refused, whoever writes it, in the way the
            -- foreign key refuses it for an account that is gone. The lock is the foreign key's own: what has begun and
            -- is not committed makes the deletion of the user's row wait, and goes with it.
            CREATE FUNCTION refuse_deleted_owner() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM FROM users WHERE id = NEW.owner_id AND deleted_at IS NULL FOR KEY SHARE;
                IF NOT FOUND THEN
                    RAISE foreign_key_violation USING MESSAGE = 'the owner does not exist any more';
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER turns_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON turns
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();
            CREATE TRIGGER threads_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON threads
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();
            CREATE TRIGGER projects_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON projects
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();
            CREATE TRIGGER settings_of_the_living BEFORE INSERT OR UPDATE OF owner_id ON settings
                FOR EACH ROW EXECUTE FUNCTION refuse_deleted_owner();
            """
        ),
    ]
