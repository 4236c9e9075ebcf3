"""The figures as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.load_streams import StreamRound
from bench.report import PRODUCT, RAW, Results

_COLOURS = {PRODUCT: "#1f6feb", RAW: "#57606a"}
_OTHERS = "#c9d1d9"
_SERIES = ("//", "")


def draw(results: Results, path: Path) -> None:
    """CPU of a request, CPU of an event and the lag of events, of each server."""
    mpl.use("Agg")
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    kinds = {
        f"{kind}": {name: median(one[name].cpu_ms for one in rounds if name in one) for name in _present(rounds)}
        for kind, rounds in results.requests.items()
    }
    _bars(left, "CPU of a request, ms", kinds, "{:.2f}")
    _bars(middle, "CPU of a token event, µs", _of_streams(results, lambda one: one.cpu_us_event), "{:.0f}")
    _bars(right, "lag of events, p99, ms", _of_streams(results, lambda one: one.p99_ms), "{:.0f}", logarithmic=True)
    figure.savefig(path, dpi=110)


def _of_streams(results: Results, figure: Callable[[StreamRound], float]) -> dict[str, dict[str, float]]:
    return {
        f"{count} streams": {
            name: median(figure(one[name]) for one in rounds if name in one) for name in _present(rounds)
        }
        for count, rounds in results.streams.items()
    }


def _present(rounds: Sequence[object]) -> list[str]:
    return list(dict.fromkeys(name for one in rounds for name in one))  # type: ignore[attr-defined]


def _bars(axes: Axes, title: str, series: dict[str, dict[str, float]], form: str, *, logarithmic: bool = False) -> None:
    """Horizontal bars: a group for each server, in it one for each series."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    thickness = 0.8 / max(1, len(series))
    for number, (label, values) in enumerate(series.items()):
        places = [names.index(name) + (number - (len(series) - 1) / 2) * thickness for name in values]
        bars = axes.barh(
            places,
            list(values.values()),
            height=thickness * 0.92,
            color=[_COLOURS.get(name, _OTHERS) for name in values],
            edgecolor="white",
            hatch=_SERIES[number % len(_SERIES)],
        )
        axes.bar_label(bars, labels=[f"{label}: {form.format(value)}" for value in values.values()], padding=3, size=7)
    longest = max((value for values in series.values() for value in values.values()), default=1.0)
    if logarithmic:
        axes.set_xscale("log")
    # Room for the labels.
    axes.set_xlim(right=longest * (100 if logarithmic else 1.4))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
