"""What the documents say is what the code does; each failure says how to mend it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from textwrap import dedent

import pytest

from config import Settings, settings_page
from providers.base import FailureCode
from providers.catalog import Ability, load_catalog
from providers.scripted import BUILT_IN_SCRIPTS
from server.graphql_socket import NOT_READING, PROTOCOL, SocketTimes
from server.ingest import MAX_ANSWER_BYTES, MAX_AT_ONCE, PARAMETERS, IngestLimits
from server.issuers import MAX_KEY_SET_BYTES
from services.backfills.registry import backfills
from services.encryption import Vault
from services.identity import MAX_LIFETIME_SECONDS, MAX_NAME_CHARS, RECHECK_SECONDS
from services.keys import MAX_WAITING, KeySetTimes
from services.viewer import MAX_TOKEN_CHARS

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_the_page_of_settings_is_printed_from_the_code() -> None:
    assert (ROOT / "docs/settings.md").read_text() == settings_page(), "run: make docs"


@pytest.mark.parametrize("client", ["apollo", "urql"])
def test_the_examples_of_the_readme_are_those_that_run(client: str) -> None:
    script = (ROOT / f"tests/clients/{client}.mjs").read_text()
    example = script.split("// README:begin\n")[1].split("// README:end")[0].rstrip()
    assert f"```js\n{example}\n```" in README, f"copy the lines of tests/clients/{client}.mjs into README.md"


def test_the_example_of_the_page_on_identity_is_the_one_that_runs() -> None:
    script = (ROOT / "tests/clients/better-auth.mjs").read_text()
    example = dedent(script.split("// docs:begin\n")[1].split("  // docs:end")[0]).rstrip()
    assert f"```js\n{example}\n```" in (ROOT / "docs/identity.md").read_text(), "copy the lines of better-auth.mjs"


def test_the_page_on_identity_names_every_setting_of_it() -> None:
    page = (ROOT / "docs/identity.md").read_text()
    names = [
        item.metadata["env"] for item in fields(Settings) if item.name.startswith(("auth_", "session_", "anonymous"))
    ]
    assert len(names) == 9
    for name in names:
        assert f"`{name}" in page, name


def test_the_page_on_identity_says_how_long_things_hold() -> None:
    page = (ROOT / "docs/identity.md").read_text().replace("\n", " ")
    times = KeySetTimes()
    assert f"every {times.refresh_seconds / 60:g} minutes" in page
    assert f"the next waits for {times.cooldown_seconds:g} s" in page
    assert f"(at most {MAX_WAITING};" in page
    assert f"good for {times.stale_seconds / 3600:g} h after" in page
    assert f"good for {times.removed_seconds / 60:g} minutes more" in page
    assert f"at most {(times.refresh_seconds + times.removed_seconds) / 60:g} minutes after its removal" in page
    assert f"within {RECHECK_SECONDS:g} s ({SocketTimes().watch_seconds:g} s for open sockets)" in page
    assert f"texts of 1 to {MAX_NAME_CHARS} characters" in page
    assert f"at most {MAX_LIFETIME_SECONDS / 86_400:g} days ahead" in page
    assert f"At most {MAX_TOKEN_CHARS:,} characters" in page
    assert f"{MAX_KEY_SET_BYTES // 1_024} KiB" in page
    assert f"`ANONYMOUS_SESSIONS_PER_MINUTE` ({Settings.anonymous_sessions_per_minute})" in page
    assert f"`AUTH_LEEWAY_SECONDS` ({Settings.auth_leeway_seconds:g}, at most 60)" in page


def test_the_page_on_the_relay_names_its_settings_and_limits() -> None:
    page = (ROOT / "docs/ingest.md").read_text().replace("\n", " ")
    names = [item.metadata["env"] for item in fields(Settings) if item.name.startswith("ingest_")]
    assert len(names) == 6
    for name in names:
        assert f"`{name}`" in page or f"{name}=" in page, name
    limits = IngestLimits(max_bytes=Settings.ingest_max_bytes)
    assert f"`INGEST_MAX_BYTES` ({limits.max_bytes // 1_048_576} MiB)" in page
    assert f"`INGEST_REQUESTS_PER_MINUTE` ({Settings.ingest_requests_per_minute})" in page
    assert f"`INGEST_TOTAL_REQUESTS_PER_MINUTE` ({Settings.ingest_total_requests_per_minute:,})" in page
    times = (limits.connect_seconds, limits.silence_seconds, limits.total_seconds)
    assert "; ".join(f"{seconds:g} s" for seconds in times) in page
    assert f"| a body has to come within | {limits.body_seconds:g} s |" in page
    assert f"| requests under way in one process | {MAX_AT_ONCE} |" in page
    assert f"| an answer | {MAX_ANSWER_BYTES // 1_048_576} MiB |" in page
    for name in PARAMETERS:
        assert f"`{name}`" in page, name


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", README)) - {"and"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_test_that_the_promises_name_exists() -> None:
    page = (ROOT / "docs/streaming.md").read_text() + (ROOT / "docs/providers.md").read_text()
    names = re.findall(r"::(test_\w+)", page)
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert names
    for name in names:
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`(tests/[\w/]+\.py)", page):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("page", "kind", "last"), [("faults", "R", 70), ("attacks", "S", 60)])
def test_every_fault_and_attack_is_listed_once_with_a_test_that_exists(page: str, kind: str, last: int) -> None:
    rows = re.findall(rf"^\| {kind}(\d+) \| (.+?) \| (.*) \|$", (ROOT / f"docs/{page}.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, last + 1))
    for number, _, proof in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", proof)
        assert tests or "Not covered" in proof, f"{kind}{number}: name a test, or say why there is none"
        for path, name in tests:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{kind}{number}: {path}::{name}"


def test_the_page_of_scripted_models_lists_models_and_failures() -> None:
    page = (ROOT / "docs/scripted-models.md").read_text()
    for name in (*BUILT_IN_SCRIPTS, *FailureCode.__members__):
        assert f"`{name}`" in page, name


def test_the_page_of_operating_lists_every_backfill_as_the_command_does() -> None:
    page = (ROOT / "docs/operating.md").read_text()
    for backfill in backfills(Vault([bytes(32)])):
        assert f"| `{backfill.name}` | {backfill.description} |" in page


def test_the_page_of_providers_lists_every_failure() -> None:
    page = (ROOT / "docs/providers.md").read_text()
    for name in FailureCode.__members__:
        assert f"| `{name}`" in page, name


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called so, its head first."""
    lines = page[page.index(f"\n| {first} |") :].lstrip().split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("| ---")]


