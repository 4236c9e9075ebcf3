"""Every setting: its environment variable, type, default and reason.

Read once at start by `load` and passed down; nothing else in the code reads the environment. `docs/settings.md` is this
table printed by `python -m server settings`, and a test compares the two.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from providers.addresses import DEFAULT_PORTS, AllowedEndpoint


class SettingsError(Exception):
    """One or more environment variables hold a value that cannot be used. The text names each and what was expected."""


def _text(value: str) -> str:
    return value


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        # Not int() alone: it takes underscores, blanks and other scripts' digits.
        number = int(value) if re.fullmatch(r"-?[0-9]{1,20}", value) else low - 1
        if not low <= number <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return number

    return parse


def _number(low: float, high: float, unit: str) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ValueError(f"a number of {unit} from {low:g} to {high:g}")
        return number

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    return _number(low, high, "seconds")


def _days(low: float, high: float) -> Callable[[str], float]:
    return _number(low, high, "days")


def _boolean(value: str) -> bool:
    match value.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise ValueError("true or false")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.upper() not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return value.upper()

    return parse


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _keys(value: str) -> tuple[tuple[str, str], ...]:
    pairs = [entry.partition("=") for entry in _names(value)]
    if not all(name.strip() and key.strip() for name, _, key in pairs):
        raise ValueError("entries such as provider=key, separated by commas")
    return tuple((name.strip(), key.strip()) for name, _, key in pairs)


def _path(value: str) -> Path:
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError("a path; there is no home folder of this name") from None


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        try:
            parts = urlsplit(value)
            # Read for its check: what stands behind the colon must be a port (a password is to be percent-encoded).
            _ = parts.port
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in schemes or (
            parts.scheme != "memory" and not (parts.netloc or parts.query or parts.path.strip("/"))
        ):
            raise ValueError("a URL that begins with " + " or ".join(f"{scheme}://" for scheme in schemes))
        return value.rstrip("/") if parts.scheme.startswith("http") else value

    return parse


_CHANNELS = {f"{scheme}{kind}" for scheme in ("redis", "rediss") for kind in ("", "+sentinel", "+cluster")} | {"unix"}


def _channel_url(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme != "memory" and (scheme not in _CHANNELS or not rest.strip("/")):
        raise ValueError("memory://, or a URL of Valkey or Redis such as redis://127.0.0.1:6379/0")
    return value


# What browsers send (fetch.spec.whatwg.org, section 3.2): no path, no user, no default port, a host in ASCII.
_ORIGIN = re.compile(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.ASCII)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def _origins(value: str) -> tuple[str, ...]:
    return tuple(_origin(name) for name in _names(value))


def _origin(text: str) -> str:
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        raise ValueError("exact origins such as https://chat.example.com, separated by commas, without a path")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS[scheme]) else f"{scheme}://{host}:{port}"


_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def _key_set_urls(value: str) -> tuple[str, ...]:
    return tuple(_key_set_url(name) for name in _names(value))


def _key_set_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        # Read for its check, as above.
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    # Whoever can change what a key set says can be anyone: it is not read in the clear over a network.
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    if not is_safe or not parts.hostname or "@" in parts.netloc:
        raise ValueError("URLs that begin with https:// (http:// for 127.0.0.1 and localhost), separated by commas")
    return text


def _allowed_endpoints(value: str) -> tuple[AllowedEndpoint, ...]:
    try:
        return tuple(map(AllowedEndpoint.parse, _names(value)))
    except ValueError:
        raise ValueError(
            "networks, addresses or host names, each with a port or without (10.0.0.0/8, 192.168.1.5:11434, "
            "[fd12::5]:11434, ollama.internal), separated by commas, and none that is never opened"
        ) from None


def _ports(value: str) -> tuple[int, ...]:
    try:
        return tuple(map(_integer(1, 65535), _names(value)))
    except ValueError:
        raise ValueError("ports from 1 to 65535, separated by commas") from None


def _ingest_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        # Read for its check, as above.
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    # A key goes there, and scripts come from there that run in browsers.
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    is_plain = text.isascii() and not (set("@?#%\\") & set(text)) and ".." not in text
    if not is_safe or not parts.hostname or not is_plain:
        raise ValueError("a URL that begins with https:// (http:// for 127.0.0.1 and localhost), without a query")
    return text.rstrip("/")


def _project_key(value: str) -> str:
    # A personal key of PostHog's can read and change the account; a request of anybody's is no place for it.
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", value) or value.startswith("phx_"):
        raise ValueError("a project key: letters, digits, _ and -; no personal key (phx_…)")
    return value


def _secret(value: str) -> str:
    if len(value.encode()) < 32:
        raise ValueError("at least 32 bytes")
    return value


_ENCRYPTION_KEY_BYTES = 32
_HEX_KEY = re.compile(r"[0-9A-Fa-f]{64}", re.ASCII)


def _encryption_keys(value: str) -> tuple[bytes, ...]:
    keys = tuple(map(_encryption_key, _names(value)))
    if not keys or len(set(keys)) < len(keys):
        raise ValueError("one or more different keys, separated by commas")
    return keys


def _encryption_key(text: str) -> bytes:
    try:
        # 64 hexadecimal digits are 48 bytes of base64, so nothing can be read in both ways.
        key = bytes.fromhex(text) if _HEX_KEY.fullmatch(text) else base64.b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != _ENCRYPTION_KEY_BYTES:
        raise ValueError(
            f"keys of exactly {_ENCRYPTION_KEY_BYTES} bytes, each in base64 or as 64 hexadecimal digits, separated by "
            "commas (openssl rand -base64 32 makes one)"
        )
    return key


def _token(value: str) -> str:
    # What a header can hold, and nobody guesses.
    if not re.fullmatch(r"[!-~]{16,1000}", value):
        raise ValueError("at least 16 letters, digits and signs, without blanks")
    return value


def _setting(env: str, parse: Callable[[str], Any], default: Any, why: str, *, secret: bool = False) -> Any:
    metadata = {"env": env, "parse": parse, "why": why, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


VENDORS = ("openai", "anthropic", "google", "groq", "openrouter")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one server process. Secrets are left out of `repr`."""

    host: str = _setting("HOST", _text, "127.0.0.1", "Address to listen on; `0.0.0.0` for every interface.")
    public_url: str | None = _setting(
        "PUBLIC_URL",
        _url("http", "https"),
        None,
        "Where clients reach this server; what links to files begin with. Unset: where it listens.",
    )
    port: int = _setting("PORT", _integer(0, 65535), 8000, "Port to listen on; 0 takes a free one and prints it.")
    data_dir: Path = _setting(
        "DATA_DIR",
        _path,
        Path("data").absolute(),
        "Where the embedded database, files and the keys that the server makes itself live.",
    )
    log_level: str = _setting(
        "LOG_LEVEL",
        _one_of("DEBUG", "INFO", "WARNING", "ERROR"),
        "INFO",
        "Least level that is logged. User text is never logged.",
    )
    log_format: str = _setting(
        "LOG_FORMAT", _one_of("TEXT", "JSON"), "TEXT", "How a line of the log is written: for people, or as JSON."
    )
    metrics_token: str | None = _setting(
        "METRICS_TOKEN",
        _token,
        None,
        "What a reader of `/metrics` sends as `Authorization: Bearer …`. Unset: there is no such path (see "
        "docs/observability.md).",
        secret=True,
    )
    otel_exporter_otlp_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        _url("http", "https"),
        None,
        "Where spans are sent, by OTLP over HTTP, say `http://127.0.0.1:4318`; `/v1/traces` is added. Unset: none are "
        "made. Needs two more packages (see docs/observability.md).",
        secret=True,
    )
    otel_exporter_otlp_headers: tuple[tuple[str, str], ...] = _setting(
        "OTEL_EXPORTER_OTLP_HEADERS",
        _keys,
        (),
        "Headers to send them with, as `name=value,…`; often a key.",
        secret=True,
    )
    otel_service_name: str = _setting("OTEL_SERVICE_NAME", _text, "threadgraph", "What the server is called in spans.")

    database_url: str | None = _setting(
        "DATABASE_URL",
        _url("postgres", "postgresql"),
        None,
        "A PostgreSQL (15 or newer) of yours. Unset: PostgreSQL 18 is started under `DATA_DIR`.",
        secret=True,
    )
    database_pool_size: int = _setting(
        "DATABASE_POOL_SIZE",
        _integer(2, 500),
        10,
        "Most connections to PostgreSQL that this process shares among its requests; it has three more for itself.",
    )
    database_timeout_seconds: float = _setting(
        "DATABASE_TIMEOUT_SECONDS", _seconds(0.1, 600), 10.0, "Longest wait for a connection, and for one statement."
    )
    broadcast_url: str = _setting(
        "BROADCAST_URL",
        _channel_url,
        "memory://",
        "The channel and token log. `memory://`: one server process. A URL of Valkey or Redis: any number of them. "
        "`redis://:password@host:6379/0`; `rediss://` with TLS; `unix://`; "
        "`redis+sentinel://host:26379,host:26379/mymaster`; `redis+cluster://host:6379,host:6379`; all with options "
        "(see docs/operating.md).",
        secret=True,
    )

    anonymous_sessions: bool = _setting(
        "ANONYMOUS_SESSIONS", _boolean, True, "Whether `startAnonymousSession` hands out identities without sign-in."
    )
    anonymous_sessions_per_minute: int = _setting(
        "ANONYMOUS_SESSIONS_PER_MINUTE",
        _integer(1, 1_000_000),
        600,
        "Most anonymous sessions a minute that one process begins for one address (behind a proxy all users share the "
        "proxy's), and ten times as many for all.",
    )
    turns_per_minute: int = _setting(
        "TURNS_PER_MINUTE",
        _integer(0, 1_000_000),
        60,
        "Most questions, edits and retries a minute that one process takes from one user; 0: no limit.",
    )
    uploads_per_minute: int = _setting(
        "UPLOADS_PER_MINUTE", _integer(0, 1_000_000), 120, "The same for files that are sent or announced."
    )
    shares_per_minute: int = _setting(
        "SHARES_PER_MINUTE",
        _integer(0, 1_000_000),
        60,
        "The same for links that are made, and forks of what one shows.",
    )
    key_changes_per_minute: int = _setting(
        "KEY_CHANGES_PER_MINUTE",
        _integer(0, 1_000_000),
        60,
        "The same for keys and endpoints that are saved: an endpoint's name is looked up each time.",
    )
    session_secret: str | None = _setting(
        "SESSION_SECRET",
        _secret,
        None,
        "Key that signs anonymous sessions. Unset: one is made and kept in `DATA_DIR`.",
        secret=True,
    )
    session_ttl_seconds: int = _setting(
        "SESSION_TTL_SECONDS", _integer(1, 31_536_000), 2_592_000, "Lifetime of an anonymous session (30 days)."
    )
    encryption_keys: tuple[bytes, ...] = _setting(
        "ENCRYPTION_KEYS",
        _encryption_keys,
        (),
        "Keys that users' own provider keys are encrypted with: the first encrypts, all decrypt (see docs/keys.md). "
        "Unset: one is made and kept in `DATA_DIR`.",
        secret=True,
    )
    auth_jwks_url: tuple[str, ...] = _setting(
        "AUTH_JWKS_URL",
        _key_set_urls,
        (),
        "Where the issuers of your users' tokens publish their keys, separated by commas; see docs/identity.md.",
    )
    auth_issuer: tuple[str, ...] = _setting(
        "AUTH_ISSUER", _names, (), "The `iss` of their tokens, one for each URL, in the same order."
    )
    auth_audience: tuple[str, ...] = _setting(
        "AUTH_AUDIENCE",
        _names,
        (),
        "The `aud` of their tokens, one for each URL, in the same order; `*` for an issuer that names none.",
    )
    auth_shared_secret: str | None = _setting(
        "AUTH_SHARED_SECRET",
        _secret,
        None,
        "A secret that your app signs tokens with (HS256), instead of `AUTH_JWKS_URL`.",
        secret=True,
    )
    auth_leeway_seconds: float = _setting(
        "AUTH_LEEWAY_SECONDS", _seconds(0, 60), 30.0, "How far the clock of an issuer may differ from this server's."
    )
    allowed_origins: tuple[str, ...] = _setting(
        "ALLOWED_ORIGINS",
        _origins,
        (),
        "Origins of web frontends, exact, separated by commas; used for CORS and for WebSockets alike.",
    )

    ingest_url: str | None = _setting(
        "INGEST_URL",
        _ingest_url,
        None,
        "Where `/ingest/*` relays your frontend's analytics to, say `https://us.i.posthog.com`; see docs/ingest.md. "
        "Unset: there is no such path.",
    )
    ingest_assets_url: str | None = _setting(
        "INGEST_ASSETS_URL",
        _ingest_url,
        None,
        "Where its scripts and configuration come from, say `https://us-assets.i.posthog.com`. Unset: `INGEST_URL`.",
    )
    ingest_api_key: str | None = _setting(
        "INGEST_API_KEY", _project_key, None, "The project key that the relay puts into every request.", secret=True
    )
    ingest_max_bytes: int = _setting(
        "INGEST_MAX_BYTES",
        _integer(1_024, 16_777_216),
        1_048_576,
        "Largest body that the relay takes, compressed and not.",
    )
    ingest_requests_per_minute: int = _setting(
        "INGEST_REQUESTS_PER_MINUTE",
        _integer(1, 1_000_000),
        600,
        "Most requests a minute that the relay takes from one address; behind a proxy all users share the proxy's.",
    )
    ingest_total_requests_per_minute: int = _setting(
        "INGEST_TOTAL_REQUESTS_PER_MINUTE",
        _integer(1, 10_000_000),
        6_000,
        "Most requests a minute that the relay of one process takes from everybody.",
    )

    storage_url: str | None = _setting(
        "STORAGE_URL",
        _url("s3"),
        None,
        "Where files are kept: `s3://bucket` or `s3://bucket/prefix`. Unset: in `DATA_DIR`.",
    )
    s3_endpoint_url: str | None = _setting(
        "S3_ENDPOINT_URL", _url("http", "https"), None, "The address of R2, MinIO and the like. Unset: Amazon's."
    )
    s3_region: str = _setting("S3_REGION", _text, "us-east-1", "The bucket's region; `auto` for R2.")
    s3_access_key_id: str | None = _setting("S3_ACCESS_KEY_ID", _text, None, "The storage's key: its name.")
    s3_secret_access_key: str | None = _setting(
        "S3_SECRET_ACCESS_KEY", _text, None, "The storage's key: its secret.", secret=True
    )
    max_attachment_bytes: int = _setting(
        "MAX_ATTACHMENT_BYTES", _integer(1, 2**31 - 1), 26_214_400, "Largest file that is taken (25 MiB)."
    )
    max_attachment_quota_bytes: int = _setting(
        "MAX_ATTACHMENT_QUOTA_BYTES",
        _integer(1, 2**60),
        1_073_741_824,
        "Most bytes of all files of one user (1 GiB); each counts as 4 KiB at least.",
    )
    attachment_url_seconds: int = _setting(
        "ATTACHMENT_URL_SECONDS", _integer(1, 600), 300, "How long a link to read or write a file lives."
    )
    unlinked_attachment_seconds: int = _setting(
        "UNLINKED_ATTACHMENT_SECONDS",
        _integer(1, 31_536_000),
        86_400,
        "How long a file that no message ever referred to is kept (a day).",
    )

    introspection: bool = _setting("INTROSPECTION", _boolean, True, "Whether the schema can be asked for.")
    graphiql: bool = _setting("GRAPHIQL", _boolean, True, "Whether a browser at `/graphql` gets the GraphiQL page.")
    max_request_bytes: int = _setting(
        "MAX_REQUEST_BYTES",
        _integer(1_024, 67_108_864),
        1_048_576,
        "Largest GraphQL request body and WebSocket message.",
    )
    max_import_bytes: int = _setting(
        "MAX_IMPORT_BYTES",
        _integer(1_024, 1_099_511_627_776),
        1_073_741_824,
        "Largest file that `POST /import` takes; as much room is needed under `DATA_DIR` while it is read.",
    )
    max_message_bytes: int = _setting(
        "MAX_MESSAGE_BYTES", _integer(1, 16_777_216), 262_144, "Largest text of one user message, in UTF-8 bytes."
    )
    max_sockets: int = _setting(
        "MAX_SOCKETS", _integer(1, 1_000_000), 20_000, "Most WebSockets one process holds open."
    )
    max_sockets_per_user: int = _setting(
        "MAX_SOCKETS_PER_USER",
        _integer(1, 1_000_000),
        200,
        "Most WebSockets of one user that one process holds open; further ones are closed with 4429.",
    )
    max_subscriptions_per_socket: int = _setting(
        "MAX_SUBSCRIPTIONS_PER_SOCKET",
        _integer(1, 10_000),
        100,
        "Most operations that run at once on one WebSocket.",
    )

    shutdown_grace_seconds: float = _setting(
        "SHUTDOWN_GRACE_SECONDS",
        _seconds(0, 600),
        10.0,
        "How long running answers may go on after SIGTERM before they end as INTERRUPTED with their text kept.",
    )
    checkpoint_seconds: float = _setting(
        "CHECKPOINT_SECONDS",
        _seconds(0.05, 1),
        0.5,
        "How often the text of running answers is saved; what `kill -9` may cost on `memory://`.",
    )
    lease_seconds: float = _setting(
        "LEASE_SECONDS",
        _seconds(1, 8),
        7.0,
        "How long a silent server keeps its streams; half as long again, and others end them.",
    )
    max_output_chars: int = _setting(
        "MAX_OUTPUT_CHARS",
        _integer(1_000, 64_000_000),
        2_000_000,
        "Longest answer that is kept; a longer one is ended with what had come.",
    )
    max_history_chars: int = _setting(
        "MAX_HISTORY_CHARS",
        _integer(1_000, 64_000_000),
        400_000,
        "Most text of a thread that is sent to a model; the oldest messages are left out first.",
    )

    temporary_thread_seconds: float = _setting(
        "TEMPORARY_THREAD_SECONDS",
        _seconds(1, 31_536_000),
        86_400.0,
        "How long after its last turn a temporary thread is deleted (a day).",
    )
    thread_retention_days: float | None = _setting(
        "THREAD_RETENTION_DAYS",
        _days(0.001, 36_500),
        None,
        "Days after its last activity after which any thread is deleted. Unset: never.",
    )
    changes_retention_days: float = _setting(
        "CHANGES_RETENTION_DAYS",
        _days(0.001, 365),
        7.0,
        "How long the viewer's feed is kept: a client that was away for longer is told to fetch anew.",
    )
    idempotency_retention_days: float = _setting(
        "IDEMPOTENCY_RETENTION_DAYS",
        _days(0.01, 36_500),
        30.0,
        "How long the key of a turn is remembered: sent again after that, it is a new turn.",
    )

    default_model: str | None = _setting(
        "DEFAULT_MODEL",
        _text,
        None,
        "Id of the model for turns that name none. Unset: the first one its user can use.",
    )
    title_model: str | None = _setting(
        "TITLE_MODEL", _text, None, "Id of the model that titles new threads. Unset: the first question is the title."
    )
    models_file: Path | None = _setting(
        "MODELS_FILE",
        _path,
        None,
        "A TOML file of models and providers that adds to the server's own and changes them (see docs/models.md).",
    )
    openai_api_key: str | None = _setting(
        "OPENAI_API_KEY", _text, None, "The operator's key for OpenAI: its models are everybody's.", secret=True
    )
    openai_base_url: str | None = _setting(
        "OPENAI_BASE_URL",
        _url("http", "https"),
        None,
        "Another endpoint that speaks the chat-completions format, in OpenAI's place; it may want no key.",
        secret=True,
    )
    openai_models: tuple[str, ...] = _setting(
        "OPENAI_MODELS",
        _names,
        (),
        "Names of that endpoint's models to offer, separated by commas. Unset: those of the file of models.",
    )
    anthropic_api_key: str | None = _setting(
        "ANTHROPIC_API_KEY", _text, None, "The operator's key for Anthropic's Messages API.", secret=True
    )
    anthropic_base_url: str | None = _setting(
        "ANTHROPIC_BASE_URL",
        _url("http", "https"),
        None,
        "Another endpoint that speaks the Messages format, without `/v1/messages`; it may want no key.",
        secret=True,
    )
    anthropic_models: tuple[str, ...] = _setting(
        "ANTHROPIC_MODELS",
        _names,
        (),
        "Names of that endpoint's models to offer, separated by commas. Unset: those of the file of models.",
    )
    anthropic_max_tokens: int = _setting(
        "ANTHROPIC_MAX_TOKENS",
        _integer(1, 1_000_000),
        16_000,
        "Most tokens of one answer by those models, without thinking; the format requires a limit.",
    )
    google_api_key: str | None = _setting("GOOGLE_API_KEY", _text, None, "The operator's key for Gemini.", secret=True)
    groq_api_key: str | None = _setting("GROQ_API_KEY", _text, None, "The operator's key for Groq.", secret=True)
    openrouter_api_key: str | None = _setting(
        "OPENROUTER_API_KEY", _text, None, "The operator's key for OpenRouter.", secret=True
    )
    provider_api_keys: tuple[tuple[str, str], ...] = _setting(
        "PROVIDER_API_KEYS",
        _keys,
        (),
        "The operator's keys for providers of `MODELS_FILE`, as `provider=key,…`.",
        secret=True,
    )
    provider_idle_seconds: float = _setting(
        "PROVIDER_IDLE_SECONDS",
        _seconds(0.1, 3_600),
        60.0,
        "Longest silence of a model, before its first word and between two, until the answer ends as FAILED.",
    )
    provider_total_seconds: float = _setting(
        "PROVIDER_TOTAL_SECONDS", _seconds(1, 86_400), 1_800.0, "Longest duration of one answer."
    )
    scripted_models: bool = _setting(
        "SCRIPTED_MODELS",
        _boolean,
        True,
        "Whether the built-in models that need no network are offered. Turn off where users pay for real ones.",
    )
    scripted_models_file: Path | None = _setting(
        "SCRIPTED_MODELS_FILE",
        _path,
        None,
        "A JSON file of further scripted models, to play answers, speeds and faults (see docs/scripted-models.md).",
    )

    custom_providers: bool = _setting(
        "CUSTOM_PROVIDERS", _boolean, True, "Whether users may add endpoints of their own, and models on them."
    )
    custom_provider_ports: tuple[int, ...] = _setting(
        "CUSTOM_PROVIDER_PORTS",
        _ports,
        DEFAULT_PORTS,
        "The ports that those endpoints may have, separated by commas.",
    )
    custom_provider_allow: tuple[AllowedEndpoint, ...] = _setting(
        "CUSTOM_PROVIDER_ALLOW",
        _allowed_endpoints,
        (),
        "Where those endpoints may lead although it is not public: networks, addresses or host names, with a port or "
        "(the ports above) without, separated by commas, as `10.0.0.0/8,192.168.1.5:11434,ollama.internal:11434`; see "
        "docs/providers.md.",
    )

    budget_tokens_per_day: int | None = _setting(
        "BUDGET_TOKENS_PER_DAY",
        _integer(0, 2**53),
        None,
        "Most tokens, prompt and completion, that a user may consume in a day (UTC). Unset: no limit.",
    )
    budget_tokens_per_month: int | None = _setting(
        "BUDGET_TOKENS_PER_MONTH", _integer(0, 2**53), None, "The same in a calendar month (UTC)."
    )
    budget_cost_micros_per_day: int | None = _setting(
        "BUDGET_COST_MICROS_PER_DAY",
        _integer(0, 2**53),
        None,
        "Most that a user's turns may cost in a day (UTC), in millionths of your currency; models without a known "
        "price are free of it. Unset: no limit.",
    )
    budget_cost_micros_per_month: int | None = _setting(
        "BUDGET_COST_MICROS_PER_MONTH", _integer(0, 2**53), None, "The same in a calendar month (UTC)."
    )
    budget_answer_tokens: int = _setting(
        "BUDGET_ANSWER_TOKENS",
        _integer(1, 1_000_000),
        4_096,
        "Most tokens of one answer, where there is a budget: so many are reserved before it begins, or what is left.",
    )

    @property
    def vendor_keys(self) -> dict[str, str]:
        """The keys for the vendors that the server knows by itself, by the vendors' names."""
        keys = {vendor: getattr(self, f"{vendor}_api_key") for vendor in VENDORS}
        return {vendor: key for vendor, key in keys.items() if key is not None}


