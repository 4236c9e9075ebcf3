"""Answers while they are written: the shared buffer, cursors, the channel, leases, checkpoints and recovery."""
