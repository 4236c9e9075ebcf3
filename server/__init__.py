"""The edge: GraphQL over HTTP and WebSocket, who is calling, pages, health, and the command line. Builds everything."""
