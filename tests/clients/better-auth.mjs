// Users of a Better Auth server: signed up there, at work here; its keys change, and then it is gone.

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
  post,
  startSession,
  version,
  within,
} from "./lib.mjs";

const [url, issuer] = process.argv.slice(2);
console.log(`better-auth ${version("better-auth")}`);

/** A request to Better Auth, as a page of it makes one. */
async function auth(method, path, { body, cookie } = {}) {
  const headers = { origin: issuer, ...(body && { "content-type": "application/json" }), ...(cookie && { cookie }) };
  const signal = AbortSignal.timeout(20_000);
  const response = await fetch(issuer + path, { method, headers, body: body && JSON.stringify(body), signal });
  holds(response.ok, `${method} ${path} gave`, response.status);
  return response;
}

/** Sign up; the cookie of the session. */
async function signUp(name) {
  const body = { name, email: `${name}@example.com`, password: "a password of some length" };
  const response = await auth("POST", "/api/auth/sign-up/email", { body });
  return response.headers.getSetCookie().map((line) => line.split(";")[0]).join("; ");
}

/** A new JWT of a session. */
async function tokenOf(cookie) {
  return (await (await auth("GET", "/api/auth/token", { cookie })).json()).token;
}

const part = (token, index) => JSON.parse(Buffer.from(token.split(".")[index], "base64url").toString());

async function viewerOf(token) {
  const answer = await post(url, token, "{ viewer { id anonymous } }");
  return answer.data?.viewer ?? answer.errors[0].extensions.code;
}

const cookie = await signUp("ann");
const first = await tokenOf(cookie);

await check("who signs up there is a user here, the same with every token, and another than the next", async () => {
  equal(part(first, 0).alg, "EdDSA", "the algorithm");
  const viewer = await viewerOf(first);
  equal(viewer.anonymous, false, "anonymous");
  equal(await viewerOf(await tokenOf(cookie)), viewer, "the viewer of a second token");
  const other = await viewerOf(await tokenOf(await signUp("bob")));
  holds(other.id && other.id !== viewer.id, "the viewer of another user is", other);
});

await check("a token that was changed, and the session's own, are refused", async () => {
  const [header, , signature] = first.split(".");
  const payload = Buffer.from(JSON.stringify({ ...part(first, 1), sub: "somebody" })).toString("base64url");
  equal(await viewerOf([header, payload, signature].join(".")), "UNAUTHENTICATED", "a changed token");
  equal(await viewerOf(cookie.split("=")[1]), "UNAUTHENTICATED", "the session's cookie");
});

await check("what an anonymous session has asked is claimed after sign-in, once", async () => {
  const session = await startSession(url);
  await ask(url, session, "parts");
  const claim = "mutation Claim($token: String!) { claimAnonymousData(input: { token: $token }) { threadCount } }";
  const claimed = await post(url, first, claim, { token: session });
  equal(claimed.data?.claimAnonymousData, { threadCount: 1 }, "claimAnonymousData");
  const again = await post(url, first, claim, { token: session });
  equal(again.errors?.[0].extensions.code, "NOT_FOUND", "the second claim");
});

await check("a subscription lives on with new tokens, over a change of the issuer's keys", async () => {
  const getToken = () => tokenOf(cookie);
  const refreshMilliseconds = 200;
  const webSocketImpl = CuttableWebSocket;
  const connected = [];
  const pongs = [];
  // docs:begin
  const client = createClient({
    url: url.replace("http", "ws"),
    webSocketImpl,
    shouldRetry: () => true,
    connectionParams: async () => ({ authorization: `Bearer ${await getToken()}` }),
    on: {
      connected(socket) {
        connected.push(socket);
        // Often enough that the socket always has a token with some life in it: 5 minutes where they live for 15.
        const timer = setInterval(async () => {
          const authorization = `Bearer ${await getToken()}`;
          if (socket.readyState === socket.OPEN) {
            socket.send(JSON.stringify({ type: "ping", payload: { authorization } }));
          }
        }, refreshMilliseconds);
        socket.addEventListener("close", () => clearInterval(timer));
      },
      pong: (received, payload) => received && pongs.push(payload?.expiresAt),
    },
  });
  // docs:end
  const messageId = await ask(url, first, "long");
  const reading = new Reading();
  const unsubscribe = client.subscribe(
    { query: READ, variables: { messageId } },
    { next: ({ data }) => reading.take(data.messageStream), error: () => {}, complete: () => {} },
  );
  await reading.reached(20);
  await auth("POST", "/rotate");
  const rotated = await tokenOf(cookie);
  holds(part(rotated, 0).kid !== part(first, 0).kid, "the key is the old one");
  const seen = pongs.length;
  // Those on their way may be of the old key: not so the ones after them.
  await within(until(() => pongs.length >= seen + 3), "three more pongs");
  // Ends are told in whole seconds.
  await within(until(() => Date.parse(pongs.at(-1)) > Date.parse(pongs[0])), "a later end of the socket");
  await reading.reached(reading.text.length + 20);
  equal(connected.length, 1, "connections");
  unsubscribe();
  await client.dispose();
  equal(await viewerOf(rotated), await viewerOf(first), "the viewer of a token by the new key, and by the old");
});

await check("while the issuer is down, the tokens it has signed are good", async () => {
  const unseen = await tokenOf(cookie);
  await auth("POST", "/stop");
  const gone = await fetch(`${issuer}/api/auth/jwks`).catch(() => null);
  equal(gone, null, "the issuer");
  equal((await viewerOf(unseen)).anonymous, false, "anonymous");
});

/** Until it holds; asked every 20 ms. */
async function until(condition) {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 20));
}

leave();
