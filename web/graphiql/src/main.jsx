import './workers.js';
import '@graphiql/react/style.css';
import '@graphiql/plugin-doc-explorer/style.css';
import '@graphiql/plugin-history/style.css';
import 'graphiql/graphiql.css';
import './style.css';
import { GraphiQL } from 'graphiql';
import { useSyncExternalStore } from 'react';
import { createRoot } from 'react-dom/client';
import { fetcher } from './fetcher.js';
import { authorization, getSnapshot, startSession, subscribe } from './session.js';
import { defaultTabs, initialQuery, initialVariables } from './tabs.js';

const LOSE = 'Start a new anonymous session? This page then no longer shows the threads of the one you have.';

function until({ expiresAt }) {
  const date = new Date(expiresAt);
  return Number.isNaN(date.getTime()) ? '' : ` until ${date.toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' })}`;
}

function Session() {
  const { session, failure, starting } = useSyncExternalStore(subscribe, getSnapshot);
  const renew = () => {
    if (session === null || window.confirm(LOSE)) {
      startSession();
    }
  };
  let text = 'no session';
  if (starting) {
    text = 'starting a session…';
  } else if (failure !== null) {
    text = `no new session: ${failure}`;
  } else if (session !== null) {
    text = `anonymous session${until(session)}`;
  }
  return (
    <div className="threadgraph-session">
      <span title="An Authorization header in the Headers editor of a tab wins over it." role="status">
        {text}
      </span>
      <button type="button" onClick={renew} disabled={starting}>
        new session
      </button>
    </div>
  );
}

authorization();
createRoot(document.getElementById('root')).render(
  <GraphiQL
    fetcher={fetcher}
    defaultTabs={defaultTabs}
    initialQuery={initialQuery}
    initialVariables={initialVariables}
    defaultEditorToolsVisibility="variables"
    shouldPersistHeaders={false}
  >
    <GraphiQL.Logo>Threadgraph</GraphiQL.Logo>
    <GraphiQL.Footer>
      <Session />
    </GraphiQL.Footer>
  </GraphiQL>,
);
