"""The benchmark: this server beside one written by hand without GraphQL, in one run. `python -m bench`, Linux only."""
