"""How far a long command has come, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_BAR_CELLS = 24
_BAR_SECONDS = 0.1
_LINE_SECONDS = 5.0


class ProgressLine:
    """One line that is written over and over.

    Args:
        what: what is being done.
        unit: of what the numbers are, in the plural.
    """

    def __init__(self, what: str, unit: str, stream: TextIO | None = None) -> None:
        self._what = what
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._began = time.monotonic()
        self._first: int | None = None
        self._shown_at = 0.0
        self._last = ""

    def show(self, done: int, in_all: int | None) -> None:
        """Show that so many are done; what was done at the first call does not count for the speed."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = done, now
        self._last = self._text(done, in_all, now - self._began)
        if now - self._shown_at >= (_BAR_SECONDS if self._is_terminal else _LINE_SECONDS):
            self._shown_at = now
            self._write("" if self._is_terminal else "\n")

    def end(self) -> None:
        """Show the last state, and leave the line."""
        if self._last:
            self._write("\n")

    def _write(self, end: str) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + self._last[:width].ljust(width) + end)
        else:
            self._stream.write(self._last + end)
        self._stream.flush()

    def _text(self, done: int, in_all: int | None, seconds: float) -> str:
        new = done - (self._first or 0)
        speed = new / seconds if seconds > 0 else 0.0
        numbers = f"{done:,} {self._unit}  {speed:,.0f}/s"
        if not in_all:
            return f"{self._what}  {numbers}"
        # The number of all is an estimate: what is not done yet is not 100 %.
        share = min(done / in_all, 1.0)
        full = int(share * _BAR_CELLS)
        bar = f"[{'#' * full}{'.' * (_BAR_CELLS - full)}] " if self._is_terminal else ""
        left = f"  {_duration((in_all - done) / speed)} left" if speed > 0 and done < in_all else ""
        return f"{self._what}  {bar}{share:4.0%}  {done:,} of {in_all:,} {self._unit}  {speed:,.0f}/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
