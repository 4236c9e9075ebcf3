"""Who is compared: the product, RAW, and servers of others that answer the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench import servers
from bench.load_http import get_request, graphql_request
from bench.load_streams import OpenStream, open_peer_stream, open_product_stream, open_raw_stream
from bench.servers import PEERS, BenchError, Place, ServerProcess


@dataclass(frozen=True, slots=True)
class RequestKind:
    """The same question to all servers: a GraphQL document, and a path of RAW."""

    title: str
    query: str
    path: str


REQUESTS = {
    "Q": RequestKind(
        "Q: a page of 50 threads with their projects",
        """
        query Threads {
          threads(first: 50) {
            nodes { id title pinned createdAt updatedAt project { id name } }
            pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
          }
        }
        """,
        "/threads?first=50",
    ),
    "M": RequestKind(
        "M: 10 threads with their last 10 messages",
        """
        query Histories {
          threads(first: 10) { nodes { id title messages(last: 10) { nodes { id role text createdAt } } } }
        }
        """,
        "/histories?threads=10&messages=10",
    ),
}


# What the servers by Node have in common: `bench/peers/loaders.mjs` and what is beneath it.
_SCHEMA_OF_NODE = ("graphql", "@graphql-tools/schema", "dataloader", "pg", "fast-jwt")


@dataclass(frozen=True, slots=True)
class Contender:
    """One server of the comparison.

    Attributes:
        name: what it is called in the tables and on the command line.
        made_of: what it is, with versions.
        make: the server, not started; raises BenchError where this machine cannot run it.
        request: the bytes that ask it one kind of request with a user's token.
        open_stream: a reader of a token stream.
    """

    name: str
    made_of: Callable[[], str]
    make: Callable[[Place, Path], ServerProcess]
    request: Callable[[RequestKind, str], bytes]
    open_stream: OpenStream


def _graphql(kind: RequestKind, token: str) -> bytes:
    return graphql_request(kind.query, token)


def _get(kind: RequestKind, token: str) -> bytes:
    return get_request(kind.path, token)


def _by_node(name: str, script: str, about: str, packages: tuple[str, ...]) -> Contender:
    return Contender(
        name=name,
        made_of=lambda: f"{_of_npm(packages)} on Node {_node_version()}: {about}",
        make=lambda place, _: servers.by_node(place, name, script),
        request=_graphql,
        open_stream=open_peer_stream,
    )


def _of_pip(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {version(name)}" for name in packages)


def _of_npm(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {_installed(name)}" for name in packages)


def _installed(package: str) -> str:
    try:
        return str(json.loads((PEERS / "node_modules" / package / "package.json").read_bytes())["version"])
    except OSError:
        return "(not installed)"


def _node_version() -> str:
    node = shutil.which("node")
    if node is None:
        return "(not installed)"
    return subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()


PRODUCT = Contender(
    name="product",
    made_of=lambda: _of_pip(("strawberry-graphql", "graphql-core", "aiohttp", "asyncpg", "orjson", "uvloop")),
    make=servers.product,
    request=_graphql,
    open_stream=open_product_stream,
)
RAW = Contender(
    name="RAW",
    made_of=lambda: _of_pip(("aiohttp", "asyncpg", "orjson", "uvloop")) + ": written by hand, without GraphQL",
    make=lambda place, _: servers.raw(place),
    request=_get,
    open_stream=open_raw_stream,
)
CONTENDERS = (
    PRODUCT,
    RAW,
    _by_node(
        "Mercurius",
        "mercurius.mjs",
        "queries compiled from the first execution on, DataLoader, its own sockets",
        (*_SCHEMA_OF_NODE, "mercurius", "graphql-jit", "fastify", "@fastify/websocket"),
    ),
    _by_node(
        "Yoga",
        "yoga.mjs",
        "on node:http, queries and subscriptions compiled, DataLoader",
        (*_SCHEMA_OF_NODE, "graphql-yoga", "@envelop/graphql-jit", "graphql-ws", "ws"),
    ),
    _by_node(
        "Apollo",
        "apollo.mjs",
        "on Fastify, documents parsed and validated once, DataLoader",
        (*_SCHEMA_OF_NODE, "@apollo/server", "@as-integrations/fastify", "fastify", "graphql-ws", "ws"),
    ),
    Contender(
        name="Strawberry",
        made_of=lambda: (
            _of_pip(("strawberry-graphql", "graphql-core", "aiohttp", "tortoise-orm", "asyncpg", "uvloop"))
            + ": documents parsed and validated once, DataLoader"
        ),
        make=lambda place, _: servers.plain_strawberry(place),
        request=_graphql,
        open_stream=open_peer_stream,
    ),
)


def chosen(names: str) -> list[Contender]:
    """The contenders of these names, separated by commas and in any case; the product and RAW are always there.

    Raises:
        BenchError: one of them is none.
    """
    by_name = {contender.name.lower(): contender for contender in CONTENDERS}
    wanted = {name.strip().lower() for name in names.split(",") if name.strip()}
    if unknown := wanted - set(by_name):
        raise BenchError(f"There is no {', '.join(sorted(unknown))}; there are {', '.join(by_name)}.")
    wanted |= {PRODUCT.name.lower(), RAW.name.lower()}
    return [contender for name, contender in by_name.items() if name in wanted]
