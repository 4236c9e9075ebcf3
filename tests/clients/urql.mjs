// The demo by urql's core, without a view library.

import { CombinedError, gql } from "@urql/core";

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

// Browsers and Node from 22 on have it.
globalThis.WebSocket = CuttableWebSocket;
const url = process.argv[2];
const token = await startSession(url);
console.log(`@urql/core ${version("@urql/core")} with graphql-ws ${version("graphql-ws")}`);

// README:begin
import { Client, cacheExchange, fetchExchange, subscriptionExchange } from "@urql/core";
import { createClient } from "graphql-ws";

const authorization = `Bearer ${token}`;
const connectionParams = { authorization };
const socket = createClient({ url: url.replace("http", "ws"), connectionParams, shouldRetry: () => true });
const client = new Client({
  url,
  fetchOptions: { headers: { authorization } },
  exchanges: [
    cacheExchange,
    fetchExchange,
    subscriptionExchange({
      forwardSubscription: ({ query = "", variables: given }) => ({
        subscribe(sink) {
          const variables = { ...given };
          const next = (result) => {
            // A reconnecting socket subscribes again with the same variables: keep `after` behind the last event.
            variables.after = result.data?.messageStream?.cursor;
            sink.next(result);
          };
          return { unsubscribe: socket.subscribe({ query, variables }, { ...sink, next }) };
        },
      }),
    }),
  ],
});
// README:end

/** Follow an answer. `ended` resolves with the reading, or rejects with the error of a result. */
function follow(messageId, after, followed = client) {
  const reading = new Reading();
  let subscription;
  const ended = new Promise((resolve, reject) => {
    subscription = followed.subscription(READ, { messageId, after }).subscribe(({ data, error }) => {
      if (error) return reject(error);
      reading.take(data.messageStream);
      if (reading.message) resolve(reading);
    });
  });
  ended.catch(() => {});
  return { reading, ended: within(ended, "the end of the stream"), unsubscribe: () => subscription.unsubscribe() };
}

async function send(text, modelId) {
  const { data, error } = await client.mutation(SEND, question(text, modelId)).toPromise();
  if (error) throw error;
  return data.sendMessage;
}

async function refusedWith(code, promise) {
  const error = await within(promise, "a refusal").then(
    (result) => result.error,
    (thrown) => thrown,
  );
  holds(error instanceof CombinedError, "it was not refused:", error);
  equal(
    error.graphQLErrors.map((one) => one.extensions?.code),
    [code],
    "extensions.code",
  );
  equal(error.networkError, undefined, "networkError");
}

await check("sendMessage, then messageStream to its end; the text is the stored one", async () => {
  const { assistantMessage, thread } = await send("What is a resumable stream?", "parts");
  equal(thread.title, "What is a resumable stream?", "the title");
  const { text, tools, message } = await follow(assistantMessage.id).ended;
  equal([message.status, message.text, tools.length], ["COMPLETE", text, 1], "what was read");
  equal((await stored(url, token, assistantMessage.id)).text, text, "`message`");
});

await check(
  "cut twice in the middle: the pasted client goes on by itself, nothing twice, nothing missing",
  async () => {
    const { assistantMessage } = await send("Cut me", "long");
    const follower = follow(assistantMessage.id);
    for (let cuts = 0; cuts < 2; cuts += 1) {
      await follower.reading.reached(follower.reading.text.length + 100);
      equal(cut(), 1, "connections cut");
    }
    await follower.reading.reached(follower.reading.text.length + 100);
    await post(url, token, STOP, { messageId: assistantMessage.id });
    const { text, message } = await follower.ended;
    equal([message.status, message.text], ["STOPPED", text], "what was read over three connections");
    equal((await stored(url, token, assistantMessage.id)).text, text, "`message`");
  },
);

await check("unsubscribed in the middle, later subscribed with `after`: exactly the rest", async () => {
  const { assistantMessage } = await send("Wait for me", "steady");
  const before = follow(assistantMessage.id);
  await before.reading.reached(150);
  before.unsubscribe();
  equal((await stored(url, token, assistantMessage.id)).status, "STREAMING", "the status");
  const rest = await follow(assistantMessage.id, before.reading.cursor).ended;
  holds(rest.text.length > 0, "nothing came after the cut");
  equal(before.reading.text + rest.text, rest.message.text, "what was read");
});

