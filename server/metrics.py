"""`/metrics`: what the parts of the server have counted, as Prometheus reads it.

The numbers live as plain integers on the objects where things happen, and are read here when somebody asks: nothing is
done for metrics while a token passes. The page tells how busy a server is and what its clients call their operations,
so it is read by whoever has the token, and by nobody else (docs/decisions/0020-observability.md).

Imported only where METRICS_TOKEN is set: the library takes a while to import.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from models.database import Database
from models.metrics import Histogram
from server.graphql_socket import GraphQLSockets
from server.operations import Operations
from server.requests import Requests
from services.generation import Generations
from services.message_stream import MessageStream
from services.sweeper import Sweeper
from services.titles import Titles
from streams.buffer import JOINED_PIECES
from streams.channel import BroadcastChannel
from streams.hub import Hub
from streams.recovery import Reaper
from streams.shared_hub import SharedHub
from streams.valkey import ValkeyBackend

_BEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The parts of one server that are looked at. `backend` None: `memory://`."""

    database: Database
    hub: Hub
    channel: BroadcastChannel
    backend: ValkeyBackend | None
    generations: Generations
    message_stream: MessageStream
    reaper: Reaper
    titles: Titles
    sweeper: Sweeper
    sockets: GraphQLSockets
    requests: Requests
    operations: Operations


class Heart:
    """How late the event loop comes to what is due, looked at twice a second: the first sign of a server at its limit.

    Started and stopped by the composition root.
    """

    def __init__(self) -> None:
        self.lateness = Histogram()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._beat(), name="event loop lag")

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due = now() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            self.lateness.observe(max(0.0, now() - due))


class ServerCollector(Collector):
    """All metrics of one server, read when they are asked for."""

    def __init__(self, observed: Observed, heart: Heart) -> None:
        self._of = observed
        self._heart = heart

    def collect(self) -> Iterable[Metric]:
        """Every metric, in the order of docs/observability.md."""
        yield from self._streams()
        yield from self._answers()
        yield from self._operations()
        yield from self._database()
        yield from self._channel()
        yield from self._time()

    def _streams(self) -> Iterable[Metric]:
        hub, reading = self._of.hub, self._of.message_stream
        buffers = hub.read_here
        appends, characters = hub.appended
        yield _gauge("streams_live", "Answers that are being written by this process.", len(hub.written_here))
        yield _gauge("stream_readers", "Subscriptions to messageStream that are open.", reading.readers)
        waiting = sum(buffer.readers_waiting for buffer in buffers)
        yield _gauge("stream_readers_waiting", "Of those, the ones that have everything and wait for more.", waiting)
        held = sum(buffer.length for buffer in buffers)
        yield _gauge("stream_buffered_characters", "Characters in the buffers of live answers.", held)
        yield _counter("stream_appends", "Pieces of answers (tokens, mostly) taken from providers.", appends)
        yield _counter("stream_characters", "Characters of answers taken from providers.", characters)
        yield _counter("stream_events_delivered", "Events given to readers.", reading.delivered)
        yield _counters(
            "stream_reads", "Reads of an answer, by whether they began with a cursor.", ["from"], _by_one(reading.begun)
        )
        yield _counter("stream_resets", "Readers told that text they hold was lost with a server.", reading.resets)
        yield _counter("stream_stops", "Requests to stop an answer.", reading.stops)
        lag = f"From the append of a piece to its reader's socket, for one piece in {JOINED_PIECES}."
        yield _histogram("stream_delivery_lag_seconds", lag, [], [((), reading.lag)])

    def _answers(self) -> Iterable[Metric]:
        counts, reaper = self._of.generations.counts, self._of.reaper
        yield _counters(
            "answers", "Answers that ended, by status and error code.", ["status", "code"], counts.ends.items()
        )
        yield _histogram("answer_seconds", "From the start of an answer to its end.", [], [((), counts.seconds)])
        first = "From the start of an answer to its first piece."
        yield _histogram("answer_first_piece_seconds", first, [], [((), counts.first_seconds)])
        yield _counters("tokens", "Tokens consumed by answers.", ["kind"], _by_one(counts.tokens))
        yield _counter("reaper_take_overs", "Streams taken from servers whose lease ran out.", reaper.taken_over)
        yield _counter("reaper_restarts", "Answers begun anew of which nothing had come.", reaper.restarted)
        yield _counter("reaper_ends", "Answers ended for servers that were lost.", reaper.ended)
        yield _counter("reaper_failures", "Answers that the reaper could not end; it tries again.", reaper.failed)
        yield _counters(
            "titles", "Titles asked of a model, by how that went.", ["outcome"], _by_one(self._of.titles.outcomes)
        )

    def _operations(self) -> Iterable[Metric]:
        operations, sockets = self._of.operations, self._of.sockets
        labels = ["type", "name", "outcome"]
        yield _counters("graphql_operations", "GraphQL operations that ended.", labels, operations.outcomes.items())
        how_long = "How long queries and mutations took."
        yield _histogram("graphql_operation_seconds", how_long, ["type", "name"], operations.seconds.items())
        yield _gauge("sockets_open", "WebSockets that are open.", len(sockets))
        yield _gauge(
            "socket_operations_running", "Operations, subscriptions mostly, that run on them.", sockets.running
        )
        gone = "WebSockets closed because their clients did not read (unread), or did not answer a ping (silent)."
        yield _counters("sockets_let_go", gone, ["reason"], _by_one(sockets.let_go))
        counted = self._of.requests.responses.items()
        responses = [((method, route, str(status)), count) for (method, route, status), count in counted]
        yield _counters("http_responses", "HTTP responses begun.", ["method", "route", "status"], responses)

    def _database(self) -> Iterable[Metric]:
        database = self._of.database
        size, idle = database.connections
        yield _gauge("database_connections_max", "Connections that the pool may open.", database.pool_size)
        yield _gauge("database_connections_open", "Connections that the pool has open.", size)
        yield _gauge("database_connections_idle", "Of those, the ones that nobody uses.", idle)
        waits = "How long was waited for a connection of the pool."
        yield _histogram("database_wait_seconds", waits, [], [((), database.waits)])
        reasons = "Uses of the database that failed because it was out of reach or too slow, by what was raised."
        yield _counters("database_unavailable", reasons, ["error"], _by_one(database.unavailable))

    def _channel(self) -> Iterable[Metric]:
        hub, backend = self._of.hub, self._of.backend
        yield _counter("channel_messages_dropped", "Notices dropped for a slow handler.", self._of.channel.dropped)
        if backend is not None:
            yield _gauge("channel_connected", "Whether notices of others are heard.", int(backend.connected.is_set()))
            yield _counter("channel_reconnects", "How often the channel came back.", backend.returns)
            yield _counter("channel_notices_unsent", "Notices that could not be sent.", backend.unsent)
        if isinstance(hub, SharedHub):
            silent = "For how long the token log has not answered; 0 where it does."
            yield _gauge("token_log_out_of_reach_seconds", silent, hub.out_of_reach_seconds)
            yield _gauge("token_log_followed", "Answers of other processes that are read here.", hub.followed)
            ahead = "Characters that producers are ahead of the token log, and so of all readers."
            yield _gauge("token_log_unlogged_characters", ahead, hub.unlogged_characters)
            trips = "Round trips that append to the token log."
            yield _histogram("token_log_append_seconds", trips, [], [((), hub.round_trips)])
            yield _counter(
                "token_log_append_failures", "Appends that failed; they are tried again.", hub.failed_appends
            )
            yield _counter("token_log_read_failures", "Reads that failed; they are tried again.", hub.failed_reads)
            yield _counter("token_log_reconnects", "How often the token log came back.", hub.returns)
            yield _counter("token_log_rewrites", "Logs that were lost and written anew.", hub.rewritten)

    def _time(self) -> Iterable[Metric]:
        sweeper = self._of.sweeper
        yield _counters("swept", "What was deleted because its time had come.", ["kind"], _by_one(sweeper.done))
        yield _counter("sweep_failures", "Sweeps that failed; they are tried again.", sweeper.failed)
        yield _gauge("event_loop_tasks", "Tasks of the event loop that are not done.", len(asyncio.all_tasks()))
        late = "How late the event loop came to what was due."
        yield _histogram("event_loop_lag_seconds", late, [], [((), self._heart.lateness)])


