"""The commands that work on the database: `migrate`, `backfill` and `seed`. Each may run beside a server."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import asyncpg

from config import Settings, SettingsError
from models.database import Database, DatabaseUnavailableError
from models.ids import IdKind, outside_id
from server.embedded import embedded_postgres
from server.progress import ProgressLine
from server.vault import open_vault
from services.backfills.registry import backfills
from services.backfills.runner import (
    Backfill,
    BackfillProgress,
    BackfillRunningError,
    BackfillState,
    Pace,
    backfill_states,
    run_backfill,
)
from services.seed import SeedPlan, seed
from services.viewer import Sessions, session_secret

# After a batch, half of the time that it took: others come to their turn.
_REST = 0.5
_MESSAGES_OF_A_THREAD = 20


async def run_command(arguments: Namespace, settings: Settings) -> int:
    """Run `migrate`, `backfill` or `seed`; the exit status is 0, 1 where it could not be done, 2 for wrong arguments.

    Raises:
        SettingsError, EmbeddedPostgresError: there is no usable database.
    """
    task = asyncio.current_task()
    assert task is not None
    # As Ctrl-C does: the database that the command started is stopped.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async with open_database(settings) as database:
            match arguments.command:
                case "backfill" if arguments.name is None:
                    return await _list_backfills(backfills(open_vault(settings)), database)
                case "backfill":
                    return await _backfill(arguments, backfills(open_vault(settings)), database)
                case "seed":
                    return await _seed(arguments, settings, database)
            print("The tables are those of this version.")
            return 0
    except DatabaseUnavailableError as error:
        print(f"The database went away, or was too busy ({error}). What was done is kept.", file=sys.stderr)
    return 1


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """The database of the settings, with its tables as this version wants them; the embedded one is started if need be.

    Raises:
        SettingsError, EmbeddedPostgresError: there is no usable database.
    """
    url, postgres = settings.database_url, None
    if url is None:
        postgres = embedded_postgres(settings)
        if not await asyncio.to_thread(postgres.join):
            print("Working on the database of the server that runs.", file=sys.stderr)
        url = postgres.url
    try:
        database = Database(url, pool_size=2, timeout_seconds=settings.database_timeout_seconds)
        try:
            await database.migrate()
            await database.connect()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise SettingsError(f"the database cannot be used ({type(error).__name__})") from error
        try:
            yield database
        finally:
            await database.close()
    finally:
        if postgres is not None:
            await asyncio.to_thread(postgres.stop)


async def _backfill(arguments: Namespace, known_ones: Sequence[Backfill], database: Database) -> int:
    backfill = next((one for one in known_ones if one.name == arguments.name), None)
    if backfill is None:
        known = ", ".join(one.name for one in known_ones)
        print(f"There is no backfill {arguments.name!r}; there are: {known}.", file=sys.stderr)
        return 2
    state = await _state(database, backfill.name)
    if state.finished_at is not None and not (arguments.restart or arguments.dry_run):
        print(f"{backfill.name}: {_state_text(state)}. To run it again: --restart.")
        return 0
    line = ProgressLine(backfill.name + (" (dry run)" if arguments.dry_run else ""), "rows")

    def tell(progress: BackfillProgress) -> None:
        line.show(progress.rows_done, progress.rows_in_all)

    try:
        progress = await run_backfill(
            database,
            backfill,
            Pace(arguments.batch, _REST),
            dry_run=arguments.dry_run,
            restart=arguments.restart,
            tell=tell,
        )
    except BackfillRunningError:
        print(f"{backfill.name} is being run by another process, or by the server itself.", file=sys.stderr)
        return 1
    finally:
        line.end()
    written = f"{progress.rows_written:,}"
    if arguments.dry_run:
        print(f"{backfill.name}: would write {written} rows. Nothing was written.")
    else:
        print(f"{backfill.name}: finished, {progress.rows_done:,} rows looked at; this run wrote {written}.")
    if note := backfill.note():
        print(note)
    return 0


async def _list_backfills(known_ones: Sequence[Backfill], database: Database) -> int:
    for backfill in known_ones:
        state = await _state(database, backfill.name)
        print(f"{backfill.name:<20} {_state_text(state)}\n{'':<20} {backfill.description}")
    return 0


async def _state(database: Database, name: str) -> BackfillState:
    async with database.acquire() as connection:
        return (await backfill_states(connection, [name]))[0]


def _state_text(state: BackfillState) -> str:
    if state.finished_at is not None:
        return f"finished at {state.finished_at:%Y-%m-%d %H:%M} UTC, {state.rows_done:,} rows"
    if state.started_at is not None:
        return f"unfinished, {state.rows_done:,} rows since {state.started_at:%Y-%m-%d %H:%M} UTC"
    return "never run"


async def _seed(arguments: Namespace, settings: Settings, database: Database) -> int:
    try:
        plan = SeedPlan(
            users=arguments.users,
            threads=arguments.threads or max(1, arguments.messages // _MESSAGES_OF_A_THREAD),
            messages=arguments.messages,
            seed=arguments.seed,
            now=datetime.now(UTC),
        )
    except ValueError as error:
        print(f"This cannot be made: {error}.", file=sys.stderr)
        return 2
    line = ProgressLine("seed", "messages")
    began = time.monotonic()
    try:
        user_id = await seed(database, plan, lambda messages: line.show(messages, plan.messages))
    finally:
        line.end()
    seconds = time.monotonic() - began
    print(
        f"Made {plan.users:,} users, {plan.threads:,} threads and {plan.messages:,} messages in {seconds:.1f} s "
        f"({plan.messages / seconds:,.0f} messages/s)."
    )
    sessions = Sessions(
        database,
        secret=settings.session_secret or session_secret(settings.data_dir),
        ttl_seconds=settings.session_ttl_seconds,
        allowed=True,
    )
    print(
        f"\nThe first of them is {outside_id(IdKind.USER, user_id)}. To be that user in GraphiQL, put this into the "
        f'tab Headers:\n\n{{"Authorization": "Bearer {sessions.session_of(user_id).token}"}}'
    )
    return 0
