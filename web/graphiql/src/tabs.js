// The tabs of a first visit. GraphiQL keeps the visitor's own ones in localStorage afterwards.

const KEY = 'threadgraph:idempotencyKey';
const TABS = 'graphiql:tabState';

function uuid() {
  if (crypto.randomUUID) {
    return crypto.randomUUID();
  }
  // Not there on plain HTTP from another machine.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
}

/** A new key for every page load: the one that the last load made is replaced in the tabs that GraphiQL kept. */
function freshKey() {
  const key = uuid();
  try {
    const last = localStorage.getItem(KEY);
    const tabs = localStorage.getItem(TABS);
    if (last && tabs?.includes(last)) {
      localStorage.setItem(TABS, tabs.replaceAll(last, key));
    }
    localStorage.setItem(KEY, key);
  } catch {
    // no localStorage: no kept tabs either
  }
  return key;
}

const ASK = `# Sends a message; the next tab reads the answer.
# The same idempotencyKey gives the same answer;
# reload the page, or change the key, to ask anew.
mutation Ask($input: SendMessageInput!) {
  sendMessage(input: $input) {
    thread {
      id
      title
    }
    assistantMessage {
      id
      status
    }
  }
}
`;

const READ = `# Reads an answer while it is written, event by event.
# Give a cursor as $after to go on behind it.
subscription Read($messageId: ID!, $after: Cursor) {
  messageStream(messageId: $messageId, after: $after) {
    __typename
    ... on MessageDelta {
      cursor
      kind
      text
    }
    ... on MessagePartAdded {
      cursor
    }
    ... on MessageReset {
      cursor
    }
    ... on MessageEnded {
      cursor
      message {
        status
        text
      }
    }
  }
}
`;

const THREADS = `query Threads {
  threads(first: 10) {
    edges {
      node {
        id
        title
        pinned
        updatedAt
      }
    }
    pageInfo {
      hasNextPage
      endCursor
    }
  }
}
`;

const json = (value) => JSON.stringify(value, null, 2);

export const defaultTabs = [
  {
    query: ASK,
    variables: json({ input: { idempotencyKey: freshKey(), text: 'What is a resumable stream?' } }),
  },
  { query: READ, variables: json({ messageId: 'paste assistantMessage.id here', after: null }) },
  { query: THREADS },
];

function keptTab() {
  try {
    const { tabs, activeTabIndex } = JSON.parse(localStorage.getItem(TABS));
    return tabs[activeTabIndex];
  } catch {
    return undefined; // a first visit
  }
}

// What the editors hold at first. GraphiQL itself does not fill in the variables of a tab that was never edited.
const shown = keptTab() ?? defaultTabs[0];
export const initialQuery = shown.query ?? '';
export const initialVariables = shown.variables ?? '';
