// The schema with its resolvers, and the loaders that they use: DataLoader's, new for each request. Mercurius has loaders
// of its own, which write every object that they are asked for as JSON to tell it from others; with these it is faster.
import { makeExecutableSchema } from '@graphql-tools/schema'
import DataLoader from 'dataloader'
import { messagesOf, projectsOf, textOf, threadsOf, userOf, wordsOf } from './data.mjs'
import { typeDefs } from './schema.mjs'

/** What resolvers are given: who asks, and loaders. A plain object, because servers copy it. */
export function contextOf(authorization) {
  const user = userOf(authorization)
  const loaders = { projects: undefined, messages: undefined }
  return { user, loaders }
}

function projectLoader({ user, loaders }) {
  loaders.projects ??= new DataLoader((keys) => projectsOf(user, keys))
  return loaders.projects
}

/** One loader for each number of messages that is asked for. */
function messageLoader({ user, loaders }, last) {
  loaders.messages ??= new Map()
  let loader = loaders.messages.get(last)
  if (loader === undefined) {
    loader = new DataLoader((keys) => messagesOf(user, keys, last))
    loaders.messages.set(last, loader)
  }
  return loader
}

export const schema = makeExecutableSchema({
  typeDefs,
  resolvers: {
    Query: { threads: (_, page, context) => threadsOf(context.user, page) },
    Subscription: { messageStream: { subscribe: (_, { messageId }) => wordsOf(Number(messageId)) } },
    Thread: {
      project: (thread, _, context) =>
        thread.projectKey === null ? null : projectLoader(context).load(thread.projectKey),
      messages: (thread, { last = 25 }, context) => messageLoader(context, last).load(thread.key),
    },
    Message: { text: textOf },
  },
})