await check("stopMessage in the middle: the stream ends as STOPPED with the prefix kept", async () => {
  const { assistantMessage } = await send("Stop me", "endless");
  const follower = follow(assistantMessage.id);
  await follower.reading.reached(20);
  const { data } = await client.mutation(STOP, { messageId: assistantMessage.id }).toPromise();
  const { text, message } = await follower.ended;
  equal([message.status, message.text], ["STOPPED", text], "what was read");
  equal(data.stopMessage.message.text, text, "what stopMessage gave");
});

await check("the document cache: a mutation of a thread has the open list of threads fetched again", async () => {
  const { thread } = await send("Remember me", "parts");
  const list = gql`query { threads(first: 100) { nodes { id title } } }`;
  const titles = [];
  const renamed = new Promise((resolve) => {
    client.query(list, {}).subscribe(({ data, error }) => {
      if (error) titles.push(error.message);
      titles.push(data?.threads.nodes.find(({ id }) => id === thread.id)?.title);
      if (titles.at(-1) === "A new name") resolve();
      if (titles.length === 1) rename();
    });
  });
  const rename = () =>
    client
      .mutation(gql`mutation($input: RenameThreadInput!) { renameThread(input: $input) { thread { id title } } }`, {
        input: { threadId: thread.id, title: "A new name" },
      })
      .toPromise();
  await within(renamed, "the new title in the list").catch((error) => {
    throw new Error(`${error.message}; titles: ${titles}`);
  });
  equal(titles[0], "Remember me", "the first title");
  const again = await client.query(list, {}, { requestPolicy: "cache-only" }).toPromise();
  equal(again.data.threads.nodes.find(({ id }) => id === thread.id).title, "A new name", "what the cache gives");
});

await check("unions and the interface: what `nodes` gives is typed", async () => {
  const { assistantMessage, thread } = await send("Parts, please", "parts");
  await follow(assistantMessage.id).ended;
  const query = gql`
    query($ids: [ID!]!) {
      nodes(ids: $ids) {
        ...Any
        ... on Message { parts { ... on TextPart { text } ... on ToolPart { name arguments } } }
      }
    }
    fragment Any on Node { id }
  `;
  const { data, error } = await client.query(query, { ids: [thread.id, assistantMessage.id] }).toPromise();
  if (error) throw error;
  equal(
    data.nodes.map((node) => [node.__typename, node.id]),
    [
      ["Thread", thread.id],
      ["Message", assistantMessage.id],
    ],
    "nodes",
  );
  equal(
    data.nodes[1].parts.map((part) => part.__typename),
    ["ReasoningPart", "TextPart", "ToolPart", "TextPart"],
    "parts",
  );
});

await check("refusals are CombinedErrors with extensions.code, over the socket and over HTTP", async () => {
  const messageId = await ask(url, token, "parts");
  await refusedWith("CURSOR_INVALID", follow(messageId, "nonsense").ended);
  await refusedWith("NOT_FOUND", follow(await ask(url, await startSession(url), "parts")).ended);
  await refusedWith("BAD_USER_INPUT", client.mutation(SEND, question(" ", "parts")).toPromise());
  await refusedWith("BAD_USER_INPUT", client.query(MESSAGE, { id: "nonsense" }).toPromise());
  await refusedWith("GRAPHQL_VALIDATION_FAILED", client.query("{ nothing }", {}).toPromise());
  const headers = { authorization: "Bearer nonsense" };
  const stranger = new Client({ url, fetchOptions: { headers }, exchanges: [fetchExchange] });
  await refusedWith("UNAUTHENTICATED", stranger.query("{ viewer { id } }", {}).toPromise());
  const open = createClient({ url: url.replace("http", "ws") });
  const forward = (request) => ({ subscribe: (sink) => ({ unsubscribe: open.subscribe(request, sink) }) });
  const nobody = new Client({ url, exchanges: [subscriptionExchange({ forwardSubscription: forward })] });
  await refusedWith("UNAUTHENTICATED", follow(messageId, null, nobody).ended);
});

await check("short queries go by GET, as urql sends them by default, and are answered", async () => {
  const methods = [];
  const watched = (input, options) => (methods.push(options.method), fetch(input, options));
  const headers = { authorization };
  const getting = new Client({ url, fetch: watched, fetchOptions: { headers }, exchanges: [fetchExchange] });
  const { data } = await getting.query("{ viewer { __typename } }", {}).toPromise();
  equal(data?.viewer, { __typename: "Viewer" }, "the viewer");
  equal(methods, ["GET"], "the method");
});

leave();
