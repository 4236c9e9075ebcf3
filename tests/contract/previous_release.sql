-- A database as the previous release left it (migration 0001), with the columns that it had: 50 users, 1,000 threads of
-- 100 messages with an edited question and a retried answer in each, every status, every kind of part, turns and usage.
SET LOCAL synchronous_commit = off;
-- The rows below fit together; checking each foreign key would take longer than all the rest.
SET LOCAL session_replication_role = replica;
CREATE FUNCTION key(kind text, number bigint) RETURNS uuid LANGUAGE sql IMMUTABLE AS
    $$ SELECT (left(md5(kind), 8) || lpad(to_hex(number), 24, '0'))::uuid $$;

INSERT INTO users (id, anonymous, issuer, subject, created_at)
SELECT key('user', n), n % 2 = 0, CASE WHEN n % 2 = 1 THEN 'https://issuer.example' END,
    CASE WHEN n % 2 = 1 THEN 'subject-' || n END, '2026-01-01 00:00:00+00'::timestamptz + n * interval '1 hour'
FROM generate_series(0, 49) n;

INSERT INTO threads (id, owner_id, title, title_source, pinned, created_at, updated_at)
SELECT key('thread', n), key('user', n % 50), 'Ünïcode “title” ' || n || ' 🧵',
    (ARRAY['TEXT', 'MODEL', 'USER'])[n % 3 + 1], n % 17 = 0,
    '2026-02-01 00:00:00.123456+00'::timestamptz + n * interval '7 minutes',
    '2026-03-01 00:00:00+00'::timestamptz + n * interval '13 minutes'
FROM generate_series(0, 999) n;

-- Messages 0 to 97 of a thread are its active path, 98 is an older question at depth 4, 99 an older answer at depth 7.
INSERT INTO messages (id, owner_id, thread_id, parent_id, active_child_id, depth, active, role, status, parts, model,
    error_code, error_message, error_retry_after, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens,
    tokens_estimated, duration_ms, created_at, updated_at)
SELECT key('message', n), key('user', thread % 50), key('thread', thread),
    CASE WHEN depth > 0 THEN key('message', thread * 100 + depth - 1) END,
    CASE WHEN place < 97 THEN key('message', n + 1) END, depth, place < 98,
    CASE WHEN asks THEN 'USER' ELSE 'ASSISTANT' END,
    CASE WHEN asks THEN 'COMPLETE'
        ELSE (ARRAY['COMPLETE', 'STOPPED', 'FAILED', 'INTERRUPTED'])[thread % 4 + 1] END,
    CASE WHEN asks THEN
        jsonb_build_array(jsonb_build_object('type', 'text', 'text', 'Question ' || n || ' “' || md5(n::text) || '” 🙂'))
    ELSE
        jsonb_build_array(
            jsonb_build_object('type', 'reasoning', 'text', md5('r' || n)),
            jsonb_build_object('type', 'tool', 'callId', 'c' || n, 'name', 'look',
                'arguments', jsonb_build_object('n', n), 'result', NULL),
            jsonb_build_object('type', 'text', 'text', repeat(md5('a' || n) || ' ', 5)),
            jsonb_build_object('type', 'source', 'url', 'https://example.com/' || n, 'title', NULL))
    END,
    CASE WHEN NOT asks THEN 'model-' || thread % 3 END,
    CASE WHEN failed THEN 'RATE_LIMITED' END, CASE WHEN failed THEN 'Later.' END, CASE WHEN failed THEN 7 END,
    tokens, tokens * 2, tokens / 3, tokens / 5, n % 11 = 0, tokens * 100,
    '2026-02-01 00:00:00+00'::timestamptz + n * interval '41 seconds',
    '2026-02-01 00:00:03+00'::timestamptz + n * interval '41 seconds'
FROM (
    SELECT n, thread, place, depth, depth % 2 = 0 AS asks, depth % 2 = 1 AND thread % 4 = 2 AS failed,
        CASE WHEN depth % 2 = 1 THEN n % 997 + 1 END AS tokens
    FROM generate_series(0, 99999) n
    CROSS JOIN LATERAL (SELECT n / 100 AS thread, n % 100 AS place) part
    CROSS JOIN LATERAL (SELECT CASE place WHEN 98 THEN 4 WHEN 99 THEN 7 ELSE place END AS depth) tree
) numbered;

INSERT INTO turns (id, owner_id, idempotency_key, fingerprint, thread_id, user_message_id, assistant_message_id,
    created_at)
SELECT key('turn', n), owner_id, 'key-' || n, decode(md5(n::text), 'hex'), thread_id, parent_id, id, created_at
FROM (SELECT row_number() OVER (ORDER BY id) AS n, * FROM messages WHERE role = 'ASSISTANT' AND depth < 8) answers;

INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
    reasoning_tokens, cached_tokens, estimated, created_at)
SELECT key(kind, n), owner_id, id, kind, model, status, prompt_tokens, completion_tokens, reasoning_tokens,
    cached_tokens, tokens_estimated, updated_at
FROM (SELECT row_number() OVER (ORDER BY id) AS n, * FROM messages WHERE role = 'ASSISTANT') answers
CROSS JOIN LATERAL (SELECT 'ANSWER' AS kind UNION ALL SELECT 'TITLE' WHERE depth = 1) kinds;

DROP FUNCTION key;
