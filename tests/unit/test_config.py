"""Every setting: named, reasoned, parsed, refused with what was expected, and silent about secrets."""

from __future__ import annotations

import base64
import re
from dataclasses import fields
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from config import Settings, SettingsError, load
from providers.addresses import AllowedEndpoint

FIELDS = {item.metadata["env"]: item for item in fields(Settings)}
SECRET = "hunter2-" * 4

# Of each variable a value that differs from the default, and what it means.
USABLE: dict[str, tuple[str, object]] = {
    "HOST": ("0.0.0.0", "0.0.0.0"),
    "PORT": ("65535", 65_535),
    "DATA_DIR": ("/var/lib/threadgraph", Path("/var/lib/threadgraph")),
    "LOG_LEVEL": ("debug", "DEBUG"),
    "LOG_FORMAT": ("json", "JSON"),
    "METRICS_TOKEN": (SECRET, SECRET),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("http://127.0.0.1:4318/", "http://127.0.0.1:4318"),
    "OTEL_EXPORTER_OTLP_HEADERS": ("x-key=a, b=c", (("x-key", "a"), ("b", "c"))),
    "OTEL_SERVICE_NAME": ("chat", "chat"),
    "DATABASE_URL": ("postgres://me@db.example/chat", "postgres://me@db.example/chat"),
    "DATABASE_POOL_SIZE": ("2", 2),
    "DATABASE_TIMEOUT_SECONDS": ("0.1", 0.1),
    "BROADCAST_URL": ("rediss+sentinel://a,b:1/main", "rediss+sentinel://a,b:1/main"),
    "ANONYMOUS_SESSIONS": ("off", False),
    "ANONYMOUS_SESSIONS_PER_MINUTE": ("30", 30),
    "TURNS_PER_MINUTE": ("0", 0),
    "UPLOADS_PER_MINUTE": ("0", 0),
    "SHARES_PER_MINUTE": ("0", 0),
    "KEY_CHANGES_PER_MINUTE": ("0", 0),
    "SESSION_SECRET": (SECRET, SECRET),
    "SESSION_TTL_SECONDS": ("60", 60),
    "ENCRYPTION_KEYS": (f"{'ab' * 32}, {base64.b64encode(bytes(32)).decode()}", (b"\xab" * 32, bytes(32))),
    "AUTH_JWKS_URL": (
        "https://a.example/jwks, http://localhost:3000/jwks",
        ("https://a.example/jwks", "http://localhost:3000/jwks"),
    ),
    "AUTH_ISSUER": ("https://a.example/,b", ("https://a.example/", "b")),
    "AUTH_AUDIENCE": ("chat,*", ("chat", "*")),
    "AUTH_SHARED_SECRET": (SECRET, SECRET),
    "AUTH_LEEWAY_SECONDS": ("0", 0.0),
    "ALLOWED_ORIGINS": ("https://a.example", ("https://a.example",)),
    "INGEST_URL": ("https://analytics.example/", "https://analytics.example"),
    "INGEST_ASSETS_URL": ("http://localhost:9/a", "http://localhost:9/a"),
    "INGEST_API_KEY": ("phc_x-1", "phc_x-1"),
    "INGEST_MAX_BYTES": ("1024", 1_024),
    "INGEST_REQUESTS_PER_MINUTE": ("1", 1),
    "INGEST_TOTAL_REQUESTS_PER_MINUTE": ("1", 1),
    "PUBLIC_URL": ("https://chat.example/", "https://chat.example"),
    "STORAGE_URL": ("s3://bucket/prefix", "s3://bucket/prefix"),
    "S3_ENDPOINT_URL": ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
    "S3_REGION": ("auto", "auto"),
    "S3_ACCESS_KEY_ID": ("id", "id"),
    "S3_SECRET_ACCESS_KEY": (SECRET, SECRET),
    "MAX_ATTACHMENT_BYTES": ("1", 1),
    "MAX_ATTACHMENT_QUOTA_BYTES": ("1", 1),
    "ATTACHMENT_URL_SECONDS": ("600", 600),
    "UNLINKED_ATTACHMENT_SECONDS": ("1", 1),
    "INTROSPECTION": ("No", False),
    "GRAPHIQL": ("0", False),
    "MAX_REQUEST_BYTES": ("1024", 1_024),
    "MAX_IMPORT_BYTES": ("1024", 1024),
    "MAX_MESSAGE_BYTES": ("1", 1),
    "MAX_SOCKETS": ("7", 7),
    "MAX_SOCKETS_PER_USER": ("7", 7),
    "MAX_SUBSCRIPTIONS_PER_SOCKET": ("7", 7),
    "SHUTDOWN_GRACE_SECONDS": ("0", 0.0),
    "CHECKPOINT_SECONDS": ("1", 1.0),
    "LEASE_SECONDS": ("7.5", 7.5),
    "MAX_OUTPUT_CHARS": ("1000", 1_000),
    "MAX_HISTORY_CHARS": ("1000", 1_000),
    "TEMPORARY_THREAD_SECONDS": ("3600", 3600.0),
    "THREAD_RETENTION_DAYS": ("365", 365.0),
    "CHANGES_RETENTION_DAYS": ("14", 14.0),
    "IDEMPOTENCY_RETENTION_DAYS": ("1.5", 1.5),
    "DEFAULT_MODEL": ("gpt-5", "gpt-5"),
    "TITLE_MODEL": ("gpt-5-mini", "gpt-5-mini"),
    "OPENAI_API_KEY": ("sk-1", "sk-1"),
    "OPENAI_BASE_URL": ("http://127.0.0.1:1234/v1", "http://127.0.0.1:1234/v1"),
    "OPENAI_MODELS": (" one, two ,, ", ("one", "two")),
    "MODELS_FILE": ("/etc/models.toml", Path("/etc/models.toml")),
    "GOOGLE_API_KEY": ("g-1", "g-1"),
    "GROQ_API_KEY": ("gsk-1", "gsk-1"),
    "OPENROUTER_API_KEY": ("or-1", "or-1"),
    "PROVIDER_API_KEYS": ("local = k=1, other=k2", (("local", "k=1"), ("other", "k2"))),
    "ANTHROPIC_API_KEY": ("sk-ant-1", "sk-ant-1"),
    "ANTHROPIC_BASE_URL": ("http://127.0.0.1:1234", "http://127.0.0.1:1234"),
    "ANTHROPIC_MODELS": ("one,two", ("one", "two")),
    "ANTHROPIC_MAX_TOKENS": ("64000", 64_000),
    "PROVIDER_IDLE_SECONDS": ("3600", 3_600.0),
    "PROVIDER_TOTAL_SECONDS": ("1", 1.0),
    "SCRIPTED_MODELS": ("false", False),
    "SCRIPTED_MODELS_FILE": ("/etc/scripts.json", Path("/etc/scripts.json")),
    "CUSTOM_PROVIDERS": ("false", False),
    "CUSTOM_PROVIDER_PORTS": ("443, 11434,", (443, 11_434)),
    "CUSTOM_PROVIDER_ALLOW": (
        "10.0.0.0/8, 192.168.1.5:11434,[fd12::5]:8000,Ollama.internal:11434",
        (
            AllowedEndpoint(IPv4Network("10.0.0.0/8")),
            AllowedEndpoint(IPv4Network("192.168.1.5/32"), 11_434),
            AllowedEndpoint(IPv6Network("fd12::5/128"), 8_000),
            AllowedEndpoint("ollama.internal", 11_434),
        ),
    ),
    "BUDGET_TOKENS_PER_DAY": ("0", 0),
    "BUDGET_TOKENS_PER_MONTH": ("1000000", 1_000_000),
    "BUDGET_COST_MICROS_PER_DAY": ("9007199254740992", 2**53),
    "BUDGET_COST_MICROS_PER_MONTH": ("5", 5),
    "BUDGET_ANSWER_TOKENS": ("1", 1),
}

