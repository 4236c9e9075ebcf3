"""Metrics, request ids and readiness over real sockets: what was counted is what was done, and who may read it."""
