// Apollo Server 5 on Fastify, sockets by graphql-ws.
import { ApolloServer } from '@apollo/server'
import {
  ApolloServerPluginCacheControlDisabled,
  ApolloServerPluginLandingPageDisabled,
  ApolloServerPluginUsageReportingDisabled,
} from '@apollo/server/plugin/disabled'
import fastifyApollo from '@as-integrations/fastify'
import fastify from 'fastify'
import { contextOf, schema } from './loaders.mjs'
import { serveSockets } from './sockets.mjs'

const apollo = new ApolloServer({
  schema,
  introspection: false,
  stopOnTerminationSignals: false,
  plugins: [
    ApolloServerPluginCacheControlDisabled(),
    ApolloServerPluginLandingPageDisabled(),
    ApolloServerPluginUsageReportingDisabled(),
  ],
})
await apollo.start()
const app = fastify({ logger: false })
await app.register(fastifyApollo(apollo), {
  path: '/graphql',
  context: async (request) => contextOf(request.headers.authorization),
})
serveSockets(app.server)
await app.listen({ host: process.env.HOST, port: Number(process.env.PORT) })