ORIGINS = "exact origins such as https://chat.example.com, separated by commas, without a path"
KEY_SETS = "URLs that begin with https:// (http:// for 127.0.0.1 and localhost), separated by commas"
ALLOWED = (
    "networks, addresses or host names, each with a port or without (10.0.0.0/8, 192.168.1.5:11434, [fd12::5]:11434, "
    "ollama.internal), separated by commas, and none that is never opened"
)
POSTGRES = "a URL that begins with postgres:// or postgresql://"
ENCRYPTION = (
    "keys of exactly 32 bytes, each in base64 or as 64 hexadecimal digits, separated by commas "
    "(openssl rand -base64 32 makes one)"
)
HTTP = "a URL that begins with http:// or https://"
ANALYTICS = "a URL that begins with https:// (http:// for 127.0.0.1 and localhost), without a query"
# Values that cannot be used, with what is expected instead.
UNUSABLE = [
    ("PORT", "http", "a whole number from 0 to 65535"),
    ("PORT", "-1", "a whole number from 0 to 65535"),
    ("PORT", "65536", "a whole number from 0 to 65535"),
    ("PORT", "80.0", "a whole number from 0 to 65535"),
    ("LOG_LEVEL", "LOUD", "one of DEBUG, INFO, WARNING, ERROR"),
    ("LOG_FORMAT", "logfmt", "one of TEXT, JSON"),
    ("METRICS_TOKEN", "short", "at least 16 letters, digits and signs, without blanks"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "127.0.0.1:4318", HTTP),
    ("OTEL_EXPORTER_OTLP_HEADERS", "x-key", "entries such as provider=key, separated by commas"),
    ("DATABASE_URL", "mysql://localhost/chat", POSTGRES),
    ("DATABASE_URL", "localhost:5432", POSTGRES),
    ("DATABASE_URL", "postgresql://", POSTGRES),
    ("DATABASE_URL", "postgresql:///", POSTGRES),
    ("DATABASE_POOL_SIZE", "1_0", "a whole number from 2 to 500"),
    ("DATABASE_POOL_SIZE", "٣", "a whole number from 2 to 500"),
    ("DATABASE_POOL_SIZE", "1", "a whole number from 2 to 500"),
    ("DATABASE_TIMEOUT_SECONDS", "0", "a number of seconds from 0.1 to 600"),
    ("BROADCAST_URL", "kafka://host", "memory://, or a URL of Valkey or Redis such as redis://127.0.0.1:6379/0"),
    ("ANONYMOUS_SESSIONS", "perhaps", "true or false"),
    ("ANONYMOUS_SESSIONS_PER_MINUTE", "0", "a whole number from 1 to 1000000"),
    ("TURNS_PER_MINUTE", "-1", "a whole number from 0 to 1000000"),
    ("UPLOADS_PER_MINUTE", "-1", "a whole number from 0 to 1000000"),
    ("SHARES_PER_MINUTE", "-1", "a whole number from 0 to 1000000"),
    ("KEY_CHANGES_PER_MINUTE", "-1", "a whole number from 0 to 1000000"),
    ("SESSION_SECRET", "x" * 31, "at least 32 bytes"),
    ("SESSION_TTL_SECONDS", "0", "a whole number from 1 to 31536000"),
    ("ENCRYPTION_KEYS", "ab" * 31, ENCRYPTION),
    ("ENCRYPTION_KEYS", "ab" * 33, ENCRYPTION),
    ("ENCRYPTION_KEYS", "x" * 32, ENCRYPTION),
    ("ENCRYPTION_KEYS", "YWJj", ENCRYPTION),
    ("ENCRYPTION_KEYS", "ключ", ENCRYPTION),
    ("ENCRYPTION_KEYS", f"{'ab' * 32},short", ENCRYPTION),
    ("ENCRYPTION_KEYS", f"{'ab' * 32},{'AB' * 32}", "one or more different keys, separated by commas"),
    ("ENCRYPTION_KEYS", " , ", "one or more different keys, separated by commas"),
    ("AUTH_JWKS_URL", "http://auth.example/jwks", KEY_SETS),
    ("AUTH_SHARED_SECRET", "x" * 31, "at least 32 bytes"),
    ("AUTH_LEEWAY_SECONDS", "61", "a number of seconds from 0 to 60"),
    ("ALLOWED_ORIGINS", "*", ORIGINS),
    ("INGEST_URL", "http://analytics.example", ANALYTICS),
    ("INGEST_ASSETS_URL", "assets.example", ANALYTICS),
    ("INGEST_API_KEY", "phx_1", "a project key: letters, digits, _ and -; no personal key (phx_…)"),
    ("INGEST_MAX_BYTES", "16777217", "a whole number from 1024 to 16777216"),
    ("INGEST_REQUESTS_PER_MINUTE", "0", "a whole number from 1 to 1000000"),
    ("INGEST_TOTAL_REQUESTS_PER_MINUTE", "0", "a whole number from 1 to 10000000"),
    ("INTROSPECTION", "2", "true or false"),
    ("GRAPHIQL", "yes please", "true or false"),
    ("MAX_REQUEST_BYTES", "1023", "a whole number from 1024 to 67108864"),
    ("MAX_IMPORT_BYTES", "1023", "a whole number from 1024 to 1099511627776"),
    ("MAX_MESSAGE_BYTES", "0", "a whole number from 1 to 16777216"),
    ("MAX_SOCKETS", "0", "a whole number from 1 to 1000000"),
    ("MAX_SOCKETS_PER_USER", "0", "a whole number from 1 to 1000000"),
    ("MAX_SUBSCRIPTIONS_PER_SOCKET", "10001", "a whole number from 1 to 10000"),
    ("SHUTDOWN_GRACE_SECONDS", "inf", "a number of seconds from 0 to 600"),
    ("CHECKPOINT_SECONDS", "1.01", "a number of seconds from 0.05 to 1"),
    ("LEASE_SECONDS", "nan", "a number of seconds from 1 to 8"),
    ("MAX_OUTPUT_CHARS", "999", "a whole number from 1000 to 64000000"),
    ("MAX_HISTORY_CHARS", "all", "a whole number from 1000 to 64000000"),
    ("TEMPORARY_THREAD_SECONDS", "0", "a number of seconds from 1 to 3.1536e+07"),
    ("THREAD_RETENTION_DAYS", "0", "a number of days from 0.001 to 36500"),
    ("CHANGES_RETENTION_DAYS", "a week", "a number of days from 0.001 to 365"),
    ("IDEMPOTENCY_RETENTION_DAYS", "-1", "a number of days from 0.01 to 36500"),
    ("OPENAI_BASE_URL", "api.openai.com/v1", HTTP),
    ("PUBLIC_URL", "chat.example", HTTP),
    ("STORAGE_URL", "https://bucket.example", "a URL that begins with s3://"),
    ("STORAGE_URL", "s3://", "a URL that begins with s3://"),
    ("S3_ENDPOINT_URL", "s3.example", HTTP),
    ("MAX_ATTACHMENT_BYTES", "0", "a whole number from 1 to 2147483647"),
    ("MAX_ATTACHMENT_QUOTA_BYTES", "0", "a whole number from 1 to 1152921504606846976"),
    ("UNLINKED_ATTACHMENT_SECONDS", "0", "a whole number from 1 to 31536000"),
    ("ATTACHMENT_URL_SECONDS", "601", "a whole number from 1 to 600"),
    ("OPENAI_BASE_URL", "https://[", HTTP),
    ("PROVIDER_API_KEYS", "sk-1", "entries such as provider=key, separated by commas"),
    ("PROVIDER_API_KEYS", "local=", "entries such as provider=key, separated by commas"),
    ("ANTHROPIC_BASE_URL", "api.anthropic.com", HTTP),
    ("ANTHROPIC_MAX_TOKENS", "0", "a whole number from 1 to 1000000"),
    ("PROVIDER_IDLE_SECONDS", "0", "a number of seconds from 0.1 to 3600"),
    ("PROVIDER_TOTAL_SECONDS", "a day", "a number of seconds from 1 to 86400"),
    ("SCRIPTED_MODELS", "maybe", "true or false"),
    ("CUSTOM_PROVIDERS", "private", "true or false"),
    ("CUSTOM_PROVIDER_PORTS", "443,0", "ports from 1 to 65535, separated by commas"),
    ("CUSTOM_PROVIDER_ALLOW", "10.0.0.1/8", ALLOWED),
    ("BUDGET_TOKENS_PER_DAY", "-1", f"a whole number from 0 to {2**53}"),
    ("BUDGET_TOKENS_PER_MONTH", "1e6", f"a whole number from 0 to {2**53}"),
    ("BUDGET_COST_MICROS_PER_DAY", "9007199254740993", f"a whole number from 0 to {2**53}"),
    ("BUDGET_COST_MICROS_PER_MONTH", "unlimited", f"a whole number from 0 to {2**53}"),
    ("BUDGET_ANSWER_TOKENS", "0", "a whole number from 1 to 1000000"),
]
# These take any text.
FREE = {
    "AUTH_ISSUER",
    "AUTH_AUDIENCE",
    "HOST",
    "DATA_DIR",
    "OTEL_SERVICE_NAME",
    "DEFAULT_MODEL",
    "TITLE_MODEL",
    "MODELS_FILE",
    "GOOGLE_API_KEY",
    "GROQ_API_KEY",
    "OPENROUTER_API_KEY",
    "OPENAI_API_KEY",
    "OPENAI_MODELS",
    "SCRIPTED_MODELS_FILE",
    "S3_REGION",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_MODELS",
}


