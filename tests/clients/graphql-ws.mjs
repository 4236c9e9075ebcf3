// The demo by the package graphql-ws: read, cut, go on, stop, be refused.

import { createClient } from "graphql-ws";

import {
  CuttableWebSocket,
  MESSAGE,
  READ,
  Reading,
  SEND,
  STOP,
  ask,
  check,
  cut,
  equal,
  holds,
  leave,
  post,
  question,
  startSession,
  stored,
  version,
  within,
} from "./lib.mjs";

const url = process.argv[2];
const token = await startSession(url);
console.log(`graphql-ws ${version("graphql-ws")}`);

function connect(options = {}) {
  return createClient({
    url: url.replace("http", "ws"),
    webSocketImpl: CuttableWebSocket,
    connectionParams: { authorization: `Bearer ${token}` },
    retryAttempts: 0,
    ...options,
  });
}

/** Follow an answer. `ended` resolves with the reading, or rejects with what `sink.error` was given. */
function follow(client, payload) {
  const reading = new Reading();
  let unsubscribe;
  const ended = new Promise((resolve, reject) => {
    unsubscribe = client.subscribe(payload, {
      next(result) {
        if (result.errors) reject(result.errors);
        else reading.take(result.data.messageStream);
      },
      error: reject,
      complete: () => resolve(reading),
    });
  });
  ended.catch(() => {});
  return { reading, ended: within(ended, "the end of the stream"), unsubscribe };
}

const read = (messageId, after = null) => ({ query: READ, variables: { messageId, after } });

/** What `sink.error` was given. */
async function refusal(client, payload) {
  try {
    const reading = await follow(client, payload).ended;
    throw new Error(`it was not refused: ${JSON.stringify(reading)}`);
  } catch (error) {
    if (error instanceof Error) throw error;
    return error;
  }
}

async function refusedWith(code, client, payload, field) {
  const errors = await refusal(client, payload);
  holds(Array.isArray(errors) && errors[0].message, "sink.error was given", errors);
  equal(
    errors.map((error) => error.extensions?.code),
    [code],
    "extensions.code",
  );
  if (field) equal(errors[0].extensions.field, field, "extensions.field");
}

await check("a socket cut in the middle; a new one with `after` gives exactly the rest", async () => {
  const messageId = await ask(url, token, "steady");
  const first = connect();
  const before = follow(first, read(messageId));
  await before.reading.reached(200);
  first.terminate();
  const close = await before.ended.then(
    () => null,
    (error) => error,
  );
  equal(close?.code, 4499, "the close event of client.terminate()");
  equal((await stored(url, token, messageId)).status, "STREAMING", "the status at the cut");

  const rest = await follow(connect(), read(messageId, before.reading.cursor)).ended;
  holds(rest.text.length > 0, "nothing came after the cut");
  equal(rest.message.status, "COMPLETE", "the status");
  equal(before.reading.text + rest.text, rest.message.text, "what was read against MessageEnded");
  equal((await stored(url, token, messageId)).text, rest.message.text, "`message` against MessageEnded");
  holds(rest.message.durationMs > 0 && rest.message.usage.totalTokens > 0, "no usage:", rest.message);
});

await check(
  "a dead connection (no closing handshake) is an error of the sink; the app subscribes from its cursor",
  async () => {
    const messageId = await ask(url, token, "steady");
    const client = connect();
    const before = follow(client, read(messageId));
    await before.reading.reached(200);
    equal(cut(), 1, "connections cut");
    equal((await before.ended.catch((error) => error)).code, 1006, "the close event");
    const rest = await follow(client, read(messageId, before.reading.cursor)).ended;
    equal(before.reading.text + rest.text, rest.message.text, "what was read");
  },
);

await check(
  "retryAttempts: the client reconnects by itself and goes on behind the last event, as `after` is moved",
  async () => {
    const messageId = await ask(url, token, "steady");
    const retries = [];
    const client = connect({
      retryAttempts: 5,
      retryWait: async () => {},
      on: { connected: (_socket, _payload, wasRetry) => retries.push(wasRetry) },
    });
    const payload = read(messageId);
    const reading = new Reading();
    const ended = new Promise((resolve, reject) => {
      client.subscribe(payload, {
        next({ data, errors }) {
          if (errors) return reject(errors);
          reading.take(data.messageStream);
          payload.variables.after = data.messageStream.cursor;
        },
        error: reject,
        complete: resolve,
      });
    });
    for (const length of [100, 250, 400]) {
      await reading.reached(length);
      cut();
    }
    await within(ended, "the end of the stream");
    equal(retries, [false, true, true, true], "connections that were retries");
    equal(reading.text, reading.message.text, "what was read over four connections");
  },
);

await check(
  "retryAttempts with variables left alone: the retry begins at its old `after`, and nothing hangs",
  async () => {
    const messageId = await ask(url, token, "steady");
    const follower = follow(connect({ retryAttempts: 5, retryWait: async () => {} }), read(messageId));
    await follower.reading.reached(200);
    const before = follower.reading.text;
    cut();
    const { text, message } = await follower.ended;
    equal(text, before + message.text, "what was read");
  },
);

await check(
  "two sockets, and two subscriptions on one of them, read the same text; a late one gets it at once",
  async () => {
    const messageId = await ask(url, token, "steady");
    const one = connect();
    const other = connect();
    const readers = [follow(one, read(messageId)), follow(one, read(messageId)), follow(other, read(messageId))];
    for (const { reading } of readers) await reading.reached(100);
    const readings = await Promise.all(readers.map(({ ended }) => ended));
    const late = await follow(connect(), read(messageId)).ended;
    const { text } = await stored(url, token, messageId);
    for (const reading of [...readings, late]) equal(reading.text, text, "what was read");
    const nothing = await follow(connect(), read(messageId, late.cursor)).ended;
    equal([nothing.text, nothing.message], ["", null], "what follows the last cursor");
  },
);

