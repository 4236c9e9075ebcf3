"""What the benchmark says is what was measured."""

from __future__ import annotations

import pytest

from bench import contenders, report
from bench.load_http import HttpRound
from bench.load_streams import StreamRound
from bench.report import Results
from bench.servers import BenchError
from bench.window import Usage


def _usage(server_seconds: float = 1.0, others: float = 0.0, generator_core: float = 0.5) -> Usage:
    return Usage(
        seconds=1.0,
        server_seconds=server_seconds,
        others=others,
        generator=0.1,
        generator_core=generator_core,
        yardstick_ms=10.0,
    )


def _asked(cpu_ms: float, **more: float) -> HttpRound:
    return HttpRound(requests=1_000, p50_ms=1.0, p99_ms=2.0, usage=_usage(cpu_ms, **more))


def _told(cpu_us: float) -> StreamRound:
    return StreamRound(
        streams=10,
        events=300,
        tokens=300,
        p50_ms=1.0,
        p99_ms=2.0,
        resident_mib=50.0,
        problems=["it hung up"],
        usage=_usage(cpu_us * 300 / 1e6),
    )


def _row(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine was twice as slow in the second round: the ratio of the medians would be 1.5.
    rounds = [
        {"product": _asked(2.0), "RAW": _asked(1.0)},
        {"product": _asked(4.0), "RAW": _asked(2.0)},
        {"product": _asked(2.0), "RAW": _asked(1.0)},
    ]
    assert report.ratios(rounds, "product", lambda one: one.cpu_ms) == [2.0, 2.0, 2.0]
    assert _row(report.requests_table("Q", rounds), "product")[1:3] == ["2.000 (2.000–4.000)", "2.00 (2.00–2.00)"]


def test_a_server_that_failed_in_one_round_keeps_what_it_showed_before() -> None:
    rounds = [
        {"product": _asked(3.0), "RAW": _asked(1.0), "Yoga": _asked(2.0)},
        {"product": _asked(3.0), "RAW": _asked(2.0)},
    ]
    assert report.ratios(rounds, "Yoga", lambda one: one.cpu_ms) == [2.0]
    assert _row(report.requests_table("Q", rounds), "Yoga")[1:3] == ["2.000", "2.00"]


def test_the_short_table_names_everybody_and_who_is_missing() -> None:
    results = Results(
        requests={"Q": [{"product": _asked(3.0), "RAW": _asked(1.0)}]},
        streams={10: [{"product": _told(40.0), "RAW": _told(20.0), "Apollo": _told(50.0)}]},
        missing={"Mercurius": "Node is not installed"},
    )
    table = report.summary(results)
    assert _row(table, "product") == ["product", "3.00 ms, 3.00", "40 µs (2.00), 100 %, 2 ms"]
    assert _row(table, "Apollo") == ["Apollo", "", "50 µs (2.50), 100 %, 2 ms"]
    assert "Mercurius" in table
    assert "Node is not installed" in table


def test_noise_a_busy_generator_and_problems_are_told() -> None:
    quiet = report.requests_table("Q", [{"product": _asked(1.0), "RAW": _asked(1.0)}])
    assert "NOISE" not in quiet
    assert "may be its limit" not in quiet
    loud = report.requests_table("Q", [{"product": _asked(1.0, others=0.4, generator_core=0.95), "RAW": _asked(1.0)}])
    assert "NOISE: other processes had up to 40%" in loud
    assert "busy for product: rates" in " ".join(loud.split())
    streams = report.streams_table([{"product": _told(1.0), "RAW": _told(1.0)}], 30)
    assert "PROBLEM: RAW: it hung up" in streams


def test_a_table_takes_the_place_of_the_one_before() -> None:
    document = "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n"
    once = report.with_table(document, "| new |")
    assert once == "before\n<!-- bench:begin -->\n| new |\n<!-- bench:end -->\nafter\n"
    assert report.with_table(once, "| new |") == once
    with pytest.raises(ValueError, match="marks"):
        report.with_table("no marks", "| new |")


def test_the_readme_has_a_place_for_the_table() -> None:
    report.with_table((report.ROOT / "README.md").read_text(), "")


def test_product_and_raw_are_in_every_choice_of_servers() -> None:
    assert [one.name for one in contenders.chosen("apollo, YOGA")] == ["product", "RAW", "Yoga", "Apollo"]
    with pytest.raises(BenchError, match="no express"):
        contenders.chosen("express")