@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: item.name)
def test_a_setting_is_its_name_in_capitals_with_a_reason(item: Any) -> None:
    assert item.metadata["env"] == item.name.upper()
    assert re.fullmatch(r"[A-Z].{20,}[.)]", item.metadata["why"]), "a sentence that says what it is for"


@pytest.mark.parametrize("env", FIELDS)
def test_a_value_of_the_environment_becomes_a_setting_and_changes_no_other(env: str) -> None:
    raw, expected = USABLE[env]
    changed = load({env: raw, "UNRELATED": "x"})
    name = FIELDS[env].name
    assert getattr(changed, name) == expected
    assert type(getattr(changed, name)) is type(expected)
    others = [item.name for item in fields(Settings) if item.name != name]
    assert [getattr(changed, other) for other in others] == [getattr(Settings(), other) for other in others]
    assert expected != getattr(Settings(), name), "the example must not be the default"


@pytest.mark.parametrize("env", [env for env, item in FIELDS.items() if item.default not in (None, ())])
def test_a_default_is_a_value_that_could_be_given(env: str) -> None:
    default = FIELDS[env].default
    raw = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert FIELDS[env].metadata["parse"](raw) == default


def test_without_an_environment_everything_has_its_default() -> None:
    assert load({}) == Settings()
    assert Settings().host == "127.0.0.1", "nobody is served who was not meant"
    assert Settings().database_url is None
    assert Settings().allowed_origins == ()


