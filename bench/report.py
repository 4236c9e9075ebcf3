"""The figures as Markdown."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TypeVar

from bench.cores import Cores
from bench.load_http import HttpRound
from bench.load_streams import StreamRound
from bench.window import Usage

T = TypeVar("T")
_PACKAGES = ("aiohttp", "asyncpg", "graphql-core", "orjson", "strawberry-graphql", "tortoise-orm", "uvloop")
# Above this share of its core the generator (with PostgreSQL) may be what slows a server down.
_BUSY = 0.9
# Above this share of the server's core, others' work is worth a word.
_NOISY = 0.1


def heading(cores: Cores, connections: int) -> str:
    """What was compared, of which versions, on what machine."""
    cpu = f"{cpu_model()}, {platform.system()} {platform.release()}"
    places = f"server on core {cores.server}, generator and PostgreSQL on core {cores.generator}"
    if cores.shared:
        places += ": ONE CORE FOR ALL, so that the figures below say little"
    return (
        "## Threadgraph and a hand-written server without GraphQL (RAW)\n\n"
        f"- product: {revision()}; {packages()}\n"
        f"- machine: {cpu}; {places}; all on 127.0.0.1\n"
        f"- requests: closed loop, {connections} keep-alive connections; every answer is compared byte by byte\n"
        "- figures: median of the rounds (least–greatest); rounds of the two servers alternate, and a ratio is taken "
        "within a round\n"
        "- CPU is the server process's, user and system; PostgreSQL's is not in it\n"
        "- yardstick: CPU of a fixed Python loop on the server's core before each round; where it varies, the machine "
        "does, and so does every other figure of time"
    )


def requests_table(title: str, product: Sequence[HttpRound], raw: Sequence[HttpRound]) -> str:
    """One kind of request."""
    rows = [
        _row("CPU ms/request", product, raw, lambda one: one.cpu_ms, "{:.3f}"),
        _row("requests/s", product, raw, lambda one: one.per_second, "{:.0f}"),
        _row("p50 ms", product, raw, lambda one: one.p50_ms, "{:.1f}"),
        _row("p99 ms", product, raw, lambda one: one.p99_ms, "{:.1f}"),
        *_usage_rows(product, raw),
    ]
    return _table(title, rows, len(product)) + _remarks(product, raw)


def streams_table(product: Sequence[StreamRound], raw: Sequence[StreamRound], rate: int, *, title: str = "") -> str:
    """One number of streams, each with one reader where the title does not say otherwise."""
    title = title or f"S: {product[0].streams} streams x 1 reader x {rate} tokens/s"
    rows = [
        _row("CPU µs/event", product, raw, lambda one: one.cpu_us_event, "{:.1f}"),
        _row("CPU µs/token", product, raw, lambda one: one.cpu_us_token, "{:.1f}"),
        _row("events/s", product, raw, lambda one: one.events / one.usage.seconds, "{:.0f}", ratio=False),
        _row("tokens delivered, %", product, raw, lambda one: one.delivered * 100, "{:.1f}", ratio=False),
        _row("tokens/event", product, raw, lambda one: one.tokens / one.events, "{:.2f}", ratio=False),
        _row("lag p50 ms", product, raw, lambda one: one.p50_ms, "{:.1f}", ratio=False),
        _row("lag p99 ms", product, raw, lambda one: one.p99_ms, "{:.1f}", ratio=False),
        _row("server memory MiB", product, raw, lambda one: one.resident_mib, "{:.0f}", ratio=False),
        *_usage_rows(product, raw),
    ]
    problems = [problem for one in (*product, *raw) for problem in one.problems]
    told = "".join(f"\nPROBLEM: {problem}" for problem in dict.fromkeys(problems))
    return _table(title, rows, len(product)) + _remarks(product, raw) + told


def _usage_rows(product: Sequence[HttpRound | StreamRound], raw: Sequence[HttpRound | StreamRound]) -> list[str]:
    return [
        _row("server, % of its core", product, raw, lambda one: one.usage.server * 100, "{:.0f}", ratio=False),
        _row(
            "generator's core busy, %", product, raw, lambda one: one.usage.generator_core * 100, "{:.0f}", ratio=False
        ),
        _row("… by the generator, %", product, raw, lambda one: one.usage.generator * 100, "{:.0f}", ratio=False),
        _row("yardstick ms", product, raw, lambda one: one.usage.yardstick_ms, "{:.0f}"),
    ]


def _row(
    name: str, product: Sequence[T], raw: Sequence[T], figure: Callable[[T], float], form: str, *, ratio: bool = True
) -> str:
    ours, theirs = [figure(one) for one in product], [figure(one) for one in raw]
    quotients = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    compared = _spread(quotients, "{:.2f}") if ratio else ""
    return f"| {name} | {_spread(ours, form)} | {_spread(theirs, form)} | {compared} |"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))}–{form.format(max(values))})"


def _table(title: str, rows: list[str], rounds: int) -> str:
    head = f"### {title}\n\n| {rounds} round{'s' if rounds > 1 else ''} | product | RAW | product/RAW |"
    return "\n".join([head, "| --- | --- | --- | --- |", *rows])


def _remarks(product: Sequence[HttpRound | StreamRound], raw: Sequence[HttpRound | StreamRound]) -> str:
    remarks = ""
    for name, rounds in (("product", product), ("RAW", raw)):
        usages: list[Usage] = [one.usage for one in rounds]
        if (busy := max(usage.generator_core for usage in usages)) > _BUSY:
            remarks += (
                f"\nThe generator's core was {busy:.0%} busy for {name}: rates and times may be its limit, not the "
                "server's."
            )
        if (others := max(usage.others for usage in usages)) > _NOISY:
            remarks += (
                f"\nNOISE: other processes had up to {others:.0%} of the core of {name}; all its figures are worse for "
                "that. Run it on an idle machine."
            )
    return remarks and "\n" + remarks


def packages() -> str:
    """The versions of what it is made of."""
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def revision() -> str:
    """Of this repository."""
    root = Path(__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown revision"
    return f"revision {described.stdout.strip()}"


def cpu_model() -> str:
    """Of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return sys.platform
