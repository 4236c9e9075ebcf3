// The demo by Apollo Client, without a view library.

import { gql } from "@apollo/client";
import { CombinedGraphQLErrors } from "@apollo/client/errors";
import { relayStylePagination } from "@apollo/client/utilities";

import {
  CuttableWebSocket,
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
console.log(`@apollo/client ${version("@apollo/client")} with graphql-ws ${version("graphql-ws")}`);

// README:begin
import { ApolloClient, ApolloLink, HttpLink, InMemoryCache } from "@apollo/client";
import { GraphQLWsLink } from "@apollo/client/link/subscriptions";
import { createClient } from "graphql-ws";
import { tap } from "rxjs";

const authorization = `Bearer ${token}`;
const connectionParams = { authorization };
const socket = createClient({ url: url.replace("http", "ws"), connectionParams, shouldRetry: () => true });
// A reconnecting socket subscribes again with the same variables: keep `after` behind the last event.
const resume = new ApolloLink((operation, forward) => {
  const variables = (operation.variables = { ...operation.variables });
  return forward(operation).pipe(tap(({ data }) => (variables.after = data?.messageStream?.cursor)));
});
const possibleTypes = {
  Node: ["Thread", "Message", "Project", "Share", "Attachment"],
  MessagePart: ["TextPart", "ReasoningPart", "ToolPart", "SourcePart", "FilePart"],
  MessageStreamEvent: ["MessageDelta", "MessagePartAdded", "MessageReset", "MessageEnded"],
  SharedMessagePart: ["TextPart", "ReasoningPart", "ToolPart", "SourcePart", "SharedFilePart"],
  Change: [
    "ChangesReset", "ThreadChanged", "ThreadDeleted", "MessageAdded", "MessageFinished", "MessageSelected",
    "ProjectChanged", "ProjectDeleted", "ShareChanged", "ShareRevoked", "SettingsChanged", "UsageChanged",
  ],
};
const client = new ApolloClient({
  cache: new InMemoryCache({ possibleTypes }),
  link: ApolloLink.split(
    ({ operationType }) => operationType === "subscription",
    resume.concat(new GraphQLWsLink(socket)),
    new HttpLink({ uri: url, headers: { authorization } }),
  ),
});
// README:end

const documents = { read: gql(READ), send: gql(SEND), stop: gql(STOP) };

/** Follow an answer. `ended` resolves with the reading, or rejects with the error of a result. */
function follow(messageId, after, options = {}) {
  const reading = new Reading();
  let subscription;
  const ended = new Promise((resolve, reject) => {
    const variables = { messageId, after };
    subscription = client.subscribe({ query: documents.read, variables, ...options }).subscribe({
      next({ data, error }) {
        if (error) reject(error);
        else reading.take(data.messageStream);
      },
      error: reject,
      complete: () => resolve(reading),
    });
  });
  ended.catch(() => {});
  return { reading, ended: within(ended, "the end of the stream"), unsubscribe: () => subscription.unsubscribe() };
}

async function send(text, modelId) {
  const { data } = await client.mutate({ mutation: documents.send, variables: question(text, modelId) });
  return data.sendMessage;
}

async function refusedWith(code, promise) {
  const error = await within(promise, "a refusal").then(
    (result) => result.error,
    (error) => error,
  );
  holds(CombinedGraphQLErrors.is(error), "it was not refused as GraphQL errors:", error);
  equal(
    error.errors.map((one) => one.extensions?.code),
    [code],
    "extensions.code",
  );
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
  const before = follow(assistantMessage.id, null, { fetchPolicy: "no-cache" });
  await before.reading.reached(150);
  before.unsubscribe();
  equal((await stored(url, token, assistantMessage.id)).status, "STREAMING", "the status");
  const rest = await follow(assistantMessage.id, before.reading.cursor, { fetchPolicy: "no-cache" }).ended;
  holds(rest.text.length > 0, "nothing came after the cut");
  equal(before.reading.text + rest.text, rest.message.text, "what was read");
});

await check("stopMessage in the middle: the stream ends as STOPPED with the prefix kept", async () => {
  const { assistantMessage } = await send("Stop me", "endless");
  const follower = follow(assistantMessage.id);
  await follower.reading.reached(20);
  const { data } = await client.mutate({ mutation: documents.stop, variables: { messageId: assistantMessage.id } });
  const { text, message } = await follower.ended;
  equal([message.status, message.text], ["STOPPED", text], "what was read");
  equal(data.stopMessage.message.text, text, "what stopMessage gave");
});

