// A Better Auth server as its documentation sets one up, with its data in memory. Prints its address when it listens.
//
// Beside Better Auth's own routes: POST /rotate lets the signing key expire, POST /stop ends the process.

import { randomBytes } from "node:crypto";
import { createServer } from "node:http";

import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

const tables = { user: [], session: [], account: [], verification: [], jwks: [] };
let handle;
const server = createServer((request, response) => {
  if (request.method === "POST" && request.url === "/rotate") {
    for (const key of tables.jwks) key.expiresAt = new Date(Date.now() - 1_000);
    return response.end();
  }
  if (request.method === "POST" && request.url === "/stop") {
    return response.end(() => process.exit(0));
  }
  return handle(request, response);
});
server.listen(0, "127.0.0.1", () => {
  const baseURL = `http://127.0.0.1:${server.address().port}`;
  const auth = betterAuth({
    baseURL,
    secret: randomBytes(32).toString("hex"),
    database: memoryAdapter(tables),
    emailAndPassword: { enabled: true },
    telemetry: { enabled: false },
    plugins: [jwt()],
  });
  handle = toNodeHandler(auth);
  console.log(baseURL);
});
