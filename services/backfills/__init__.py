"""Repairs of kept data, in batches that can be stopped and resumed."""
