"""The limit of descriptors is raised to what sockets need, and never lowered."""

from __future__ import annotations

import subprocess
import sys

import pytest

_RAISE = """
import resource, sys
from server.descriptors import allow_descriptors
soft, hard, sockets = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
told = allow_descriptors(sockets)
assert (told, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)
print(told)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "sockets", "allowed"),
    [(256, 4_000, 1_000, 2_024), (256, 4_000, 20_000, 4_000), (3_000, 4_000, 1_000, 3_000)],
    ids=["to what sockets need", "no further than it may", "not down"],
)
def test_the_limit_is_raised(soft: int, hard: int, sockets: int, allowed: int) -> None:
    command = [sys.executable, "-c", _RAISE, str(soft), str(hard), str(sockets)]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) == allowed
