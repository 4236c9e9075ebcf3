// The anonymous identity of this browser: {token, expiresAt} in localStorage, under KEY.

const ENDPOINT = '/graphql';
const KEY = 'threadgraph:session';
const EXPIRY_MARGIN_MS = 5_000;
const MUTATION = 'mutation StartAnonymousSession { startAnonymousSession { token expiresAt } }';

let remembered = null; // stands in for localStorage where the browser forbids it
let starting = null; // the request under way, so that there is one at a time
let failure = null; // why the server did not give us a session; not asked again until reset
let snapshot = null;
const listeners = new Set();

function read() {
  let text = remembered;
  try {
    text = localStorage.getItem(KEY);
  } catch {
    // forbidden: what is remembered is all there is
  }
  try {
    const session = JSON.parse(text);
    return typeof session?.token === 'string' ? session : null;
  } catch {
    return null;
  }
}

function write(session) {
  remembered = JSON.stringify(session);
  try {
    localStorage.setItem(KEY, remembered);
  } catch {
    // forbidden or full: this page load has it, the next one starts anew
  }
  changed();
}

function usable(session) {
  // An unreadable date counts as usable: the server is the judge, and says so with UNAUTHENTICATED.
  return session !== null && !(Date.parse(session.expiresAt) <= Date.now() + EXPIRY_MARGIN_MS);
}

function changed() {
  const session = read();
  snapshot = { session: usable(session) ? session : null, failure, starting: starting !== null };
  listeners.forEach((listener) => listener());
}

async function request() {
  const response = await fetch(ENDPOINT, {
    method: 'POST',
    headers: { accept: 'application/graphql-response+json, application/json;q=0.9', 'content-type': 'application/json' },
    body: JSON.stringify({ query: MUTATION, operationName: 'StartAnonymousSession' }),
  });
  const result = await response.json().catch(() => null);
  const session = result?.data?.startAnonymousSession;
  if (!session) {
    throw new Error(result?.errors?.[0]?.message ?? `The server answered ${response.status}.`);
  }
  return { token: session.token, expiresAt: session.expiresAt };
}

/** Makes a new session, in place of the one there was. */
export function startSession() {
  starting ??= request()
    .then(
      (session) => {
        failure = null;
        write(session);
      },
      (error) => {
        failure = error.message;
      },
    )
    .finally(() => {
      starting = null;
      changed();
    });
  changed();
  return starting;
}

/** The value of the Authorization header, from a session made now if there is none; null if the server gives none. */
export async function authorization() {
  if (starting !== null || (!usable(read()) && failure === null)) {
    await startSession();
  }
  const session = read();
  return usable(session) ? `Bearer ${session.token}` : null;
}

/** Called when the server refused `value`: a new session, unless another tab or request has already made one. */
export async function renew(value) {
  const session = read();
  if (session !== null && `Bearer ${session.token}` !== value) {
    return;
  }
  await startSession();
}

export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export function getSnapshot() {
  if (snapshot === null) {
    changed();
  }
  return snapshot;
}

// Another tab made a new session.
window.addEventListener('storage', (event) => {
  if (event.key === KEY || event.key === null) {
    changed();
  }
});
