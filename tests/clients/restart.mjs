// A deployment, as its readers see it: the runner restarts the server where this script prints "restart".

import { createClient } from "graphql-ws";

import {
  CuttableWebSocket,
  READ,
  Reading,
  ask,
  check,
  equal,
  holds,
  leave,
  startSession,
  stored,
  within,
} from "./lib.mjs";

const url = process.argv[2];
const token = await startSession(url);
const connected = [];
const closed = [];
const client = createClient({
  url: url.replace("http", "ws"),
  webSocketImpl: CuttableWebSocket,
  connectionParams: { authorization: `Bearer ${token}` },
  lazy: false,
  shouldRetry: () => true,
  retryAttempts: 100,
  retryWait: () => new Promise((resolve) => setTimeout(resolve, 100)),
  on: { connected: (_socket, _payload, wasRetry) => connected.push(wasRetry), closed: ({ code }) => closed.push(code) },
});

/** Follow an answer to its end, over as many connections as it takes. */
function follow(messageId) {
  const reading = new Reading();
  const payload = { query: READ, variables: { messageId } };
  const ended = new Promise((resolve, reject) => {
    client.subscribe(payload, {
      next({ data, errors }) {
        if (errors) return reject(errors);
        reading.take(data.messageStream);
        payload.variables.after = data.messageStream.cursor;
      },
      error: reject,
      complete: () => resolve(reading),
    });
  });
  ended.catch(() => {});
  return { reading, ended };
}

const messageId = await ask(url, token, "endless");
const follower = follow(messageId);
await follower.reading.reached(20);
console.log("restart");

await check("the answer that was being written ends as INTERRUPTED (SERVER_SHUTDOWN), its text kept", async () => {
  const { text, message } = await within(follower.ended, "the end of the stream");
  equal([message.status, message.error?.code], ["INTERRUPTED", "SERVER_SHUTDOWN"], "status and error");
  equal(message.text, text, "what was read");
});

await check(
  "the idle socket is closed with 1012 and comes back by itself; token, text and cursors are still good",
  async () => {
    const result = await within(client.iterate({ query: "{ viewer { id } }" }).next(), "a query's result");
    holds(result.value?.data?.viewer.id, "viewer gave", result);
    equal(closed[0], 1012, "the close code");
    equal(connected, [false, true], "connections that were retries");
    equal((await stored(url, token, messageId)).text, follower.reading.text, "`message` after the restart");
    const again = await within(follow(messageId).ended, "the end of the stream");
    equal([again.text, again.cursor], [follower.reading.text, follower.reading.cursor], "the stream after the restart");
  },
);

leave();
