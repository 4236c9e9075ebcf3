// GraphQL Yoga on node:http, queries and subscriptions compiled, sockets by graphql-ws as Yoga's documentation joins them.
import { createServer } from 'node:http'
import { useGraphQlJit } from '@envelop/graphql-jit'
import { createYoga } from 'graphql-yoga'
import { contextOf, schema } from './loaders.mjs'
import { serveSockets } from './sockets.mjs'

const yoga = createYoga({
  schema,
  // Of a socket there are the context made when it connected, and no request.
  context: ({ extra, request }) => extra?.context ?? contextOf(request.headers.get('authorization')),
  logging: false,
  graphiql: false,
  landingPage: false,
  batching: false,
  multipart: false,
  cors: false,
  plugins: [useGraphQlJit()],
})
const server = createServer(yoga)
serveSockets(server, {
  execute: (args) => args.rootValue.execute(args),
  subscribe: (args) => args.rootValue.subscribe(args),
  onSubscribe: async (connection, _, params) => {
    const { schema, execute, subscribe, contextFactory, parse, validate } = yoga.getEnveloped({ ...connection, params })
    const document = parse(params.query)
    const errors = validate(schema, document)
    if (errors.length > 0) return errors
    return {
      schema,
      operationName: params.operationName,
      document,
      variableValues: params.variables,
      contextValue: await contextFactory(),
      rootValue: { execute, subscribe },
    }
  },
})
server.listen(Number(process.env.PORT), process.env.HOST)
