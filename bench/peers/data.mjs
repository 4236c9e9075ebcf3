// What every server by Node has beneath its GraphQL: rows of PostgreSQL, tokens of users, streams of words.
import { randomBytes } from 'node:crypto'
import { performance } from 'node:perf_hooks'
import { createVerifier } from 'fast-jwt'
import pg from 'pg'

const MAX_PAGE = 100
const CACHED_TOKENS = 10_000
const RATE = 30
const TOP = [true, '9999-01-01T00:00:00Z', 'ffffffffffffffffffffffffffffffff']

// To the microsecond, as they are held: a Date would lose three digits, and cost more.
pg.types.setTypeParser(pg.types.builtins.TIMESTAMPTZ, (text) => {
  const second = `${text.slice(0, 10)}T${text.slice(11, 19)}`
  return text[19] === '.' ? `${second}.${text.slice(20, -3).padEnd(6, '0')}+00:00` : `${second}+00:00`
})
pg.types.setTypeParser(pg.types.builtins.UUID, (text) => text.replaceAll('-', ''))

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 10, min: 10, options: '-c TimeZone=UTC' })
const verify = createVerifier({ key: process.env.SESSION_SECRET, algorithms: ['HS256'], allowedIss: 'threadgraph' })
const verified = new Map()

// Prepared once in each connection, by their names.
const THREADS = {
  name: 'threads',
  text: `
    SELECT id, title, pinned, created_at, updated_at, project_id FROM threads
    WHERE owner_id = $1 AND NOT archived AND NOT temporary AND (pinned, updated_at, id) < ($2, $3, $4)
    ORDER BY pinned DESC, updated_at DESC, id DESC LIMIT $5`,
}
const PROJECTS = {
  name: 'projects',
  text: 'SELECT id, name FROM projects WHERE id = ANY($1::uuid[]) AND owner_id = $2',
}
const MESSAGES = {
  name: 'messages',
  text: `
    SELECT m.thread_id, m.id, m.role, m.status, m.parts, m.created_at
    FROM unnest($1::uuid[]) AS wanted (thread_id) CROSS JOIN LATERAL (
      SELECT * FROM messages WHERE thread_id = wanted.thread_id AND owner_id = $2 AND active
      ORDER BY depth DESC LIMIT $3
    ) m ORDER BY m.depth`,
}

/** The user that `Bearer <token>` stands for; a token that was verified is remembered until it expires. */
export function userOf(authorization) {
  if (!authorization?.startsWith('Bearer ')) throw new Error('Sign in.')
  const token = authorization.slice(7)
  let known = verified.get(token)
  if (known === undefined) {
    const claims = verify(token)
    known = { id: claims.sub.slice('user_'.length), expiresAt: claims.exp * 1_000 }
    verified.set(token, known)
    if (verified.size > CACHED_TOKENS) verified.delete(verified.keys().next().value)
  }
  if (known.expiresAt <= Date.now()) throw new Error('The token has expired.')
  return known.id
}

/** A page of a user's threads, pinned ones first, then by last activity. */
export async function threadsOf(user, { first = 25, after }) {
  if (first < 1 || first > MAX_PAGE) throw new Error(`A page has 1 to ${MAX_PAGE} entries.`)
  const values = [user, ...(after == null ? TOP : positionOf(after)), first + 1]
  const { rows } = await pool.query({ ...THREADS, values })
  const hasNextPage = rows.length > first
  if (hasNextPage) rows.pop()
  return {
    nodes: rows.map((row) => ({
      key: row.id,
      id: `thread_${row.id}`,
      title: row.title,
      pinned: row.pinned,
      createdAt: row.created_at,
      updatedAt: row.updated_at,
      projectKey: row.project_id,
    })),
    pageInfo: {
      hasNextPage,
      hasPreviousPage: after != null,
      startCursor: rows.length > 0 ? cursorOf(rows[0]) : null,
      endCursor: rows.length > 0 ? cursorOf(rows.at(-1)) : null,
    },
  }
}

/** Projects of a user in the order of their keys; null where there is none of that user's. */
export async function projectsOf(user, keys) {
  const { rows } = await pool.query({ ...PROJECTS, values: [[...new Set(keys)], user] })
  const found = new Map(rows.map((row) => [row.id, { id: `project_${row.id}`, name: row.name }]))
  return keys.map((key) => found.get(key) ?? null)
}

/** The last messages of each thread of a user's, oldest first, in the order of the threads' keys. */
export async function messagesOf(user, threadKeys, last) {
  if (last < 1 || last > MAX_PAGE) throw new Error(`A page has 1 to ${MAX_PAGE} entries.`)
  const { rows } = await pool.query({ ...MESSAGES, values: [threadKeys, user, last] })
  const found = new Map(threadKeys.map((key) => [key, { nodes: [] }]))
  for (const row of rows) {
    found.get(row.thread_id).nodes.push({
      id: `message_${row.id}`,
      role: row.role,
      status: row.status,
      parts: row.parts,
      createdAt: row.created_at,
    })
  }
  return threadKeys.map((key) => found.get(key))
}

/** The text of a message: its text parts, joined. */
export function textOf(message) {
  let text = ''
  for (const part of message.parts) if (part.type === 'text') text += part.text
  return text
}

/**
 * Words without end after some seconds, each at its due time: the speed holds however late the loop wakes us. Node keeps
 * the timers of one duration in one list behind one timer of the system's, as `Beat` does for the servers by Python.
 */
export async function* wordsOf(silence) {
  const prefix = `${randomBytes(16).toString('base64url')}.`
  const pause = 1_000 / RATE
  let due = performance.now() + silence * 1_000
  let offset = 0
  for (let sent = 1; ; sent += 1) {
    due += pause
    const early = due - performance.now()
    if (early > 0) await new Promise((resolve) => setTimeout(resolve, early))
    else if (sent % 64 === 0) await new Promise((resolve) => setImmediate(resolve))
    offset += 5
    yield { messageStream: { __typename: 'MessageDelta', cursor: `${prefix}${offset}`, kind: 'TEXT', text: ' word' } }
  }
}

function cursorOf(row) {
  const packed = Buffer.alloc(26)
  packed.write('T', 0, 'latin1')
  packed.writeUInt8(row.pinned ? 1 : 0, 1)
  const text = row.updated_at
  const micros = text[19] === '.' ? Number(text.slice(20, 26)) : 0
  packed.writeBigInt64BE(BigInt(Date.parse(`${text.slice(0, 19)}Z`)) * 1_000n + BigInt(micros), 2)
  packed.write(row.id, 10, 'hex')
  return packed.toString('base64url')
}

function positionOf(cursor) {
  const packed = Buffer.from(cursor, 'base64url')
  if (packed.length !== 26) throw new Error('This is not a cursor of this list.')
  const micros = packed.readBigInt64BE(2)
  const second = new Date(Number(micros / 1_000_000n) * 1_000).toISOString().slice(0, 19)
  const at = `${second}.${String(micros % 1_000_000n).padStart(6, '0')}Z`
  return [packed.readUInt8(1) === 1, at, packed.toString('hex', 10)]
}