def load(environ: Mapping[str, str]) -> Settings:
    """The settings as the environment gives them; an empty value counts as unset.

    Raises:
        SettingsError: with one line for every variable that cannot be used.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for item in fields(Settings):
        env = item.metadata["env"]
        raw = environ.get(env, "")
        if not raw:
            continue
        try:
            values[item.name] = item.metadata["parse"](raw)
        except ValueError as expected:
            shown = "the value given" if item.metadata["secret"] else repr(raw[:80])
            problems.append(f"{env}: {shown} is not usable; expected {expected}")
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(**values)


def settings_page() -> str:
    """All settings as a Markdown page, for the docs."""
    lines = [
        "# Settings",
        "",
        "Environment variables, read once at start. An empty one counts as unset; a wrong value stops the start and",
        "says what was expected. This page is printed by `python -m server settings` (`make docs`).",
        "",
        "| variable | default | what it is |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| `{item.metadata['env']}` | {_shown_default(item.default)} | {item.metadata['why']} |"
        for item in fields(Settings)
    ]
    return "\n".join(lines) + "\n"


def _shown_default(default: object) -> str:
    match default:
        case None | ():
            return "unset"
        case bool():
            return f"`{str(default).lower()}`"
        case tuple():
            return f"`{','.join(map(str, default))}`"
        case Path():
            return f"`./{default.name}`"
        case float():
            return f"`{default:g}`"
    return f"`{default}`"
