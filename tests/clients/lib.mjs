// What the scripts share: a socket that can be cut, a session, checks that print one line each, deadlines.

import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect } from "node:util";

import { WebSocket as NodeWebSocket } from "ws";

const CHECK_MS = 30_000;
const STEP_MS = 20_000;

export const READ = /* GraphQL */ `
  subscription Read($messageId: ID!, $after: Cursor) {
    messageStream(messageId: $messageId, after: $after) {
      __typename
      ... on MessageDelta { cursor partIndex kind text }
      ... on MessagePartAdded { cursor partIndex part { __typename ... on ToolPart { callId name arguments result } } }
      ... on MessageReset { cursor message { id status text } }
      ... on MessageEnded {
        cursor
        message {
          id status text durationMs
          parts {
            __typename
            ... on TextPart { text }
            ... on ReasoningPart { text }
            ... on ToolPart { callId name arguments result }
            ... on SourcePart { url title }
          }
          usage { totalTokens }
          error { code message }
        }
      }
    }
  }
`;
export const SEND = /* GraphQL */ `
  mutation Ask($input: SendMessageInput!) {
    sendMessage(input: $input) { thread { id title } userMessage { id text } assistantMessage { id status } }
  }
`;
export const MESSAGE = /* GraphQL */ `
  query Message($id: ID!) { message(id: $id) { id role status text } }
`;
export const STOP = /* GraphQL */ `
  mutation Stop($messageId: ID!) { stopMessage(input: { messageId: $messageId }) { message { id status text } } }
`;

const sockets = new Set();

/** The WebSocket that a browser has, whose connection can be cut as a dead network cuts it. */
export class CuttableWebSocket extends NodeWebSocket {
  constructor(...args) {
    super(...args);
    sockets.add(this);
    this.addEventListener("close", () => sockets.delete(this));
  }
}

/** Cut every open connection of this process, without a closing handshake; how many there were. */
export function cut() {
  const open = [...sockets].filter((socket) => socket.readyState === NodeWebSocket.OPEN);
  for (const socket of open) socket.terminate();
  return open.length;
}

/** The promise, or an error that says what did not come in time. */
export async function within(promise, what, milliseconds = STEP_MS) {
  const waiting = new AbortController();
  try {
    return await Promise.race([
      promise,
      sleep(milliseconds, undefined, { signal: waiting.signal }).then(() => {
        throw new Error(`nothing in ${milliseconds} ms: ${what}`);
      }),
    ]);
  } finally {
    waiting.abort();
  }
}

/** Throw unless it holds. */
export function holds(condition, otherwise, ...shown) {
  if (!condition) throw new Error([otherwise, ...shown.map(show)].join(" "));
}

/** Throw unless the two are equal as JSON. */
export function equal(actual, expected, what) {
  if (JSON.stringify(actual) === JSON.stringify(expected)) return;
  throw new Error(`${what}: got ${show(actual)} and not ${show(expected)}`);
}

const show = (value) => inspect(value, { depth: 6, breakLength: Infinity });

const client = basename(process.argv[1], ".mjs");
let failures = 0;

/** Run one check and print whether it held. */
export async function check(name, run) {
  try {
    await within(Promise.resolve().then(run), "the end of the check", CHECK_MS);
    console.log(`✔ ${client}: ${name}`);
  } catch (error) {
    failures += 1;
    const why = (error instanceof Error ? error.message : show(error)).replaceAll("\n", " ");
    console.log(`✘ ${client}: ${name}: ${why.length > 600 ? `${why.slice(0, 600)}…` : why}`);
  }
}

/** Leave; the exit status is 0 where every check held. */
export function leave() {
  process.exit(failures ? 1 : 0);
}

/** An operation by POST without any client; its answer, errors and all. */
export async function post(url, token, query, variables) {
  const headers = { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) };
  const body = JSON.stringify({ query, variables });
  const response = await fetch(url, { method: "POST", headers, body, signal: AbortSignal.timeout(STEP_MS) });
  return response.json();
}

/** The token of a new anonymous session. */
export async function startSession(url) {
  const answer = await post(url, null, "mutation { startAnonymousSession { token } }");
  holds(answer.data, "startAnonymousSession gave", answer);
  return answer.data.startAnonymousSession.token;
}

/** The input of `sendMessage` with a key of its own. */
export function question(text, modelId, more = {}) {
  return { input: { idempotencyKey: crypto.randomUUID(), text, modelId, ...more } };
}

/** Ask by POST without any client; the id of the answer. */
export async function ask(url, token, modelId, text = "What is a resumable stream?") {
  const answer = await post(url, token, SEND, question(text, modelId));
  holds(answer.data, "sendMessage gave", answer);
  return answer.data.sendMessage.assistantMessage.id;
}

/** A message as it is stored. */
export async function stored(url, token, id) {
  const answer = await post(url, token, MESSAGE, { id });
  holds(answer.data?.message, "message gave", answer);
  return answer.data.message;
}

/** What a reader of a stream holds; feed it the events. */
export class Reading {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.tools = [];
    this.cursor = null;
    this.message = null;
    this.waiting = [];
  }

  take(event) {
    holds(this.message === null, "an event after MessageEnded:", event);
    holds(typeof event?.cursor === "string" && event.cursor, "an event without a cursor:", event);
    this.cursor = event.cursor;
    if (event.__typename === "MessageDelta" && event.kind === "TEXT") this.text += event.text;
    if (event.__typename === "MessageDelta" && event.kind === "REASONING") this.reasoning += event.text;
    if (event.__typename === "MessagePartAdded") this.tools.push(event.part);
    if (event.__typename === "MessageReset") this.text = event.message.text;
    if (event.__typename === "MessageEnded") this.message = event.message;
    this.waiting = this.waiting.filter(({ length, resolve }) => this.text.length < length || resolve());
  }

  /** Until so many characters of text have come. */
  reached(length) {
    const came = new Promise((resolve) => {
      if (this.text.length >= length) resolve();
      else this.waiting.push({ length, resolve });
    });
    return within(came, `${length} characters of text; there were ${this.text.length}`);
  }
}

/** The exact version of an installed package. */
export function version(name) {
  return JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url), "utf8")).version;
}