def test_an_empty_value_counts_as_unset() -> None:
    assert load(dict.fromkeys(FIELDS, "")) == Settings()


def test_every_setting_has_a_case_that_is_refused_unless_it_takes_any_text() -> None:
    assert {env for env, _, expected in UNUSABLE} | FREE == set(FIELDS)


@pytest.mark.parametrize(("env", "raw", "expected"), UNUSABLE)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected(env: str, raw: str, expected: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load({env: raw})
    shown = "the value given" if FIELDS[env].metadata["secret"] else repr(raw)
    assert str(refused.value) == f"{env}: {shown} is not usable; expected {expected}"


def test_all_problems_are_told_at_once_one_a_line() -> None:
    with pytest.raises(SettingsError) as refused:
        load({env: raw for env, raw, _ in UNUSABLE})
    named = [line.split(":")[0] for line in str(refused.value).splitlines()]
    assert named == [env for env in FIELDS if env not in FREE]


def test_a_long_or_strange_value_is_shown_short_and_on_one_line() -> None:
    with pytest.raises(SettingsError) as refused:
        load({"PORT": "1\n2\x1b[31m" + "x" * 10_000})
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 250
    assert "\x1b" not in str(refused.value)


def test_secrets_are_not_shown_by_the_settings() -> None:
    given = {
        "DATABASE_URL": f"postgresql://me:{SECRET}@db.example/chat",
        "BROADCAST_URL": f"redis://:{SECRET}@valkey.example",
        "SESSION_SECRET": SECRET,
        "ENCRYPTION_KEYS": base64.b64encode(SECRET.encode()).decode(),
        "AUTH_SHARED_SECRET": SECRET,
        "OPENAI_API_KEY": SECRET,
        "OPENAI_BASE_URL": f"https://me:{SECRET}@models.example/v1",
        "S3_SECRET_ACCESS_KEY": SECRET,
        "INGEST_API_KEY": SECRET,
        "METRICS_TOKEN": SECRET,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://me:{SECRET}@spans.example",
        "OTEL_EXPORTER_OTLP_HEADERS": f"x-key={SECRET}",
        "ANTHROPIC_API_KEY": SECRET,
        "ANTHROPIC_BASE_URL": f"https://me:{SECRET}@models.example",
        "GOOGLE_API_KEY": SECRET,
        "GROQ_API_KEY": SECRET,
        "OPENROUTER_API_KEY": SECRET,
        "PROVIDER_API_KEYS": f"local={SECRET}",
    }
    settings = load(given)
    assert settings.database_url == given["DATABASE_URL"]
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert settings.encryption_keys == (SECRET.encode(),)
    assert given["ENCRYPTION_KEYS"] not in repr(settings)
    assert {env for env, item in FIELDS.items() if item.metadata["secret"]} == set(given)


def test_secrets_are_not_shown_by_a_refusal() -> None:
    with pytest.raises(SettingsError) as refused:
        load({"DATABASE_URL": f"mysql://me:{SECRET}@db.example/chat", "SESSION_SECRET": "hunter2"})
    assert "hunter2" not in str(refused.value)
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == ["DATABASE_URL", "SESSION_SECRET"]
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("https://api.example/v1/", "https://api.example/v1"),
        ("https://api.example/v1///", "https://api.example/v1"),
        ("https://api.example/", "https://api.example"),
        ("https://api.example/v1", "https://api.example/v1"),
    ],
)
def test_a_base_url_has_no_trailing_slash(raw: str, expected: str) -> None:
    assert load({"OPENAI_BASE_URL": raw}).openai_base_url == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("https://a.example", ("https://a.example",)),
        ("https://a.example, http://localhost:3000 ,", ("https://a.example", "http://localhost:3000")),
        ("HTTPS://Chat.Example", ("https://chat.example",)),
        ("http://[::1]:3000", ("http://[::1]:3000",)),
    ],
)
def test_allowed_origins_are_spelt_as_browsers_spell_them(raw: str, expected: tuple[str, ...]) -> None:
    assert load({"ALLOWED_ORIGINS": raw}).allowed_origins == expected