def test_the_page_of_providers_has_a_tested_or_refused_cell_for_every_provider_and_ability() -> None:
    page = (ROOT / "docs/providers.md").read_text()
    tests = {name.strip("`"): test.strip("`").split("::") for name, test in table(page, "name")[1:]}
    for path, test in tests.values():
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
    head, *rows = table(page, "provider")
    providers = load_catalog().providers
    assert [row[0] for row in rows] == [one.label for one in providers.values()] + ["Custom endpoints", "Scripted"]
    cells = [cell for row in rows for cell in row[1:]]
    assert {len(row) for row in rows} == {len(head)}
    named = [set(re.findall(r"`([a-z-]+)`", cell)) for cell in cells]
    for cell, names in zip(cells, named, strict=True):
        assert cell.startswith("not offered") or names, cell
        assert names <= tests.keys(), cell
    assert set.union(*named) == tests.keys(), "a test that no cell names"


def test_the_page_of_providers_offers_what_the_file_of_models_does() -> None:
    head, *rows = table((ROOT / "docs/providers.md").read_text(), "provider")
    catalog = load_catalog()
    columns = {"images in": Ability.VISION, "PDFs in": Ability.PDF, "image output": Ability.IMAGE_OUTPUT}
    for (name, endpoint), row in zip(catalog.providers.items(), rows, strict=False):
        for column, ability in columns.items():
            offered = any(
                name in model.providers and ability in (model.abilities or ()) and ability not in endpoint.lacks
                for model in catalog.models.values()
            )
            assert row[head.index(column)].startswith("not offered") is not offered, (name, column)


def test_the_protocol_of_the_docs_is_the_servers() -> None:
    assert PROTOCOL in (ROOT / "docs/streaming.md").read_text()


def test_the_page_of_streaming_says_how_long_a_socket_is_waited_for() -> None:
    page = (ROOT / "docs/streaming.md").read_text().replace("\n", " ")
    times = SocketTimes()
    assert f"| {NOT_READING} | nothing of what waits for it was read for {times.stall_seconds:g} s |" in page
    assert f"no `connection_init` within {times.init_seconds:g} seconds" in page
    assert f"waits {times.close_seconds:g} s for the answer to a close" in page
    assert f"does not answer for about {times.heartbeat_seconds * 1.5:.0f} seconds" in page
    assert f"let go after {times.stall_seconds:g} to {2 * times.stall_seconds:g} s" in page


def test_ci_calls_what_the_readme_says() -> None:
    ci = (ROOT / ".ci/run").read_text()
    for command in ("make check", "make clients", "make test"):
        assert command in ci
        assert command in README


def test_no_locked_version_has_a_hole_that_was_mended() -> None:
    for lock in ("run", "dev"):
        found = re.search(
            r"^strawberry-graphql==([\d.]+)", (ROOT / f"requirements/{lock}.lock").read_text(), re.MULTILINE
        )
        assert found is not None
        # CVE-2026-35523 and CVE-2026-35526.
        assert tuple(map(int, found[1].split("."))) >= (0, 312, 3)


def test_a_lock_file_names_no_registry_and_hashes_everything() -> None:
    for name in ("run", "dev"):
        text = (ROOT / f"requirements/{name}.lock").read_text()
        assert "://" not in text
        packages = re.findall(r"^[a-z0-9][^\s=]*==\S+", text, re.MULTILINE)
        assert len(packages) > 20
        for block in re.split(r"\n(?=[a-z0-9])", text.strip()):
            assert "--hash=sha256:" in block, block[:60]
    for folder in ("tests/clients", "web/graphiql", "bench/peers"):
        assert '"resolved"' not in (ROOT / folder / "package-lock.json").read_text()
