"""Dockerfile, .dockerignore and compose.yaml fit the code and each other; looked at as text, for want of an engine."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from config import Settings, load

ROOT = Path(__file__).parents[2]
Stage = list[tuple[str, str]]
SETTINGS = {item.metadata["env"] for item in fields(Settings)}
# Read by Python itself, or by the shell that finds it.
NOT_OURS = {"PATH", "PYTHONUNBUFFERED"}


def stages() -> list[Stage]:
    """The Dockerfile's stages: the instructions of each, as (name, arguments)."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            if name == "FROM":
                found.append([])
            found[-1].append((name, arguments.strip()))
    return found


def last(name: str) -> str:
    """The arguments of the final stage's last such instruction: the one that holds."""
    return [arguments for instruction, arguments in stages()[-1] if instruction == name][-1]


def copied() -> set[str]:
    """What is copied from the repository, in any stage."""
    found: set[str] = set()
    for instruction, arguments in (item for stage in stages() for item in stage):
        if instruction in ("COPY", "ADD") and "--from=" not in arguments:
            found.update(word for word in arguments.split()[:-1] if not word.startswith("--"))
    return found


def image_environment() -> dict[str, str]:
    return {
        name: value
        for instruction, arguments in stages()[-1]
        if instruction == "ENV"
        for name, _, value in (word.partition("=") for word in arguments.split())
    }


def services() -> dict[str, str]:
    """The lines of each service in compose.yaml, without comments."""
    text = re.sub(r"(?m)^ *#.*\n", "", (ROOT / "compose.yaml").read_text())
    body = text.split("\nservices:\n")[1].split("\nvolumes:\n")[0]
    parts = re.split(r"(?m)^  ([a-z0-9]+):\n", body)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compose_environment() -> dict[str, str]:
    """Threadgraph's variables in compose.yaml, as they stand there."""
    block = services()["threadgraph"].split("    environment:\n")[1]
    return dict(re.findall(r"(?m)^      ([A-Z0-9_]+): (.*)$", block.split("\n    ports:")[0]))


def images() -> list[str]:
    own = {arguments.partition(" AS ")[2] for stage in stages() for name, arguments in stage if name == "FROM"}
    bases = [stage[0][1].partition(" AS ")[0] for stage in stages()]
    return [base for base in bases if base not in own] + re.findall(
        r"(?m)^    image: (\S+)$", "\n".join(services().values())
    )


def imported_modules() -> set[str]:
    """The repository's top-level modules that `python -m server` reaches."""
    reached: set[str] = set()
    waiting = ["server"]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        place = ROOT / module
        for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                tops = {name.partition(".")[0] for name in names}
                waiting += [top for top in tops if (ROOT / top).is_dir() or (ROOT / f"{top}.py").is_file()]
    return reached


def test_every_source_that_is_copied_exists() -> None:
    assert copied()
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_every_module_that_the_server_imports_is_copied() -> None:
    modules = imported_modules()
    assert {"config", "server", "graph"} <= modules
    files = {f"{module}.py" if (ROOT / f"{module}.py").is_file() else module for module in modules}
    assert files - copied() == set()


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied()


def test_packages_are_installed_from_the_lock_file_with_hashes() -> None:
    runs = [arguments for stage in stages() for name, arguments in stage if name == "RUN"]
    with_pip = [arguments for arguments in runs if "pip install" in arguments]
    assert with_pip
    assert all("--require-hashes" in arguments and "run.lock" in arguments for arguments in with_pip)


def test_the_final_stage_runs_as_a_user_that_is_not_root() -> None:
    assert last("USER").partition(":")[0] not in ("", "0", "root")


@pytest.mark.parametrize("name", ["ENTRYPOINT", "CMD"])
def test_commands_are_in_exec_form_so_that_signals_arrive(name: str) -> None:
    command = json.loads(last(name))
    assert command
    assert all(isinstance(word, str) for word in command)
    assert command[0] not in ("sh", "bash", "/bin/sh")


def test_the_image_stops_by_sigterm() -> None:
    assert last("STOPSIGNAL") == "SIGTERM"


