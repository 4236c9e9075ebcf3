// The part of the product's schema that the benchmark asks for, the same for every server.
export const typeDefs = /* GraphQL */ `
  scalar Cursor
  scalar DateTime

  type Query {
    threads(first: Int, after: Cursor): ThreadConnection!
  }

  type Subscription {
    messageStream(messageId: ID!, after: Cursor): MessageStreamEvent!
  }

  type ThreadConnection {
    nodes: [Thread!]!
    pageInfo: PageInfo!
  }

  type PageInfo {
    hasNextPage: Boolean!
    hasPreviousPage: Boolean!
    startCursor: Cursor
    endCursor: Cursor
  }

  type Thread {
    id: ID!
    title: String!
    pinned: Boolean!
    createdAt: DateTime!
    updatedAt: DateTime!
    project: Project
    messages(last: Int): MessageConnection!
  }

  type Project {
    id: ID!
    name: String!
  }

  type MessageConnection {
    nodes: [Message!]!
  }

  type Message {
    id: ID!
    role: MessageRole!
    status: MessageStatus!
    text: String!
    createdAt: DateTime!
    error: MessageError
  }

  enum MessageRole {
    USER
    ASSISTANT
    SYSTEM
  }

  enum MessageStatus {
    STREAMING
    COMPLETE
    STOPPED
    FAILED
    INTERRUPTED
  }

  type MessageError {
    message: String!
  }

  enum DeltaKind {
    TEXT
    REASONING
  }

  union MessageStreamEvent = MessageDelta | MessagePartAdded | MessageReset | MessageEnded

  type MessageDelta {
    cursor: Cursor!
    kind: DeltaKind!
    text: String!
  }

  type MessagePartAdded {
    cursor: Cursor!
  }

  type MessageReset {
    cursor: Cursor!
    message: Message!
  }

  type MessageEnded {
    cursor: Cursor!
    message: Message!
  }
`
