from tortoise import migrations
from tortoise.migrations import operations as ops

FUNCTIONS = """
-- A question that is written together with its answer's placeholder has its document when the answer ends: whoever
-- asked waits for what is written here (docs/decisions/0029-documents-at-the-end.md).
CREATE OR REPLACE FUNCTION keep_message_document() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' AND NEW.role = 'USER'
        AND EXISTS (SELECT FROM messages WHERE parent_id = NEW.id AND status = 'STREAMING') THEN
        RETURN NULL;
    END IF;
    IF NOT EXISTS (SELECT FROM threads WHERE id = NEW.thread_id AND NOT temporary) THEN
        RETURN NULL;
    END IF;
    PERFORM keep_search_document(NEW.id, NEW.owner_id, NEW.thread_id, NEW.id, search_text(NEW.parts));
    IF TG_OP = 'UPDATE' AND OLD.status = 'STREAMING' THEN
        PERFORM keep_search_document(id, owner_id, thread_id, id, search_text(parts)) FROM messages
        WHERE id = NEW.parent_id AND NOT EXISTS (SELECT FROM search_documents WHERE id = NEW.parent_id);
        PERFORM keep_search_document(id, owner_id, id, NULL, title) FROM threads
        WHERE id = NEW.thread_id AND NOT EXISTS (SELECT FROM search_documents WHERE id = NEW.thread_id);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION keep_thread_documents() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.temporary THEN
        DELETE FROM search_documents WHERE thread_id = NEW.id;
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' AND EXISTS (SELECT FROM messages WHERE thread_id = NEW.id AND status = 'STREAMING') THEN
        RETURN NULL;
    END IF;
    PERFORM keep_search_document(NEW.id, NEW.owner_id, NEW.id, NULL, NEW.title);
    IF TG_OP = 'UPDATE' AND OLD.temporary THEN
        PERFORM keep_search_document(id, owner_id, thread_id, id, search_text(parts))
        FROM messages WHERE thread_id = NEW.id AND status <> 'STREAMING';
    END IF;
    RETURN NULL;
END $$;
"""


class Migration(migrations.Migration):
    """The documents of a question and of a new thread's title are made with that of the answer."""

    dependencies = [("threadgraph", "0008_long_threads")]

    initial = False

    operations = [ops.RunSQL(FUNCTIONS)]