@pytest.mark.parametrize(
    "raw",
    [
        "*",
        "null",
        "a.example",
        "//a.example",
        "https://",
        "https://a.example/",
        "https://a.example/chat",
        "https://a.example?x=1",
        "https://a.example#x",
        "ws://a.example",
        "https://a.example https://b.example/",
        "https://a.example,b.example",
    ],
)
def test_what_is_no_exact_origin_is_refused(raw: str) -> None:
    with pytest.raises(SettingsError, match=f"ALLOWED_ORIGINS: .* expected {re.escape(ORIGINS)}"):
        load({"ALLOWED_ORIGINS": raw})


@pytest.mark.parametrize(
    "raw",
    [
        "https://*.example.com",
        "https://me@a.example",
        "https://a.example:abc",
        "https://a.example:",
        "https://a.example?",
        "https://a.example#",
        "https://a b.example",
        "https://[",
    ],
)
def test_an_entry_that_no_browser_can_match_is_refused_too(raw: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(ORIGINS)):
        load({"ALLOWED_ORIGINS": raw})


@pytest.mark.parametrize(
    ("raw", "expected"), [("https://a.example:443", "https://a.example"), ("http://a.example:80", "http://a.example")]
)
def test_a_default_port_of_an_origin_is_left_out_as_browsers_do(raw: str, expected: str) -> None:
    assert load({"ALLOWED_ORIGINS": raw}).allowed_origins == (expected,)


