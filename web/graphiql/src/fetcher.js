// GraphiQL's fetcher: queries and mutations over HTTP, subscriptions over a WebSocket (graphql-transport-ws).

import { getOperationAST, parse } from 'graphql';
import { createClient } from 'graphql-ws';
import { authorization, renew } from './session.js';

const ENDPOINT = '/graphql';
const RETRY_ATTEMPTS = 1_000;
const LONGEST_RETRY_WAIT_MS = 15_000;
const KEEP_ALIVE_MS = 15_000;
const FORBIDDEN = 4403;

/** The Authorization of the tab's own headers, which wins over the anonymous session's. */
function ownAuthorization(headers) {
  const name = Object.keys(headers).find((key) => key.toLowerCase() === 'authorization');
  return name && headers[name] ? String(headers[name]) : null;
}

async function post(params, headers) {
  const own = ownAuthorization(headers);
  const sent = own ?? (await authorization());
  const all = new Headers({
    accept: 'application/graphql-response+json, application/json;q=0.9',
    'content-type': 'application/json',
  });
  Object.entries(headers).forEach(([name, value]) => all.set(name, String(value)));
  if (sent !== null) {
    all.set('authorization', sent);
  } else {
    all.delete('authorization');
  }
  const response = await fetch(ENDPOINT, { method: 'POST', headers: all, body: JSON.stringify(params) });
  const text = await response.text();
  let result;
  try {
    result = JSON.parse(text);
  } catch {
    throw { message: `The server answered ${response.status} and not with JSON.`, body: text.slice(0, 2_000) };
  }
  return { result, sent, own };
}

async function fetchOnce(params, headers) {
  const { result, sent, own } = await post(params, headers);
  const refused = result?.errors?.some((error) => error?.extensions?.code === 'UNAUTHENTICATED');
  if (own === null && sent !== null && refused) {
    // Our token is no longer good, for instance because the server has a new key. Nothing was done: ask again.
    await renew(sent);
    return (await post(params, headers)).result;
  }
  return result;
}

function explained(error) {
  if (Array.isArray(error)) {
    return error; // GraphQL errors
  }
  if (typeof error?.code === 'number') {
    return { message: `The server closed the socket: ${error.code} ${error.reason}`.trim() };
  }
  return { message: error?.message ?? 'The socket failed.' };
}

function subscribe(params, headers) {
  return {
    subscribe(sink) {
      const url = new URL(ENDPOINT, window.location.href);
      url.protocol = url.protocol === 'https:' ? 'wss:' : 'ws:';
      // A client for each subscription: the identity belongs to the connection, and tabs may have different ones.
      const client = createClient({
        url: url.href,
        retryAttempts: RETRY_ATTEMPTS,
        retryWait: async (retries) => {
          const wait = Math.min(LONGEST_RETRY_WAIT_MS, 500 * 2 ** Math.min(retries, 10));
          await new Promise((resolve) => setTimeout(resolve, wait * (0.5 + Math.random() / 2)));
        },
        shouldRetry: (event) => typeof event?.code === 'number' && event.code !== FORBIDDEN,
        keepAlive: KEEP_ALIVE_MS,
        connectionParams: async () => {
          const value = ownAuthorization(headers) ?? (await authorization());
          return value === null ? {} : { authorization: value };
        },
      });
      const unsubscribe = client.subscribe(params, {
        next: (result) => sink.next(result),
        error: (error) => sink.error(explained(error)),
        complete: () => sink.complete(),
      });
      return { unsubscribe };
    },
  };
}

/** The operation that is meant. GraphiQL's own idea of it lags behind the editor by a moment. */
function operationOf({ query, operationName }) {
  try {
    const document = parse(query);
    return getOperationAST(document, operationName) ?? getOperationAST(document);
  } catch {
    return null; // the server says what is wrong with it
  }
}

export function fetcher({ query, variables, operationName }, { headers } = {}) {
  const operation = operationOf({ query, operationName });
  const params = { query, variables, operationName: operation?.name?.value ?? operationName };
  return operation?.operation === 'subscription' ? subscribe(params, headers ?? {}) : fetchOnce(params, headers ?? {});
}
