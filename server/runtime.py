"""The composition root: builds every part, in order, and closes them in the reverse order."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from functools import cached_property
from urllib.parse import urlsplit

import asyncpg
from aiohttp import ClientSession, web

from config import Settings, SettingsError
from graph.context import Services
from models.database import Database, DatabaseUnavailableError
from models.embedded import EmbeddedPostgres, EmbeddedPostgresError
from models.ids import new_id
from models.prices import ModelPrices
from providers.anthropic import AnthropicProvider
from providers.base import Provider
from providers.chat_completions import ChatCompletionsProvider
from providers.http import Deadlines, make_client_session
from providers.registry import ModelRecord, ModelRegistry, UnknownModelError
from providers.scripted import BUILT_IN_SCRIPTS, ScriptedProvider, ScriptError, load_scripts
from server.account_files import AccountFiles
from server.app import Application
from server.issuers import KeySetReader, issuers
from server.pages import Health
from services.accounts import Accounts
from services.attachments import AttachmentLimits, Attachments
from services.backfills.background import BackgroundBackfills
from services.backfills.registry import BACKFILLS
from services.budgets import BudgetLimits, Budgets
from services.changes import Changes
from services.claims import Claims
from services.exports import Exports
from services.forks import Forks
from services.generated_images import GeneratedImages
from services.generation import GenerationLimits, Generations
from services.identity import Identities, Issuer
from services.imports import Imports
from services.keys import KeySet
from services.message_stream import MessageStream
from services.messages import Messages
from services.projects import Projects
from services.search import Search
from services.settings import UserSettings
from services.sharing import Sharing
from services.sweeper import Retention, Sweeper
from services.threads import Threads
from services.titles import Titles
from services.turns import Turns
from services.usage import Usage
from services.viewer import Sessions, session_secret
from services.wakeups import Wakeups
from storage.base import Storage
from storage.local import LocalStorage
from streams.channel import BroadcastChannel, MemoryBackend
from streams.hub import Hub
from streams.leases import LeaseKeeper
from streams.recovery import Reaper

log = logging.getLogger(__name__)

_REAP_SECONDS = 2.0
_SOLE_PATIENCE_SECONDS = 10.0
_READY_SECONDS = 2.0
_LOOK_SECONDS = 2.0
_SWEEP_SECONDS = 30.0
_DAY = 86_400.0
_WATCH_SECONDS = 1.0


class Server:
    """One server process: `start`, then `drain` and `close`.

    Args:
        settings: where and how to serve.
        providers: further models, for tests: each with the provider that streams it.
    """

    def __init__(self, settings: Settings, *, providers: list[tuple[ModelRecord, Provider]] | None = None) -> None:
        self.settings = settings
        self._more_models = providers or []
        self._stack = AsyncExitStack()
        self._postgres: EmbeddedPostgres | None = None
        self.address = ""

    @cached_property
    def _secret(self) -> str:
        return self.settings.session_secret or session_secret(self.settings.data_dir)

    async def start(self) -> None:
        """Start everything; when this returns, requests are answered at `address`.

        Raises:
            SettingsError, EmbeddedPostgresError, OSError: something is not as the settings say; all is closed again.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def drain(self) -> None:
        """Take no new turns, let running answers end within the grace, and send the readers away to come back."""
        grace = self.settings.shutdown_grace_seconds
        if len(self.generations):
            log.info("%d answers are being written; they have %g s to end", len(self.generations), grace)
        await self.generations.drain(grace)
        await self.application.sockets.close_all()

    async def close(self) -> None:
        """Close what is open, the last made first."""
        await self._stack.aclose()

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        keys = KeySetReader()
        stack.push_async_callback(keys.close)
        # Before the database is opened: what is wrong with the settings is said at once.
        trusted = issuers(settings, keys.fetch)
        self.database = await self._open_database()
        self.hub = Hub()
        self.channel = BroadcastChannel(MemoryBackend())
        await self.channel.connect()
        stack.push_async_callback(self.channel.close)
        self.leases = LeaseKeeper(
            self.database,
            holder=new_id(),
            lease_seconds=settings.lease_seconds,
            checkpoint_seconds=settings.checkpoint_seconds,
            lost=lambda message_id: self.generations.lose(message_id),
        )
        limits = GenerationLimits(
            settings.provider_idle_seconds, settings.provider_total_seconds, settings.max_output_chars
        )
        self.wakeups = Wakeups(self.database, self.channel, look_seconds=_LOOK_SECONDS)
        await self.wakeups.start()
        stack.push_async_callback(self.wakeups.stop)
        storage = self.storage = self._storage()
        stack.push_async_callback(storage.close)
        attachments = self.attachments = Attachments(
            self.database,
            storage,
            AttachmentLimits(
                settings.max_attachment_bytes,
                settings.max_attachment_quota_bytes,
                settings.attachment_url_seconds,
                settings.unlinked_attachment_seconds,
            ),
        )
        images = GeneratedImages(self.database, attachments)
        self.generations = Generations(self.database, self.hub, self.leases, self.channel, self.wakeups, limits, images)
        await self.generations.listen()
        self.accounts = Accounts(self.database, self.generations)
        stack.push_async_callback(self.accounts.close)
        models = await self._models()
        reaper = Reaper(
            self.database,
            living=lambda: [buffer.message_id for buffer in self.hub],
            every_seconds=_REAP_SECONDS,
            lease_seconds=settings.lease_seconds,
            prices_of=models.prices_of,
            used=self.wakeups.ring,
        )
        # Nobody else can be alive on this database: what is live in it was lost with the process before.
        await reaper.reap(all_others=True)
        titles = Titles(self.database, models, self.wakeups, settings.title_model)
        stack.push_async_callback(titles.close)
        self.sweeper = Sweeper(
            self.database,
            Retention(
                threads=None if settings.thread_retention_days is None else settings.thread_retention_days * _DAY,
                changes=settings.changes_retention_days * _DAY,
                idempotency_keys=settings.idempotency_retention_days * _DAY,
            ),
            end_live=self.generations.end_live,
            every_seconds=_SWEEP_SECONDS,
            others=(attachments.sweep, self.accounts.sweep),
        )
        self.leases.start()
        stack.push_async_callback(self.leases.stop)
        reaper.start()
        stack.push_async_callback(reaper.stop)
        backfills = BackgroundBackfills(self.database, BACKFILLS)
        backfills.start()
        stack.push_async_callback(backfills.stop)
        self.sweeper.start()
        stack.push_async_callback(self.sweeper.stop)
        stack.push_async_callback(self.generations.drain, 0)
        for issuer in trusted:
            if isinstance(issuer.keys, KeySet):
                issuer.keys.start()
                stack.push_async_callback(issuer.keys.stop)
        await self._serve(self._services(models, titles, trusted, attachments, storage), storage)

    async def _open_database(self) -> Database:
        settings, stack = self.settings, self._stack
        url = settings.database_url
        if url is None:
            postgres = EmbeddedPostgres(
                settings.data_dir / "postgres", max_connections=settings.database_pool_size + 20
            )
            await asyncio.to_thread(postgres.start)
            stack.push_async_callback(asyncio.to_thread, postgres.stop)
            url, self._postgres = postgres.url, postgres
        database = Database(
            url, pool_size=settings.database_pool_size, timeout_seconds=settings.database_timeout_seconds
        )
        try:
            await database.migrate()
            await database.connect()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            whose = "the embedded database" if settings.database_url is None else "DATABASE_URL: the database"
            raise SettingsError(f"{whose} cannot be used ({_without_address(error)})") from error
        stack.push_async_callback(database.close)
        if not await database.claim_sole_server(_SOLE_PATIENCE_SECONDS):
            raise SettingsError(
                "DATABASE_URL: another server uses this database, and BROADCAST_URL=memory:// allows one only"
            )
        watching = asyncio.create_task(self._watch_database(database), name="database watch")
        stack.push_async_callback(_end, watching)
        return database

    async def _watch_database(self, database: Database) -> None:
        """Start the embedded database again if it dies; claim the database again if the claim's connection breaks."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                if self._postgres is not None and await asyncio.to_thread(self._postgres.restart_if_dead):
                    log.error("the embedded PostgreSQL had ended by itself and was started again")
                if not await database.claim_sole_server(0):
                    log.error("another server uses this database now; BROADCAST_URL=memory:// allows one only")
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                EmbeddedPostgresError,
            ) as error:
                log.warning("the database is out of reach: %s", type(error).__name__)

    async def _models(self) -> ModelRegistry:
        settings = self.settings
        models: list[tuple[ModelRecord, Provider]] = []
        by_openai = settings.openai_api_key is not None or settings.openai_base_url != Settings.openai_base_url
        by_anthropic = (
            settings.anthropic_api_key is not None or settings.anthropic_base_url != Settings.anthropic_base_url
        )
        if by_openai or by_anthropic:
            session = make_client_session()
            self._stack.push_async_callback(session.close)
        if by_openai:
            chat_completions = self._chat_completions(session)
            prices = {name: ModelPrices(*of_one) for name, of_one in settings.openai_prices}
            if unknown := prices.keys() - set(settings.openai_models):
                raise SettingsError(f"OPENAI_PRICES: {min(unknown)!r} is not among OPENAI_MODELS")
            models += [
                (ModelRecord(name, name, "openai", name, prices.get(name)), chat_completions)
                for name in settings.openai_models
            ]
        if by_anthropic:
            anthropic = self._anthropic(session)
            models += [(ModelRecord(name, name, "anthropic", name), anthropic) for name in settings.anthropic_models]
        if by_openai and by_anthropic and (twice := {*settings.openai_models} & {*settings.anthropic_models}):
            raise SettingsError(f"ANTHROPIC_MODELS: {min(twice)!r} is among OPENAI_MODELS too")
        scripts = dict(BUILT_IN_SCRIPTS) if settings.scripted_models else {}
        if settings.scripted_models_file is not None:
            try:
                scripts |= await asyncio.to_thread(load_scripts, settings.scripted_models_file)
            except ScriptError as error:
                raise SettingsError(f"SCRIPTED_MODELS_FILE: {error}") from error
        scripted = ScriptedProvider(scripts)
        models += [
            (ModelRecord(name, name, "scripted", name, script.prices), scripted) for name, script in scripts.items()
        ]
        models += self._more_models
        try:
            registry = ModelRegistry(models, default=settings.default_model)
        except UnknownModelError as error:
            raise SettingsError(f"DEFAULT_MODEL: {settings.default_model!r} is not offered") from error
        if settings.title_model is not None and registry.find(settings.title_model) is None:
            raise SettingsError(f"TITLE_MODEL: {settings.title_model!r} is not offered")
        return registry

    def _chat_completions(self, session: ClientSession) -> Provider:
        settings = self.settings
        try:
            adapter = ChatCompletionsProvider(
                session=session,
                base_url=settings.openai_base_url,
                api_key=settings.openai_api_key,
                deadlines=self._deadlines(),
            )
        except ValueError as error:
            raise SettingsError(f"OPENAI_BASE_URL or OPENAI_API_KEY: {error}") from error
        self._stack.push_async_callback(adapter.close)
        return adapter

    def _anthropic(self, session: ClientSession) -> Provider:
        settings = self.settings
        try:
            adapter = AnthropicProvider(
                session=session,
                base_url=settings.anthropic_base_url,
                api_key=settings.anthropic_api_key,
                max_text_tokens=settings.anthropic_max_tokens,
                deadlines=self._deadlines(),
            )
        except ValueError as error:
            raise SettingsError(f"ANTHROPIC_BASE_URL or ANTHROPIC_API_KEY: {error}") from error
        self._stack.push_async_callback(adapter.close)
        return adapter

    def _deadlines(self) -> Deadlines:
        idle = self.settings.provider_idle_seconds
        return Deadlines(
            first_event_seconds=idle, idle_seconds=idle, total_seconds=self.settings.provider_total_seconds
        )

    def _storage(self) -> Storage:
        settings = self.settings
        if settings.storage_url is None:
            return LocalStorage(
                settings.data_dir / "attachments",
                secret=self._secret,
                address=self._address,
            )
        if settings.s3_access_key_id is None or settings.s3_secret_access_key is None:
            raise SettingsError("STORAGE_URL: S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY are needed with it")
        # Here, because it takes a third of a second that who keeps files locally need not wait for.
        from storage.s3 import S3Settings, S3Storage

        place = urlsplit(settings.storage_url)
        prefix = place.path.strip("/")
        return S3Storage(
            S3Settings(
                bucket=place.netloc,
                prefix=f"{prefix}/" if prefix else "",
                endpoint=settings.s3_endpoint_url,
                region=settings.s3_region,
                access_key_id=settings.s3_access_key_id,
                secret_access_key=settings.s3_secret_access_key,
            )
        )

    def _address(self) -> str:
        """Where browsers reach the server; by default those of this machine, though it may listen to others, too."""
        if self.settings.public_url is not None:
            return self.settings.public_url
        host, port = self.address.removeprefix("http://").rsplit(":", 1)
        return f"http://localhost:{port}" if host in ("0.0.0.0", "[::]") else self.address  # noqa: S104

    def _services(
        self, models: ModelRegistry, titles: Titles, trusted: list[Issuer], attachments: Attachments, storage: Storage
    ) -> Services:
        settings = self.settings
        sessions = Sessions(
            self.database,
            secret=self._secret,
            ttl_seconds=settings.session_ttl_seconds,
            allowed=settings.anonymous_sessions,
        )
        identities = Identities(self.database, sessions, trusted)
        messages = Messages(self.database)
        turns = Turns(
            self.database,
            self.hub,
            self.leases,
            self.generations,
            models,
            titles,
            Budgets(
                BudgetLimits(
                    tokens_per_day=settings.budget_tokens_per_day,
                    tokens_per_month=settings.budget_tokens_per_month,
                    cost_micros_per_day=settings.budget_cost_micros_per_day,
                    cost_micros_per_month=settings.budget_cost_micros_per_month,
                    answer_tokens=settings.budget_answer_tokens,
                )
            ),
            max_message_bytes=settings.max_message_bytes,
            max_history_chars=settings.max_history_chars,
            temporary_seconds=settings.temporary_thread_seconds,
            storage=storage,
        )
        threads = Threads(self.database, end_live=self.generations.end_live)
        projects = Projects(self.database, models, end_live=self.generations.end_live)
        sharing = Sharing(self.database, attachments)
        user_settings = UserSettings(self.database, models)
        return Services(
            sessions=sessions,
            identities=identities,
            claims=Claims(self.database, sessions, end_live=self.generations.end_live, identities=identities),
            threads=threads,
            messages=messages,
            turns=turns,
            message_stream=MessageStream(
                self.hub, messages, self.generations, patience_seconds=settings.lease_seconds + 2 * _REAP_SECONDS
            ),
            models=models,
            projects=projects,
            settings=user_settings,
            forks=Forks(self.database),
            sharing=sharing,
            usage=Usage(self.database, self.wakeups),
            attachments=attachments,
            changes=Changes(self.database, self.wakeups, threads, messages, projects, sharing, user_settings),
            wakeups=self.wakeups,
            search=Search(self.database),
            accounts=self.accounts,
            exports=Exports(self.database, storage, secret=self._secret, address=self._address),
        )

    async def _serve(self, services: Services, storage: Storage) -> None:
        imports = self.imports = Imports(
            self.database,
            services.attachments,
            folder=self.settings.data_dir / "imports",
            max_bytes=self.settings.max_import_bytes,
        )
        files = AccountFiles(services.identities, services.exports, imports)
        health = Health(is_ready=self._is_ready)
        self.application = Application(self.settings, services, health, storage, files)
        self.application.sockets.start()
        self._stack.push_async_callback(self.application.sockets.stop)
        runner = web.AppRunner(self.application.web, handle_signals=False, access_log=None, shutdown_timeout=2)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, self.settings.host, self.settings.port)
        try:
            await site.start()
        except OSError as error:
            raise SettingsError(f"HOST and PORT: cannot listen there ({error.strerror or error})") from error
        host, port = runner.addresses[0][:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def _is_ready(self) -> bool:
        if self.generations.draining:
            return False
        try:
            async with asyncio.timeout(_READY_SECONDS), self.database.acquire() as connection:
                return bool(await connection.fetchval("SELECT true"))
        except (TimeoutError, DatabaseUnavailableError):
            return False


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _without_address(error: Exception) -> str:
    """What is wrong, without the URL: it may hold a password."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"{type(error).__name__}: {error}" if isinstance(error, asyncpg.PostgresError) else type(error).__name__
