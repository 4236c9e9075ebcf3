// Mercurius on Fastify: queries compiled at their first execution, sockets of its own.
import fastify from 'fastify'
import mercurius from 'mercurius'
import { contextOf, schema } from './loaders.mjs'

const app = fastify({ logger: false })
app.register(mercurius, {
  schema,
  jit: 1,
  graphiql: false,
  context: (request) => contextOf(request.headers.authorization),
  subscription: {
    onConnect: (data) => contextOf(data.payload?.authorization),
  },
})
await app.listen({ host: process.env.HOST, port: Number(process.env.PORT) })