@pytest.mark.parametrize(
    "raw",
    [
        "postgresql://me:hunter2/x@db.example/chat",
        "postgresql://me:hunter2#x@db.example/chat",
        "postgresql://me@db.example:port/chat",
    ],
)
def test_a_database_url_that_cannot_be_taken_apart_is_refused(raw: str) -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL") as refused:
        load({"DATABASE_URL": raw})
    assert "hunter2" not in str(refused.value)


def test_a_home_folder_of_nobody_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="DATA_DIR"):
        load({"DATA_DIR": "~no-such-user/data"})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1.example/jwks",
        "http://10.0.0.1/jwks",
        "ftp://a.example/jwks",
        "file:///etc/jwks",
        "https:///jwks",
        "https://user:word@a.example/jwks",
        "https://a.example:port/jwks",
        "a.example/jwks",
    ],
)
def test_keys_are_read_from_addresses_that_nobody_can_forge(url: str) -> None:
    with pytest.raises(SettingsError, match="AUTH_JWKS_URL"):
        load({"AUTH_JWKS_URL": f"https://a.example/jwks,{url}"})


@pytest.mark.parametrize(
    "raw",
    [
        "169.254.169.254",
        "169.254.169.254:80",
        "169.254.0.0/16",
        "169.254.169.0/24:80",
        "100.100.100.200",
        "168.63.129.16:32526",
        "fd00:ec2::254",
        "[fd00:ec2::254]:80",
        "fd00:ec2::/48",
        "fe80::/10",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "metadata.google.internal",
        "Metadata.Google.Internal:80",
        "0.0.0.0",
        "ff02::1",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/33",
        "10.0.0.0/8/8",
        "127.1",
        "0x7f.0.0.1",
        "localhost.",
        "*.internal",
        "http://ollama.internal",
        "ollama.internal:",
        "ollama.internal:0",
        "ollama.internal:65536",
        "ollama.internal:１１",
        "ölama.internal",
        "[10.0.0.1]:80",
        "[ollama.internal]:80",
        "10.0.0.1 10.0.0.2",
    ],
)
def test_no_setting_opens_metadata_services_or_what_is_no_place(raw: str) -> None:
    with pytest.raises(SettingsError, match="CUSTOM_PROVIDER_ALLOW") as refused:
        load({"CUSTOM_PROVIDER_ALLOW": f"10.0.0.0/8,{raw}"})
    assert str(refused.value).endswith(ALLOWED)


