"""mcpServers files: what becomes a manifest, what a secret, and what is refused with a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sandboxd.authoring.mcpfile import Entry, Problem, convert
from sandboxd.errors import Invalid

KEY = "sk-live-0123456789abcdef0123"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """An npm prefix with one package, and a virtual environment with one program."""
    folder = tmp_path / "opt/node_modules/@scope/mcp-thing"
    (folder / "dist").mkdir(parents=True)
    (folder / "dist/index.js").write_text("#!/usr/bin/env node\n")
    about = {"name": "@scope/mcp-thing", "version": "1.2.3", "bin": {"thing": "dist/index.js"}}
    (folder / "package.json").write_text(json.dumps(about))
    venv = tmp_path / "opt/mcp-server-git"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / "bin/mcp-server-git").write_text(f"#!{venv}/bin/python\n")
    return tmp_path / "opt"


@pytest.fixture
def read(packages: Path) -> Any:
    def read(server: dict[str, Any], name: str = "thing", **more: Any) -> Entry | Problem:
        data = json.dumps({"mcpServers": {name: server}}).encode()
        entries, problems = convert(data, source="x.json", packages=[packages], **more)
        assert len(entries) + len(problems) == 1
        return entries[0] if entries else problems[0]

    return read


def npx(*args: str, **env: str) -> dict[str, Any]:
    return {"command": "npx", "args": ["-y", "@scope/mcp-thing", *args], "env": env}


def revealed(entry: Entry) -> dict[str, str]:
    return {name: value.reveal().decode() for name, value in entry.values.items()}


def test_an_installed_npm_package_is_started_by_its_path(read: Any, packages: Path) -> None:
    entry = read(npx("--verbose"))
    modules = packages / "node_modules"
    assert entry.manifest["program"] == str(modules / "@scope/mcp-thing/dist/index.js")
    assert entry.manifest["runtime"] == "node"
    assert entry.manifest["argv"] == ["--verbose"]
    assert entry.manifest["mounts"] == [{"source": str(modules), "target": str(modules)}]
    assert "network" not in entry.manifest


def test_an_installed_python_program_brings_its_environment(read: Any, packages: Path) -> None:
    for command, args in (
        ("uvx", ["mcp-server-git"]),
        ("uvx", ["--from", "mcp-server-git==1", "mcp-server-git"]),
        ("uv", ["tool", "run", "mcp-server-git@latest"]),
        ("pipx", ["run", "mcp-server-git"]),
        (str(packages / "mcp-server-git/bin/mcp-server-git"), []),
    ):
        entry = read({"command": command, "args": args})
        assert isinstance(entry, Entry), entry
        assert entry.manifest["program"] == str(packages / "mcp-server-git/bin/mcp-server-git")
        assert "runtime" not in entry.manifest
        sources = [mount["source"] for mount in entry.manifest["mounts"]]
        assert str(packages / "mcp-server-git") in sources


def test_keys_go_to_the_store_and_settings_stay(read: Any) -> None:
    entry = read(
        npx(
            API_KEY=KEY,
            ACCESS="b3BhcXVlIHZhbHVl",
            LOG_LEVEL="debug",
            DATA_DIR="/data/x",
            PORT="8080",
            BASE_URL="https://api.example.com/v1",
            PROXY_URL="https://user:pass-word@proxy.example.com/",
            EMPTY="",
        )
    )
    assert revealed(entry) == {
        "API_KEY": KEY,
        "ACCESS": "b3BhcXVlIHZhbHVl",
        "PROXY_URL": "https://user:pass-word@proxy.example.com/",
    }
    assert entry.manifest["environment"] == {
        "LOG_LEVEL": "debug",
        "DATA_DIR": "/data/x",
        "PORT": "8080",
        "BASE_URL": "https://api.example.com/v1",
        "EMPTY": "",
    }
    assert entry.cleaned["env"]["API_KEY"] == "${API_KEY}"
    assert entry.cleaned["env"]["PORT"] == "8080"
    assert entry.manifest["network"] == "host"
    assert KEY not in repr(entry) + json.dumps([entry.manifest, entry.cleaned, entry.notes])


def test_a_name_in_use_or_of_a_loader_gets_another_one(read: Any) -> None:
    entry = read(npx(API_KEY=KEY, HTTPS_PROXY="http://u:secret-pw@p/"), taken={"API_KEY"})
    assert revealed(entry) == {
        "THING_API_KEY": KEY,
        "THING_HTTPS_PROXY_2": "http://u:secret-pw@p/",
    }
    assert entry.manifest["secrets"] == [
        {"variable": "THING_API_KEY", "as": "API_KEY"},
        {"variable": "THING_HTTPS_PROXY_2", "as": "HTTPS_PROXY"},
    ]


def test_two_servers_with_one_name_for_their_keys_share_nothing(packages: Path) -> None:
    servers = {"one": npx(API_KEY=KEY), "two": npx(API_KEY=KEY[::-1])}
    data = json.dumps({"servers": servers}).encode()
    (one, two), problems = convert(data, source="x", packages=[packages])
    assert not problems
    assert (list(one.values), list(two.values)) == (["API_KEY"], ["TWO_API_KEY"])


@pytest.mark.parametrize("value", ["${API_KEY}", "${env:API_KEY}", "$API_KEY", "<your key>"])
def test_what_only_refers_to_a_key_is_still_to_be_set(read: Any, value: str) -> None:
    entry = read(npx(API_KEY=value))
    assert (entry.values, entry.unset) == ({}, ("API_KEY",))
    assert entry.manifest["secrets"] == [{"variable": "API_KEY"}]


@pytest.mark.parametrize(
    ("args", "argv", "values"),
    [
        (["postgresql://a:pw-1234@db/x"], ["{THING_URL}"], ["postgresql://a:pw-1234@db/x"]),
        (["--api-key", KEY], ["--api-key", "{THING_API_KEY}"], [KEY]),
        ([f"--token={KEY}", "x"], ["--token={THING_TOKEN}", "x"], [KEY]),
        (["--apiKey", "abcdef-1"], ["--apiKey", "{THING_APIKEY}"], ["abcdef-1"]),
        (["{x}", "--keyboard", "de"], ["{{x}}", "--keyboard", "de"], []),
    ],
)
def test_a_credential_on_the_command_line_is_taken_out(
    read: Any, args: list[str], argv: list[str], values: list[str]
) -> None:
    entry = read(npx(*args))
    assert entry.manifest["argv"] == argv
    assert list(revealed(entry).values()) == values
    for value in values:
        assert value not in json.dumps([entry.manifest, entry.cleaned])


def test_a_directory_on_the_command_line_is_mounted(read: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    entry = read(npx(str(tmp_path / "docs"), "/workspace"))
    place = str(tmp_path / "docs")
    assert {"source": place, "target": place} in entry.manifest["mounts"]
    assert entry.manifest["workspace"] == "rw"
    assert f"{place} is mounted read-only; if it should write there: mode: rw" in entry.notes


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ({"url": "https://x.example/mcp"}, "it is a remote server (http or sse)"),
        ({"type": "sse", "url": "https://x"}, "it is a remote server (http or sse)"),
        ({"command": "docker", "args": ["run", "x"]}, "it runs a container with docker"),
        ({"command": "npx", "args": ["-y", "@scope/other"]}, "@scope/other isn't installed in"),
        ({"command": "npx", "args": ["@scope/mcp-thing@9"]}, "wants @scope/mcp-thing 9, and 1.2.3"),
        ({"command": "npx", "args": ["--registry=http://k@r", "x"]}, "its option --registry of"),
        ({"command": "uvx", "args": ["absent"]}, "the program absent isn't installed in"),
        ({"command": "thing"}, "its command 'thing' is no path"),
        ({"command": "/no/such/program"}, "there is no program /no/such/program"),
        ({"command": "python", "args": ["-m", "x"]}, "started through a Python interpreter"),
        ({"command": "npx", "args": [7]}, "its args are not a list of texts"),
        ({"command": "npx", "args": ["x"], "cwd": "/"}, "sandboxd has nothing like its 'cwd'"),
        ({**npx(), "env": {"API_KEY": "ab"}}, "API_KEY in its env is too short for a key"),
        ({**npx(), "env": {"A-B": "x"}}, "'A-B' in its env is not a variable name"),
        ({**npx(), "env": {"DSN": "pre-${X}"}}, "DSN in its env is put together from variables"),
        (
            {"command": "uvx", "args": ["mcp-server-git", "--token", KEY]},
            "its args hold a credential",
        ),
        ("npx", "it is not an object"),
    ],
)
def test_what_cannot_be_imported_has_a_reason(read: Any, server: Any, reason: str) -> None:
    problem = read(server)
    assert isinstance(problem, Problem)
    assert reason in problem.message
    assert KEY not in problem.message + problem.hint


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "the file has no object 'mcpServers'"),
        (b"{// no\n}", "the file is not JSON: line 1, column 2"),
        (b'{"mcpServers": {}, "mcpServers": {}}', "the same key twice"),
        (b"\xff", "the file is not"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_of_another_form_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        convert(data, source="x")


def test_names_become_names_of_servers(read: Any) -> None:
    for given, name in (
        ("GitHub (work)", "github-work"),
        ("7zip", "mcp-7zip"),
        ("git", "mcp-git"),
        ("x" * 50, "x" * 32),
    ):
        assert read(npx(), name=given, reserved=["git"]).name == name
    assert read(npx(), name="files", prefix="team-").name == "team-files"
    assert read(npx(), name="---").message == "its name has no letter or digit"
