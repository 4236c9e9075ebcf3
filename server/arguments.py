"""What the command line takes. Imports nothing heavy: help is shown at once."""

from __future__ import annotations

import os
from argparse import ArgumentParser

_BATCH_ROWS = 1_000


def command_line() -> ArgumentParser:
    """The parser; `command` is None where none was given, which means `serve`."""
    parser = ArgumentParser(prog="threadgraph", description="Threadgraph: AI chat over GraphQL.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("serve", help="start the server (the default)")
    demo = commands.add_parser("demo", help="against a running server: ask, cut the connection, resume, compare")
    demo.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('PORT') or 8000}/graphql")
    demo.add_argument("--model", default=None, help="id of the model to ask")
    commands.add_parser("migrate", help="bring the tables up to this version, as every start does")
    backfill = commands.add_parser("backfill", help="run a backfill to its end, or list them all")
    backfill.add_argument("name", nargs="?", metavar="NAME", help="which; all are listed without it")
    backfill.add_argument("--dry-run", action="store_true", help="tell what it would write, and write nothing")
    backfill.add_argument("--restart", action="store_true", help="begin at the first row again")
    backfill.add_argument("--batch", type=_number, default=_BATCH_ROWS, help="most rows in a transaction (%(default)s)")
    seed = commands.add_parser("seed", help="make users with threads, messages and usage, for trying things out")
    seed.add_argument("--users", type=_number, default=10, help="users in all (%(default)s)")
    seed.add_argument("--messages", type=_number, default=5_000, help="messages in all (%(default)s)")
    seed.add_argument("--threads", type=_number, default=None, help="threads in all (one for 20 messages)")
    seed.add_argument("--seed", type=int, default=1, help="equal seeds make equal data (%(default)s)")
    commands.add_parser("settings", help="print every setting as Markdown")
    commands.add_parser("schema", help="print the GraphQL schema")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1_000_000_000:
        raise ValueError(text)
    return number
