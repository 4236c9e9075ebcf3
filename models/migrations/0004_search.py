from uuid import uuid4

from tortoise import fields, migrations
from tortoise.contrib.postgres.fields import TSVectorField
from tortoise.fields.base import OnDelete
from tortoise.indexes import Index
from tortoise.migrations import operations as ops

# Regular expressions that mean the same to PostgreSQL, whatever its locale, and to Python (services/search_query.py).
# What stands between words: control characters, punctuation, invisible marks, private use.
SEPARATORS = (
    # Latin, and currencies
    r"\u0001-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7"
    r"\u2000-\u206f\u20a0-\u20cf"
    # Greek, Armenian, Hebrew, Arabic, Syriac, Indic, Tibetan, Georgian, Ethiopic, Mongolian
    r"\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b-\u061f"
    r"\u066a-\u066d\u06d4\u0700-\u070d\u0964\u0965\u0970\u0df4\u0f04-\u0f14\u0f3a-\u0f3d\u10fb\u1360-\u1368"
    r"\u166e\u169b\u169c\u16eb-\u16ed\u1800-\u180e"
    # boxes and shapes of drawn tables, supplemental and CJK punctuation, presentation forms, private use
    r"\u2500-\u25ff\u2e00-\u2e7f\u3000-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\ua4fe\ua4ff"
    r"\ue000-\uf8ff\ufd3e\ufd3f\ufe00-\ufe1f\ufe30-\ufe6f\ufeff\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40"
    r"\uff5b-\uff65\uffe0-\uffff\U000e0000-\U0010ffff"
)
# Characters that are words of their own, because their scripts set no blanks, or because they are pictures.
SINGLES = (
    # Thai, Lao, Myanmar, Khmer; arrows, technical signs and other pictures
    r"\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u2190-\u24ff\u2600-\u2bff"
    # Chinese and Japanese; emoji
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u302f\u3031-\u303c\u303e\u303f\u3041-\u309f\u30a1-\u30fa\u30fc-\u312f"
    r"\u3190-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001f000-\U0001fbff\U00020000-\U0003ffff"
)

FUNCTIONS = r"""
-- Lower case by Unicode's rules, also in a database whose locale is C.
DO $do$ BEGIN
    IF current_setting('server_version_num')::int >= 170000 THEN
        CREATE FUNCTION search_lower(text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
            AS 'SELECT lower($1 COLLATE pg_catalog.pg_c_utf8)';
    ELSIF EXISTS (SELECT FROM pg_collation WHERE collname = 'und-x-icu') THEN
        CREATE FUNCTION search_lower(text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
            AS 'SELECT lower($1 COLLATE pg_catalog."und-x-icu")';
    ELSE
        CREATE FUNCTION search_lower(text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT lower($1)';
    END IF;
END $do$;

-- The words of a text between single blanks: of one spelling, in lower case. The first 100,000 characters count.
CREATE FUNCTION search_words(content text) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE words text := left(content, 100000);
BEGIN
    -- Most texts are ASCII, and then half of the work is none.
    IF octet_length(words) = length(words) THEN
        RETURN btrim(regexp_replace(lower(words), '[^a-z0-9]+', ' ', 'g'));
    END IF;
    words := search_lower(left(normalize(words, NFKC), 100000));
    words := regexp_replace(words, '([SINGLES])', ' \1 ', 'g');
    RETURN btrim(regexp_replace(words, '[SEPARATORS]+', ' ', 'g'));
END $$;

-- The words of a message, or with `message` null of a title. Each begins with the end of its owner's id. One more tells
-- the slice of time: the beginning of the message's id, of which a step is 50 days (2^32 ms).
-- Words are cut to 64 characters; their places are kept for phrases up to 16,000. So bounded, a document of 100,000
-- characters stays below the 1 MB that a tsvector may have. Null where there is no word.
CREATE FUNCTION search_document(owner uuid, message uuid, content text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (string_agg(
        right(owner::text, 6) || left(word, 64) || CASE
            WHEN place > 16000 THEN '' WHEN message IS NULL THEN ':' || place || 'A' ELSE ':' || place END, ' '
    ) || ' ' || right(owner::text, 6) || '#' || coalesce(left(message::text, 4), 'titl'))::tsvector
    FROM string_to_table(search_words(content), ' ') WITH ORDINALITY AS words (word, place)
    WHERE word <> '' AND place <= 50000
$$;

-- The text of a message as `Message.text` has it.
CREATE FUNCTION search_text(parts jsonb) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT string_agg(part->>'text', '' ORDER BY place)
    FROM jsonb_array_elements(parts) WITH ORDINALITY AS listed (part, place) WHERE part->>'type' = 'text'
$$;

-- Makes, replaces or removes one document. It never fails for what the text is: that an answer is stored matters more
-- than that it is found.
CREATE FUNCTION keep_search_document(key uuid, owner uuid, thread uuid, message uuid, content text)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE made tsvector;
BEGIN
    BEGIN
        made := search_document(owner, message, content);
    EXCEPTION WHEN OTHERS THEN
        RAISE WARNING 'no search document for %: %', key, SQLSTATE;
    END;
    IF made IS NULL THEN
        DELETE FROM search_documents WHERE id = key;
    ELSE
        INSERT INTO search_documents (id, owner_id, thread_id, message_id, document)
        VALUES (key, owner, thread, message, made)
        ON CONFLICT (id) DO UPDATE SET owner_id = excluded.owner_id, document = excluded.document;
    END IF;
END $$;

CREATE FUNCTION keep_message_document() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM threads WHERE id = NEW.thread_id AND NOT temporary) THEN
        PERFORM keep_search_document(NEW.id, NEW.owner_id, NEW.thread_id, NEW.id, search_text(NEW.parts));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER messages_searchable AFTER INSERT ON messages FOR EACH ROW
    WHEN (NEW.status <> 'STREAMING') EXECUTE FUNCTION keep_message_document();
CREATE TRIGGER messages_searchable_again AFTER UPDATE OF parts, status, owner_id ON messages FOR EACH ROW
    WHEN (NEW.status <> 'STREAMING' AND (OLD.status = 'STREAMING' OR OLD.parts IS DISTINCT FROM NEW.parts
        OR OLD.owner_id <> NEW.owner_id))
    EXECUTE FUNCTION keep_message_document();

CREATE FUNCTION keep_thread_documents() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.temporary THEN
        DELETE FROM search_documents WHERE thread_id = NEW.id;
        RETURN NULL;
    END IF;
    PERFORM keep_search_document(NEW.id, NEW.owner_id, NEW.id, NULL, NEW.title);
    IF TG_OP = 'UPDATE' AND OLD.temporary THEN
        PERFORM keep_search_document(id, owner_id, thread_id, id, search_text(parts))
        FROM messages WHERE thread_id = NEW.id AND status <> 'STREAMING';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER threads_searchable AFTER INSERT ON threads FOR EACH ROW
    WHEN (NOT NEW.temporary) EXECUTE FUNCTION keep_thread_documents();
CREATE TRIGGER threads_searchable_again AFTER UPDATE OF title, temporary, owner_id ON threads FOR EACH ROW
    WHEN (OLD.title <> NEW.title OR OLD.temporary <> NEW.temporary OR OLD.owner_id <> NEW.owner_id)
    EXECUTE FUNCTION keep_thread_documents();
"""

STORAGE = """
-- Out of the row where it is longer than a few words: what a search counts and sorts are the rows.
ALTER TABLE search_documents SET (toast_tuple_target = 128);
-- No list of pending entries: it would be read by every search, and emptied by some unlucky answer.
CREATE INDEX search_documents_words ON search_documents USING gin (document) WITH (fastupdate = off);
"""


class Migration(migrations.Migration):
    dependencies = [("threadgraph", "0003_attachments")]

    initial = False

    operations = [
        ops.CreateModel(
            name="SearchDocument",
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
                (
                    "message",
                    fields.ForeignKeyField(
                        "threadgraph.Message",
                        source_field="message_id",
                        null=True,
                        db_index=True,
                        db_constraint=True,
                        to_field="id",
                        related_name=False,
                        on_delete=OnDelete.CASCADE,
                    ),
                ),
                ("document", TSVectorField(source_fields=(), stored=False)),
            ],
            options={
                "table": "search_documents",
                "app": "threadgraph",
                "indexes": [Index(fields=["owner_id", "id"], name="search_documents_by_age")],
                "pk_attr": "id",
                "table_description": "The words of one message, or of one thread's title, as `search` finds them. Nothing of a temporary thread.",
            },
            bases=["Model"],
        ),
        ops.RunSQL(STORAGE),
        ops.RunSQL(FUNCTIONS.replace("SEPARATORS", SEPARATORS).replace("SINGLES", SINGLES)),
        # What was there before the triggers: the server does it, batch by batch, once it serves.
        ops.RunSQL("INSERT INTO backfills (name) SELECT 'search-documents' WHERE EXISTS (SELECT FROM threads)"),
    ]