@pytest.mark.parametrize("name", ["INGEST_URL", "INGEST_ASSETS_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "http://analytics.example",
        "http://127.0.0.1.example",
        "http://10.0.0.1",
        "ftp://analytics.example",
        "https://",
        "https:///e/",
        "https://user:word@analytics.example",
        "https://analytics.example:port",
        "https://analytics.example?token=x",
        "https://analytics.example#x",
        "https://analytics.example/%2e%2e/x",
        "https://analytics.example/../x",
        "https://analytics.example\\x",
        "https://änalytics.example",
        "analytics.example",
    ],
)
def test_analytics_go_to_an_address_that_nobody_can_listen_on(name: str, url: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load({name: url})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://us.i.posthog.com/", "https://us.i.posthog.com"),
        ("https://analytics.example:8443/posthog/", "https://analytics.example:8443/posthog"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_an_analytics_host_may_have_a_port_and_a_path(url: str, expected: str) -> None:
    assert load({"INGEST_URL": url}).ingest_url == expected


@pytest.mark.parametrize("key", ["phx_personal", "a key", "a/b", "a?b", "ä", "x" * 201])
def test_a_key_for_analytics_is_a_projects_and_is_not_shown(key: str) -> None:
    with pytest.raises(SettingsError, match="INGEST_API_KEY: the value given is not usable"):
        load({"INGEST_API_KEY": key})