def test_the_image_listens_on_every_interface_and_keeps_its_data_in_a_volume() -> None:
    environment = image_environment()
    settings = load({name: value for name, value in environment.items() if name in SETTINGS})
    assert settings.host == "0.0.0.0"
    assert str(settings.port) == last("EXPOSE")
    assert [str(settings.data_dir)] == json.loads(last("VOLUME"))
    assert set(environment) - NOT_OURS <= SETTINGS


class Answer(BaseHTTPRequestHandler):
    """200 at /healthz as long as the server is healthy."""

    healthy = True

    def do_GET(self) -> None:
        self.send_response((200 if self.healthy else 503) if self.path == "/healthz" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Says nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def check_health(port: int) -> int:
    """The exit status of the image's own check; a proxy that nobody serves must not matter to it."""
    form, _, command = last("HEALTHCHECK").partition(" CMD ")
    assert "--timeout=" in form
    program, *arguments = json.loads(command)
    assert program == "python"
    environment = os.environ | {"PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL).returncode


def test_the_health_check_passes_on_a_server_that_answers_at_port(port: int) -> None:
    assert check_health(port) == 0


def test_the_health_check_fails_on_a_server_that_is_not_well(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "healthy", False)
    assert check_health(port) == 1


def test_the_health_check_fails_where_nobody_listens(port: int) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as closed:
        pass
    assert closed.server_port != port
    assert check_health(closed.server_port) == 1


def test_every_variable_for_threadgraph_in_compose_is_a_setting() -> None:
    assert "DATABASE_URL" in compose_environment()
    assert set(compose_environment()) - SETTINGS == set()


def test_the_server_takes_the_values_that_compose_gives_it() -> None:
    given = {
        name: re.sub(r"\$\{[A-Z_]+:\?[^}]*\}", "a-secret", re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", value))
        for name, value in compose_environment().items()
    }
    assert [value for value in given.values() if "$" in value] == []
    settings = load(given)
    assert settings.database_url == "postgresql://threadgraph:a-secret@postgres:5432/threadgraph"


def test_compose_waits_longer_for_a_stop_than_the_server_does_for_its_answers() -> None:
    found = re.search(r"(?m)^    stop_grace_period: (\d+)s$", services()["threadgraph"])
    assert found
    assert int(found[1]) > Settings.shutdown_grace_seconds + 10


def test_no_secret_has_a_value_in_compose() -> None:
    text = "\n".join(services().values())
    secrets = re.findall(r"(?m)^ +\w*(?:PASSWORD|SECRET|SECRET_ACCESS_KEY|ACCESS_KEY_ID|API_KEY|_AUTH): (.*)$", text)
    assert len(secrets) >= 5
    assert [value for value in secrets if not re.fullmatch(r"\$\{[A-Z0-9_]+(:-|:\?[^}]+)\}", value)] == []


def test_a_variable_that_must_be_set_belongs_to_a_service_that_always_runs() -> None:
    # Compose fills in the whole file before it looks at profiles.
    sometimes = [block for block in services().values() if "profiles:" in block]
    assert sometimes
    assert [block for block in sometimes if re.search(r"[^$]\$\{\w+:\?", block)] == []


def test_only_threadgraph_has_a_published_port_and_only_for_this_machine() -> None:
    assert [name for name, block in services().items() if "ports:" in block] == ["threadgraph"]
    ports = re.findall(r'(?m)^      - "(.*:8000)"$', services()["threadgraph"])
    assert len(ports) == 1
    assert ports[0].startswith("127.0.0.1:")


def test_every_service_can_be_waited_for() -> None:
    blocks = services()
    assert set(blocks) == {"threadgraph", "postgres", "valkey", "s3"}
    assert [name for name, block in blocks.items() if "healthcheck:" not in block] == ["threadgraph"]  # the image's own
    assert "condition: service_healthy" in blocks["threadgraph"]


def test_images_have_a_version_and_no_registry() -> None:
    assert len(images()) == 4
    for image in images():
        name, _, tag = image.partition(":")
        assert re.match(r"v?\d", tag), image
        assert "latest" not in tag
        # A first part with a dot, or localhost, would be a host (as in the reference grammar of distribution).
        assert "." not in name.partition("/")[0]
        assert not name.startswith("localhost")
