// Subscriptions by graphql-transport-ws, for servers without sockets of their own.
import { useServer } from 'graphql-ws/use/ws'
import { WebSocketServer } from 'ws'
import { contextOf, schema } from './loaders.mjs'

/** Serve sockets at /graphql of a server of `node:http`. */
export function serveSockets(server, options = {}) {
  const sockets = new WebSocketServer({ server, path: '/graphql', perMessageDeflate: false })
  useServer(
    {
      schema,
      onConnect: (connection) => {
        connection.extra.context = contextOf(connection.connectionParams?.authorization)
      },
      context: (connection) => connection.extra.context,
      ...options,
    },
    sockets,
  )
}
