"""The composition root: builds every part, in order, and closes them in the reverse order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
from aiohttp import web

from config import VENDORS, Settings, SettingsError
from graph.context import Services
from models.database import Database, DatabaseUnavailableError, PooledError
from models.embedded import EmbeddedPostgres, EmbeddedPostgresError
from models.ids import new_id
from models.parts import Part
from models.tracing import NO_TRACING, Tracing
from providers.base import Provider
from providers.catalog import Catalog, CatalogError, load_catalog
from providers.endpoints import Endpoints
from providers.guard import EndpointGuard, EndpointRefusedError, Resolve
from providers.http import Deadlines, make_client_session
from providers.registry import ModelRecord, ModelRegistry, UnknownModelError
from providers.scripted import BUILT_IN_SCRIPTS, ScriptedProvider, ScriptError, load_scripts
from server.account_files import AccountFiles
from server.app import Application
from server.connections import KEEPALIVE_SECONDS
from server.embedded import embedded_postgres
from server.graphql_socket import SocketTimes
from server.ingest import Ingest, IngestLimits
from server.issuers import KeySetReader, issuers
from server.operations import Operations
from server.pages import OK, Health
from server.vault import open_vault
from services.accounts import Accounts
from services.attachments import AttachmentLimits, Attachments
from services.backfills.background import BackgroundBackfills
from services.backfills.registry import backfills
from services.budgets import BudgetLimits, Budgets
from services.changes import Changes
from services.claims import Claims
from services.custom_providers import CustomProviders
from services.exports import Exports
from services.forks import Forks
from services.generated_images import GeneratedImages
from services.generation import GenerationLimits, Generations
from services.identity import Identities, Issuer
from services.imports import Imports
from services.keys import KeySet
from services.message_stream import MessageStream
from services.messages import Messages
from services.models import Models
from services.own_access import OwnAccessReader
from services.projects import Projects
from services.provider_keys import ProviderKeys
from services.rates import Rates, UserRate
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
from streams.ending import find_written
from streams.hub import Hub
from streams.leases import LeaseKeeper
from streams.recovery import LogUnavailableError, Reaper, Sealed

if TYPE_CHECKING:
    from streams.valkey import ValkeyBackend

log = logging.getLogger(__name__)

_REAP_SECONDS = 2.0
_SOLE_PATIENCE_SECONDS = 10.0
_READY_SECONDS = 2.0
_LOOK_SECONDS = 2.0
_SWEEP_SECONDS = 30.0
_DAY = 86_400.0
_WATCH_SECONDS = 1.0
# In a drain, for the last message of answers to be on its way to their readers.
_TOLD_SECONDS = 2.0
# A restart or failover of Valkey's that is over by then is nobody's business; readers see a pause.
_CHANNEL_PATIENCE_SECONDS = 5.0
# What one address may begin a minute, so many addresses may together.
_ADDRESSES_AT_ONCE = 10
_DRAINING = "draining"
_OUT_OF_REACH = "out of reach"
_POOLED = (
    "a pooler in transaction mode is in between; use its session mode, or the address of PostgreSQL itself "
    "(this server has a pool of its own)"
)
_NOT_ALONE = "another server uses this database, and BROADCAST_URL=memory:// allows one only"


class Server:
    """One server process: `start`, then `drain` and `close`.

    Args:
        settings: where and how to serve.
        postgres: the embedded database, where it was begun already; it is stopped by `close`.
        providers: further models, for tests: each with the provider that streams it.
        resolve: asks for the addresses of users' endpoints, for tests; None: the system's name server.
        tracing: who makes spans, for tests; by default the settings say.
        socket_times: how long the clients of sockets are waited for, for tests.
        clock: what the rates of users go by, for tests.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        postgres: EmbeddedPostgres | None = None,
        providers: list[tuple[ModelRecord, Provider]] | None = None,
        resolve: Resolve | None = None,
        tracing: Tracing | None = None,
        socket_times: SocketTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._resolve = resolve
        self._more_models = providers or []
        self._stack = AsyncExitStack()
        self._postgres = postgres
        self._backend: ValkeyBackend | None = None
        self._tracing = tracing
        self._socket_times = socket_times or SocketTimes()
        self._clock = clock
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
        self.generations.draining = True
        # Whatever it took over now, another server would find a whole lease later.
        await self.reaper.stop()
        # What was taken is made, and begins: it must not begin behind the drain's back.
        deadline = time.monotonic() + grace
        await self.turns.settled(grace)
        await self.generations.drain(max(0.0, deadline - time.monotonic()))
        await self.message_stream.settled(_TOLD_SECONDS)
        await self.application.sockets.close_all()

    async def close(self) -> None:
        """Close what is open, the last made first."""
        await self._stack.aclose()

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        if settings.database_url is None:
            self._postgres = self._postgres or embedded_postgres(settings)
            stack.push_async_callback(asyncio.to_thread, self._postgres.stop)
        keys = KeySetReader()
        stack.push_async_callback(keys.close)
        # Before the database is opened: what is wrong with the settings is said at once.
        trusted = issuers(settings, keys.fetch)
        ingest = self._ingest()
        vault = open_vault(settings)
        tracing = self._tracing or await self._open_tracing()
        self.operations = Operations(tracing)
        self.database = await self._open_database()
        self.hub, self.channel, sealed = await self._open_channel()
        self.leases = LeaseKeeper(
            await self._open_lease_database(),
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
            self._rate(settings.uploads_per_minute, "uploads"),
        )
        images = GeneratedImages(self.database, attachments)
        self.generations = Generations(
            self.database, self.hub, self.leases, self.channel, self.wakeups, limits, images, tracing
        )
        await self.generations.listen()
        self.accounts = Accounts(self.database, self.generations)
        stack.push_async_callback(self.accounts.close)
        registry = await self._registry()
        key_changes = self._rate(settings.key_changes_per_minute, "changes of keys and endpoints")
        provider_keys = self.provider_keys = ProviderKeys(self.database, vault, registry.providers.keys, key_changes)
        self.custom_providers = CustomProviders(
            self.database,
            provider_keys,
            registry.providers.keys,
            check_endpoint=self._checked_endpoint,
            allowed=settings.custom_providers,
            rate=key_changes,
        )
        own = OwnAccessReader(provider_keys, self.custom_providers)
        models = self.models = Models(self.database, registry, own.read)
        reaper = self.reaper = Reaper(
            self.database,
            living=lambda: [buffer.message_id for buffer in self.hub],
            every_seconds=_REAP_SECONDS,
            lease_seconds=settings.lease_seconds,
            prices_of=registry.prices_of,
            used=self.wakeups.ring,
            sealed=sealed,
            log_away=lambda: self.hub.out_of_reach_seconds > 0,
            restart=lambda hold: self.turns.restart(hold),
        )
        titles = self.titles = Titles(self.database, models, self.wakeups, settings.title_model)
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
            others={"attachments": attachments.sweep, "accounts": self.accounts.sweep},
        )
        self.leases.start()
        stack.push_async_callback(self.leases.stop)
        background = BackgroundBackfills(self.database, backfills(vault))
        background.start()
        stack.push_async_callback(background.stop)
        self.sweeper.start()
        stack.push_async_callback(self.sweeper.stop)
        stack.push_async_callback(self.generations.drain, 0)
        for issuer in trusted:
            if isinstance(issuer.keys, KeySet):
                issuer.keys.start()
                stack.push_async_callback(issuer.keys.stop)
        services = self._services(models, titles, trusted, attachments, storage)
        if not self._is_shared:
            # Nobody else can be alive on this database: what is live in it was lost with the process before.
            await reaper.reap(all_others=True)
        reaper.start()
        stack.push_async_callback(reaper.stop)
        await self._serve(services, storage, ingest)

    @property
    def _is_shared(self) -> bool:
        """Whether other servers may be at work on the same database."""
        return not self.settings.broadcast_url.startswith("memory:")

    async def _open_channel(self) -> tuple[Hub, BroadcastChannel, Sealed | None]:
        """Where live answers are, how processes tell each other things, and how a dead one's log is sealed."""
        stack, url = self._stack, self.settings.broadcast_url
        if not self._is_shared:
            channel = BroadcastChannel(MemoryBackend())
            await channel.connect()
            stack.push_async_callback(channel.close)
            return Hub(), channel, None
        # Here, because the client takes a while to import that a server for itself alone need not wait for.
        from streams.shared_hub import SharedHub
        from streams.token_log import LogName, TokenLog
        from streams.valkey import LOST, ValkeyBackend, reason

        try:
            backend, token_log = ValkeyBackend(url), TokenLog(url)
        except ValueError as error:
            raise SettingsError(f"BROADCAST_URL: {error}") from error
        self._backend = backend
        stack.push_async_callback(token_log.close)
        channel = BroadcastChannel(backend)
        await channel.connect()
        stack.push_async_callback(channel.close)
        hub = SharedHub(
            token_log,
            find=lambda ids: find_written(self.database, ids),
            lost=lambda message_id: self.generations.lose(message_id),
        )
        hub.start()
        stack.push_async_callback(hub.stop)

        async def sealed(message_id: UUID, attempt: int) -> list[Part]:
            try:
                return await token_log.sealed(LogName(message_id, attempt))
            except LOST as error:
                raise LogUnavailableError(f"its log is out of reach: {reason(error)}") from error

        return hub, channel, sealed

    async def _open_database(self) -> Database:
        settings, stack = self.settings, self._stack
        url = settings.database_url
        if url is None:
            assert self._postgres is not None
            await asyncio.to_thread(self._postgres.start)
            url = self._postgres.url
        database = Database(
            url, pool_size=settings.database_pool_size, timeout_seconds=settings.database_timeout_seconds
        )
        try:
            if settings.database_url is not None:
                await database.check_sessions()
            await database.migrate()
            await database.connect()
        except PooledError as error:
            raise SettingsError(f"DATABASE_URL: {_POOLED}") from error
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            whose = "the embedded database" if settings.database_url is None else "DATABASE_URL: the database"
            raise SettingsError(f"{whose} cannot be used ({_without_address(error)})") from error
        stack.push_async_callback(database.close)
        if not await database.claim_server(_SOLE_PATIENCE_SECONDS, shared=self._is_shared):
            raise SettingsError(f"DATABASE_URL: {_NOT_ALONE}")
        watching = asyncio.create_task(self._watch_database(database), name="database watch")
        stack.push_async_callback(_end, watching)
        return database

    async def _open_lease_database(self) -> Database:
        """Connections for the leases alone: the answers of a server whose pool is used up are not a dead one's.

        One that hangs is given up while there is time for another to renew what others believe.
        """
        settings = self.settings
        database = Database(
            self.database.url,
            pool_size=2,
            timeout_seconds=min(settings.database_timeout_seconds, settings.lease_seconds),
        )
        await database.connect()
        self._stack.push_async_callback(database.close)
        return database

    async def _watch_database(self, database: Database) -> None:
        """Start the embedded database again if it dies; claim the database again if the claim's connection breaks."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                if self._postgres is not None and await asyncio.to_thread(self._postgres.restart_if_dead):
                    log.error("the embedded PostgreSQL had ended by itself and was started again")
                if not await database.claim_server(0, shared=self._is_shared):
                    log.error(_NOT_ALONE)
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                EmbeddedPostgresError,
            ) as error:
                log.warning("the database is out of reach: %s", type(error).__name__)
            except Exception:
                log.exception("watching the database failed; trying again")

    async def _registry(self) -> ModelRegistry:
        settings = self.settings
        catalog = await asyncio.to_thread(self._catalog)
        endpoints = self._endpoints()
        scripts = dict(BUILT_IN_SCRIPTS) if settings.scripted_models else {}
        if settings.scripted_models_file is not None:
            try:
                scripts |= await asyncio.to_thread(load_scripts, settings.scripted_models_file)
            except ScriptError as error:
                raise SettingsError(f"SCRIPTED_MODELS_FILE: {error}") from error
        scripted = ScriptedProvider(scripts)
        fixed: list[tuple[ModelRecord, Provider]] = [
            (ModelRecord(name, name, "scripted", name, script.prices), scripted) for name, script in scripts.items()
        ]
        try:
            registry = ModelRegistry(
                catalog,
                operators=self._operators(catalog, endpoints),
                connect=endpoints.connect,
                fixed=fixed + self._more_models,
                default=settings.default_model,
            )
        except UnknownModelError as error:
            raise SettingsError(f"DEFAULT_MODEL: {settings.default_model!r} is not offered") from error
        if settings.title_model is not None and registry.find(settings.title_model) is None:
            raise SettingsError(f"TITLE_MODEL: {settings.title_model!r} is not offered")
        return registry

    def _catalog(self) -> Catalog:
        settings = self.settings
        try:
            catalog = load_catalog(settings.models_file)
        except CatalogError as error:
            raise SettingsError(f"MODELS_FILE: {error}") from error
        for provider, base_url in (("openai", settings.openai_base_url), ("anthropic", settings.anthropic_base_url)):
            if base_url is not None:
                catalog = catalog.with_base_url(provider, base_url)
        for provider, names in (("openai", settings.openai_models), ("anthropic", settings.anthropic_models)):
            try:
                catalog = catalog.with_only(provider, names) if names else catalog
            except CatalogError as error:
                raise SettingsError(f"{provider.upper()}_MODELS: {error}") from error
        return catalog

    def _operators(self, catalog: Catalog, endpoints: Endpoints) -> dict[str, Provider]:
        """What everybody can use: the providers that the operator has a key for, or that want none."""
        settings = self.settings
        keys: dict[str, str | None] = {
            name: None for name, endpoint in catalog.providers.items() if not endpoint.needs_key
        }
        given = dict(settings.provider_api_keys)
        if unknown := given.keys() - catalog.providers.keys():
            raise SettingsError(f"PROVIDER_API_KEYS: there is no provider {min(unknown)!r}")
        keys |= given
        keys |= settings.vendor_keys
        operators: dict[str, Provider] = {}
        for name, key in keys.items():
            try:
                operators[name] = endpoints.connect(catalog.providers[name], key)
            except ValueError as error:
                source = f"{name.upper()}_BASE_URL or {name.upper()}_API_KEY" if name in VENDORS else "MODELS_FILE"
                raise SettingsError(f"{source}: {error}") from error
            self._stack.push_async_callback(operators[name].close)
        return operators

    def _endpoints(self) -> Endpoints:
        settings = self.settings
        self.guard = EndpointGuard(
            allowed=settings.custom_provider_allow, ports=settings.custom_provider_ports, resolve=self._resolve
        )
        session, guarded = make_client_session(), self.guard.make_session()
        self._stack.push_async_callback(session.close)
        self._stack.push_async_callback(guarded.close)
        return Endpoints(
            session,
            guarded,
            deadlines=self._deadlines(),
            anthropic_max_tokens=settings.anthropic_max_tokens,
        )

    async def _checked_endpoint(self, base_url: str, look_up: bool) -> str:
        try:
            return await self.guard.check(base_url, look_up=look_up)
        except EndpointRefusedError as error:
            raise ValueError(error.message) from None

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
        self, models: Models, titles: Titles, trusted: list[Issuer], attachments: Attachments, storage: Storage
    ) -> Services:
        settings = self.settings
        per_minute = settings.anonymous_sessions_per_minute
        sessions = Sessions(
            self.database,
            secret=self._secret,
            ttl_seconds=settings.session_ttl_seconds,
            allowed=settings.anonymous_sessions,
            take=Rates(each=per_minute, total=per_minute * _ADDRESSES_AT_ONCE).take,
        )
        identities = Identities(self.database, sessions, trusted)
        messages = Messages(self.database)
        turns = self.turns = Turns(
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
            rate=self._rate(settings.turns_per_minute, "questions"),
        )
        threads = Threads(self.database, end_live=self.generations.end_live)
        projects = Projects(self.database, models, end_live=self.generations.end_live)
        sharing = Sharing(self.database, attachments, self._rate(settings.shares_per_minute, "links and forks"))
        user_settings = UserSettings(self.database, models)
        self.message_stream = MessageStream(
            self.hub, messages, self.generations, patience_seconds=1.5 * settings.lease_seconds + 2 * _REAP_SECONDS
        )
        return Services(
            sessions=sessions,
            identities=identities,
            claims=Claims(
                self.database,
                sessions,
                end_live=self.generations.end_live,
                identities=identities,
                # In this order: the key of an endpoint that stays behind stays there, too.
                take_overs=(self.custom_providers.take_over, self.provider_keys.take_over),
            ),
            threads=threads,
            messages=messages,
            turns=turns,
            message_stream=self.message_stream,
            models=models,
            projects=projects,
            settings=user_settings,
            provider_keys=self.provider_keys,
            custom_providers=self.custom_providers,
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

    def _rate(self, per_minute: int, what: str) -> UserRate:
        return UserRate(per_minute, what, now=self._clock)

    async def _serve(self, services: Services, storage: Storage, ingest: Ingest | None) -> None:
        imports = self.imports = Imports(
            self.database,
            services.attachments,
            services.custom_providers,
            folder=self.settings.data_dir / "imports",
            max_bytes=self.settings.max_import_bytes,
        )
        files = AccountFiles(services.identities, services.exports, imports)
        health = Health(self._parts)
        self.application = Application(
            self.settings, services, health, storage, files, ingest, self.operations, self._socket_times
        )
        if self.settings.metrics_token is not None:
            self._show_metrics(self.settings.metrics_token, services)
        self.application.sockets.start()
        self._stack.push_async_callback(self.application.sockets.stop)
        runner = web.AppRunner(
            self.application.web,
            handle_signals=False,
            access_log=None,
            shutdown_timeout=2,
            keepalive_timeout=KEEPALIVE_SECONDS,
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        assert runner.server is not None
        connections = self.application.connections
        self._stack.push_async_callback(connections.close)
        try:
            self.address = await connections.listen(runner.server, self.settings.host, self.settings.port)
        except OSError as error:
            raise SettingsError(f"HOST and PORT: cannot listen there ({error.strerror or error})") from error

    def _ingest(self) -> Ingest | None:
        settings = self.settings
        if settings.ingest_url is None:
            return None
        if settings.ingest_api_key is None:
            raise SettingsError("INGEST_URL: INGEST_API_KEY is needed with it")
        session = make_client_session()
        self._stack.push_async_callback(session.close)
        return Ingest(
            session,
            url=settings.ingest_url,
            assets_url=settings.ingest_assets_url or settings.ingest_url,
            key=settings.ingest_api_key,
            rates=Rates(each=settings.ingest_requests_per_minute, total=settings.ingest_total_requests_per_minute),
            limits=IngestLimits(max_bytes=settings.ingest_max_bytes),
        )

    async def _open_tracing(self) -> Tracing:
        settings = self.settings
        endpoint = settings.otel_exporter_otlp_endpoint
        if endpoint is None:
            return NO_TRACING
        try:
            # Here, because few have it installed, and it takes half a second.
            from server.tracing import otlp_tracing
        except ImportError as error:
            raise SettingsError(
                "OTEL_EXPORTER_OTLP_ENDPOINT: spans need the packages opentelemetry-sdk and "
                "opentelemetry-exporter-otlp-proto-http"
            ) from error
        tracing = otlp_tracing(endpoint, settings.otel_exporter_otlp_headers, service_name=settings.otel_service_name)
        self._stack.push_async_callback(asyncio.to_thread, tracing.close)
        return tracing

    def _show_metrics(self, token: str, services: Services) -> None:
        # Here, because its library takes a while to import that who does not look need not wait for.
        from server.metrics import Heart, MetricsPage, Observed

        heart = Heart()
        heart.start()
        self._stack.push_async_callback(heart.stop)
        observed = Observed(
            database=self.database,
            hub=self.hub,
            channel=self.channel,
            backend=self._backend,
            generations=self.generations,
            message_stream=services.message_stream,
            reaper=self.reaper,
            titles=self.titles,
            sweeper=self.sweeper,
            sockets=self.application.sockets,
            requests=self.application.requests,
            operations=self.operations,
        )
        page = self.metrics = MetricsPage(observed, heart, token)
        self.application.web.router.add_get("/metrics", page.get)

    async def _parts(self) -> dict[str, str]:
        """What new work needs, and how it is."""
        parts = {
            "turns": _DRAINING if self.generations.draining else OK,
            "database": OK if await self._database_answers() else _OUT_OF_REACH,
        }
        if self._is_shared:
            # Without it a reader of this server sees nothing of an answer before its end. Another server may be better.
            silent = self.hub.out_of_reach_seconds
            parts["channel"] = _OUT_OF_REACH if silent > _CHANNEL_PATIENCE_SECONDS else OK
        return parts

    async def _database_answers(self) -> bool:
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