await check("reasoning, text and a tool call come in order, and MessageEnded has the same parts", async () => {
  const reading = await follow(connect(), read(await ask(url, token, "parts"))).ended;
  equal(
    reading.message.parts.map((part) => part.__typename),
    ["ReasoningPart", "TextPart", "ToolPart", "TextPart"],
    "parts",
  );
  equal(reading.reasoning, reading.message.parts[0].text, "reasoning");
  equal(reading.text, reading.message.text, "text");
  equal(reading.tools, [reading.message.parts[2]], "tools");
  equal(reading.tools[0].arguments, { city: "Zürich" }, "arguments");
});

await check("stopMessage in the middle: the stream ends as STOPPED with the prefix kept", async () => {
  const messageId = await ask(url, token, "endless");
  const follower = follow(connect(), read(messageId));
  await follower.reading.reached(20);
  const answer = await post(url, token, STOP, { messageId });
  const { text, message } = await follower.ended;
  equal([message.status, message.error], ["STOPPED", null], "status and error");
  equal(text, message.text, "what was read");
  equal(answer.data.stopMessage.message, { id: messageId, status: "STOPPED", text }, "what stopMessage gave");
});

await check(
  "a provider's failure ends the stream as FAILED with a typed error, not as an error of the operation",
  async () => {
    const { text, message } = await follow(connect(), read(await ask(url, token, "failing"))).ended;
    equal([message.status, message.error?.code], ["FAILED", "RATE_LIMITED"], "status and error");
    equal([text, message.text], ["It begins well", "It begins well"], "text");
  },
);

await check("no token: sink.error gets UNAUTHENTICATED, for a subscription and for a query on the socket", async () => {
  const messageId = await ask(url, token, "parts");
  await refusedWith("UNAUTHENTICATED", connect({ connectionParams: undefined }), read(messageId));
  const client = connect({ connectionParams: undefined });
  const result = await within(client.iterate({ query: "{ viewer { id } }" }).next(), "a query's result");
  equal(result.value.errors?.[0].extensions.code, "UNAUTHENTICATED", "extensions.code");
});

await check(
  "a refused token: the socket closes with 4403 and the reason; with a new token the retry succeeds",
  async () => {
    const messageId = await ask(url, token, "parts");
    const close = await refusal(connect({ connectionParams: { authorization: "Bearer nonsense" } }), read(messageId));
    equal(close.code, 4403, "the close code");
    holds(close.reason.length > 0, "no reason:", close.reason);
    const tokens = ["nonsense", token];
    const client = connect({
      retryAttempts: 1,
      retryWait: async () => {},
      connectionParams: () => ({ authorization: `Bearer ${tokens.shift()}` }),
    });
    const reading = await follow(client, read(messageId)).ended;
    equal(reading.text, reading.message.text, "what was read");
  },
);

await check(
  "refusals are typed: CURSOR_INVALID, CURSOR_MISMATCH, NOT_FOUND, BAD_USER_INPUT, documents; the socket lives on",
  async () => {
    const messageId = await ask(url, token, "parts");
    const { cursor } = await follow(connect(), read(messageId)).ended;
    const closes = [];
    const client = connect({
      lazy: false,
      onNonLazyError: () => {},
      on: { closed: (event) => closes.push(event.code) },
    });
    await refusedWith("CURSOR_INVALID", client, read(messageId, "nonsense"), "after");
    await refusedWith("CURSOR_MISMATCH", client, read(await ask(url, token, "parts"), cursor), "after");
    await refusedWith("NOT_FOUND", client, read(await ask(url, await startSession(url), "parts")), "messageId");
    await refusedWith("BAD_USER_INPUT", client, read("nonsense"), "messageId");
    await refusedWith("BAD_USER_INPUT", client, { query: READ, variables: {} });
    await refusedWith("GRAPHQL_PARSE_FAILED", client, { query: "subscription {" });
    await refusedWith("GRAPHQL_VALIDATION_FAILED", client, { query: "subscription { nothing }" });
    const reading = await follow(client, read(messageId)).ended;
    equal(reading.text, reading.message.text, "what was read on the same socket");
    equal(closes, [], "close codes");
    await client.dispose();
  },
);

await check(
  "queries and mutations on the socket; unsubscribing in the middle frees it; for await; ping and pong",
  async () => {
    let answered;
    const pong = new Promise((resolve) => (answered = resolve));
    const client = connect({
      keepAlive: 50,
      lazyCloseTimeout: 5_000,
      on: { pong: (received) => received && answered() },
    });
    const sent = await within(
      client.iterate({ query: SEND, variables: question("Go on", "endless") }).next(),
      "sendMessage",
    );
    const messageId = sent.value.data.sendMessage.assistantMessage.id;
    const follower = follow(client, read(messageId));
    await follower.reading.reached(10);
    follower.unsubscribe();
    await follower.ended;
    equal(follower.reading.message, null, "MessageEnded after unsubscribing");

    const whole = new Reading();
    await within(
      (async () => {
        for await (const { data } of client.iterate(read(messageId))) {
          whole.take(data.messageStream);
          if (whole.text.length >= 20 && !whole.stopping) {
            whole.stopping = post(url, token, STOP, { messageId });
          }
        }
      })(),
      "the end of the iteration",
    );
    equal([whole.message.status, whole.message.text], ["STOPPED", whole.text], "what was iterated");
    const found = await within(client.iterate({ query: MESSAGE, variables: { id: messageId } }).next(), "message");
    equal(found.value.data.message.text, whole.text, "`message` on the socket");
    await within(pong, "a pong, which may take longer than all of this");
    await client.dispose();
  },
);

leave();
