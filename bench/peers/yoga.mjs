// GraphQL Yoga on node:http, queries compiled, sockets by graphql-ws.
import { createServer } from 'node:http'
import { useGraphQlJit } from '@envelop/graphql-jit'
import { createYoga } from 'graphql-yoga'
import { contextOf, schema } from './loaders.mjs'
import { serveSockets } from './sockets.mjs'

const yoga = createYoga({
  schema,
  context: ({ request }) => contextOf(request.headers.get('authorization')),
  logging: false,
  graphiql: false,
  landingPage: false,
  batching: false,
  multipart: false,
  cors: false,
  plugins: [useGraphQlJit()],
})
const server = createServer(yoga)
serveSockets(server)
server.listen(Number(process.env.PORT), process.env.HOST)