await check(
  "the cache holds one object an id: MessageEnded and renameThread change what queries show, without a request",
  async () => {
    const { assistantMessage, thread } = await send("Remember me", "endless");
    const list = gql`query { threads(first: 100) { nodes { id title messages { nodes { id status text } } } } }`;
    await client.query({ query: list });
    const cached = () => client.readQuery({ query: list }).threads.nodes.find(({ id }) => id === thread.id);
    const answer = () => cached().messages.nodes.find(({ id }) => id === assistantMessage.id);
    equal([answer().status, answer().text], ["STREAMING", ""], "what the cache gives at first");
    const follower = follow(assistantMessage.id);
    await follower.reading.reached(20);
    await post(url, token, STOP, { messageId: assistantMessage.id });
    const { text } = await follower.ended;
    equal([answer().status, answer().text], ["STOPPED", text], "what the cache gives after MessageEnded");
    const rename = gql`mutation($input: RenameThreadInput!) { renameThread(input: $input) { thread { id title } } }`;
    await client.mutate({ mutation: rename, variables: { input: { threadId: thread.id, title: "A new name" } } });
    equal(cached().title, "A new name", "the title in the cache");
    const objects = client.cache.extract();
    equal(objects[`Thread:${thread.id}`].title, "A new name", "the object by its id");
    equal(objects[`Message:${assistantMessage.id}`].status, "STOPPED", "the object by its id");
  },
);

await check(
  "unions and the interface: fragments on MessagePart and Node are read back from the cache as they came",
  async () => {
    const { assistantMessage, thread } = await send("Parts, please", "parts");
    await follow(assistantMessage.id).ended;
    const query = gql`
      query($ids: [ID!]!) { nodes(ids: $ids) { ...Any ... on Message { parts { ...Part } } } }
      fragment Any on Node { __typename id }
      fragment Part on MessagePart {
        ... on TextPart { text }
        ... on ReasoningPart { text }
        ... on ToolPart { name arguments }
        ... on SourcePart { url }
      }
    `;
    const variables = { ids: [thread.id, assistantMessage.id] };
    const { data } = await client.query({ query, variables });
    equal(
      data.nodes.map((node) => node.__typename),
      ["Thread", "Message"],
      "types",
    );
    equal(
      data.nodes[1].parts.map((part) => part.__typename),
      ["ReasoningPart", "TextPart", "ToolPart", "TextPart"],
      "parts",
    );
    equal(client.readQuery({ query, variables }), data, "what the cache gives");
  },
);

await check("possibleTypes of the pasted client are those of the schema", async () => {
  const { data } = await client.query({ query: gql`{ __schema { types { kind name possibleTypes { name } } } }` });
  const names = (types) => types.map(({ name }) => name).sort();
  const abstract = data.__schema.types.filter((type) => ["INTERFACE", "UNION"].includes(type.kind));
  equal(names(abstract), Object.keys(possibleTypes).sort(), "interfaces and unions");
  for (const type of abstract) equal(names(type.possibleTypes), [...possibleTypes[type.name]].sort(), type.name);
});

await check("relayStylePagination joins the pages of `threads`", async () => {
  const newToken = await startSession(url);
  for (const text of ["one", "two", "three"]) await ask(url, newToken, "parts", text);
  const pages = new ApolloClient({
    cache: new InMemoryCache({ typePolicies: { Query: { fields: { threads: relayStylePagination() } } } }),
    link: new HttpLink({ uri: url, headers: { authorization: `Bearer ${newToken}` } }),
  });
  const query = gql`
    query($after: Cursor) {
      threads(first: 2, after: $after) { edges { cursor node { id title } } pageInfo { hasNextPage endCursor } }
    }
  `;
  const watched = pages.watchQuery({ query });
  const shown = (length) => {
    const came = new Promise((resolve) => {
      watched.subscribe(({ data }) => data?.threads?.edges.length === length && resolve(data.threads));
    });
    return within(came, `${length} threads`);
  };
  const { pageInfo } = await shown(2);
  equal(pageInfo.hasNextPage, true, "hasNextPage of the first page");
  await watched.fetchMore({ variables: { after: pageInfo.endCursor } });
  const both = await shown(3);
  equal(both.edges.map(({ node }) => node.title).sort(), ["one", "three", "two"], "both pages");
  equal(both.pageInfo.hasNextPage, false, "hasNextPage of the last page");
});

await check("refusals are CombinedGraphQLErrors with extensions.code, over the socket and over HTTP", async () => {
  const messageId = await ask(url, token, "parts");
  await refusedWith("CURSOR_INVALID", follow(messageId, "nonsense").ended);
  await refusedWith("NOT_FOUND", follow(await ask(url, await startSession(url), "parts")).ended);
  await refusedWith("BAD_USER_INPUT", client.mutate({ mutation: documents.send, variables: question(" ", "parts") }));
  await refusedWith("GRAPHQL_VALIDATION_FAILED", client.query({ query: gql`{ nothing }` }));
  const stranger = new ApolloClient({
    cache: new InMemoryCache(),
    link: new HttpLink({ uri: url, headers: { authorization: "Bearer nonsense" } }),
  });
  await refusedWith("UNAUTHENTICATED", stranger.query({ query: gql`{ viewer { id } }` }));
  const nobody = new GraphQLWsLink(createClient({ url: url.replace("http", "ws") }));
  const silent = new ApolloClient({ cache: new InMemoryCache(), link: nobody });
  const first = new Promise((resolve, reject) => {
    silent.subscribe({ query: documents.read, variables: { messageId } }).subscribe({ next: resolve, error: reject });
  });
  await refusedWith("UNAUTHENTICATED", first);
});

leave();
