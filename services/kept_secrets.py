"""Secrets that the server makes for itself, where the operator gives none: files in the data folder."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def kept_secret(file: Path) -> str:
    """The 64 hexadecimal digits kept in a file, for the server's user only; made where there is none.

    Whoever dies meanwhile leaves no half of it, and of several that make one at once all get the same.

    Raises:
        OSError: the folder cannot be written to.
    """
    with suppress(FileNotFoundError):
        return file.read_text()
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w") as target:
            target.write(secrets.token_hex(32))
            target.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            file.hardlink_to(made)
    finally:
        made.unlink()
    return file.read_text()