class MetricsPage:
    """The handler of `/metrics`.

    Args:
        token: what its readers have to show.
    """

    def __init__(self, observed: Observed, heart: Heart, token: str) -> None:
        self.collectors = (ServerCollector(observed, heart), ProcessCollector(registry=CollectorRegistry()))
        self._expected = f"Bearer {token}".encode()

    async def get(self, request: web.Request) -> web.Response:
        """All metrics, in the format that is asked for; 401 without the token."""
        shown = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(shown, self._expected):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"}, text="Show the METRICS_TOKEN.\n")
        # Read here, where nothing changes meanwhile; written elsewhere, where it holds nobody up.
        snapshot = _Snapshot([metric for collector in self.collectors for metric in collector.collect()])
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = await asyncio.to_thread(encode, snapshot)
        return web.Response(body=body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


class _Snapshot(CollectorRegistry):
    """Metrics as they were at one moment."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Those metrics."""
        return self._metrics


_T = TypeVar("_T")
_Labelled: TypeAlias = Iterable[tuple[tuple[str, ...], _T]]


def _by_one(counts: Mapping[str, int]) -> _Labelled[int]:
    return (((label,), count) for label, count in counts.items())


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"threadgraph_{name}", what, value=value)


def _counter(name: str, what: str, value: int) -> Metric:
    return CounterMetricFamily(f"threadgraph_{name}", what, value=value)


def _counters(name: str, what: str, labels: list[str], counts: _Labelled[int]) -> Metric:
    family = CounterMetricFamily(f"threadgraph_{name}", what, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _histogram(
    name: str, what: str, labels: list[str], histograms: Iterable[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    family = HistogramMetricFamily(f"threadgraph_{name}", what, labels=labels)
    for values, histogram in histograms:
        buckets, so_far = [], 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        family.add_metric(values, buckets, histogram.sum)
    return family
