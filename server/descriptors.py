"""Descriptors: each socket takes one, and many systems give a process 1,024 though it may have far more."""

from __future__ import annotations

import contextlib

# For files, the database, other servers.
_OTHERS = 1_024


def allow_descriptors(sockets: int) -> int | None:
    """Raise this process's limit to what so many sockets need, as far as it may; the limit, None where none is."""
    try:
        import resource
    except ImportError:  # not there on Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    wanted = sockets + _OTHERS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        # Some systems have a further limit, which they do not tell.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft
