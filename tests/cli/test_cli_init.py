"""``sandboxctl init``: what it writes works, and what exists is never touched."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.paths import shipped
from sandboxd.policy import Config, decide, load_config
from sandboxd.vault.custody import KeySource, load_master_key

if TYPE_CHECKING:
    from cli_support import Ctl


def load(directory: Path) -> Config:
    return load_config(
        directory, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def fresh(alone: Ctl) -> Path:
    """A new configuration, made under an umask that would close or open everything."""
    directory = alone.directory / "config"
    for umask in (0o077, 0o000):
        old = os.umask(umask)
        try:
            alone("init", str(directory) if umask else str(alone.directory / "open"))
        finally:
            os.umask(old)
    return directory


def test_what_it_writes_loads_without_a_warning_of_its_own(fresh: Path) -> None:
    config = load(fresh)
    assert set(config.agents) == {"example"}
    assert "example" in config.policies
    assert not [w for w in config.warnings if str(fresh) in w]
    load_master_key(KeySource("file", path=fresh / "master.key"))


def test_every_default_that_it_shows_is_a_key_that_the_daemon_knows(fresh: Path) -> None:
    alternatives = ("#  credential:", "#  passphrase_file:", "#  path:")
    for path in fresh.rglob("*.yaml"):
        lines = [
            re.sub(r"^#(?! )|^#(?=  )", "", line)
            for line in path.read_text().splitlines()
            if not line.startswith(alternatives)
        ]
        text = "\n".join(lines) + "\n"
        path.write_text(text.replace("/etc/sandboxd/master.key", str(fresh / "master.key")))
    config = load(fresh)
    assert config.settings.max_sessions == 64
    assert config.settings.key is not None
    assert config.agents["example"].environment == {"TZ": "Europe/Berlin"}
    assert config.agents["example"].mounts
    assert config.policies["example"].timeout == 30


def test_the_example_policy_does_what_it_says(fresh: Path) -> None:
    agent = fresh / "agents" / "example.yaml"
    agent.write_text(agent.read_text().replace("policy: default", "policy: example"))
    config = load(fresh)
    url = {"url": "https://example.com/"}
    allowed = decide(config, config.agents["example"], "http_request", {**url, "method": "GET"})
    denied = decide(config, config.agents["example"], "http_request", {**url, "method": "DELETE"})
    assert (allowed.verdict, denied.verdict) == ("allow", "deny")
    assert "nothing is deleted" in denied.reason


def test_the_tool_in_the_readme_is_a_tool(fresh: Path) -> None:
    readme = (fresh / "tools" / "README.md").read_text()
    manifest, program = re.findall(r"```(?:yaml|sh)\n(.*?)```", readme, re.DOTALL)
    folder = fresh / "tools" / "greet"
    folder.mkdir()
    (folder / "tool.yaml").write_text(manifest)
    (folder / "greet.sh").write_text(program)
    (folder / "greet.sh").chmod(0o755)
    tool = load(fresh).tools["greet"]
    assert [(s.variable, s.as_name) for s in tool.secrets] == [("GREETING_SIGNATURE", "SIGNATURE")]
    done = subprocess.run(
        [folder / "greet.sh", "you"], env={"SIGNATURE": "Ada"}, capture_output=True, text=True
    )
    assert done.stdout == "hello you, yours A.\n"


def test_the_key_is_private_and_the_rest_readable_whatever_the_umask(fresh: Path) -> None:
    for directory in (fresh, fresh.parent / "open"):
        for path in directory.rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            wanted = 0o400 if path.name == "master.key" else 0o755 if path.is_dir() else 0o644
            assert mode == wanted, path
    assert "/master.key" in (fresh / ".gitignore").read_text().splitlines()


def test_a_second_time_changes_nothing_and_says_so(alone: Ctl, fresh: Path) -> None:
    before = tree(fresh)
    done = alone("init", str(fresh), status=5)
    assert "nothing was changed" in done.stderr
    assert tree(fresh) == before


def test_where_only_the_key_is_missing_only_the_key_is_made(alone: Ctl, fresh: Path) -> None:
    (fresh / "master.key").unlink()
    (fresh / "agents" / "example.yaml").unlink()
    before = tree(fresh)
    made = alone.json("init", str(fresh))
    assert made["created"] == [str(fresh / "master.key")]
    after = tree(fresh)
    assert after.pop("master.key").startswith(b"sandboxd-key-1:")
    assert after == before


def test_a_key_that_is_there_is_kept(alone: Ctl, fresh: Path) -> None:
    key = (fresh / "master.key").read_bytes()
    other = alone.directory / "other"
    other.mkdir()
    (other / "master.key").write_bytes(key)
    made = alone.json("init", str(other))
    assert made["kept"] == [str(other / "master.key")]
    assert (other / "master.key").read_bytes() == key
    assert (other / "sandboxd.yaml").exists()


def test_a_configuration_with_its_key_elsewhere_gets_it_there(alone: Ctl, fresh: Path) -> None:
    (fresh / "master.key").unlink()
    elsewhere = alone.directory / "elsewhere.key"
    (fresh / "sandboxd.yaml").write_text(f"version: 1\nkey: {{file: {elsewhere}}}\n")
    assert alone.json("init", str(fresh))["created"] == [str(elsewhere)]
    assert not (fresh / "master.key").exists()
    (fresh / "sandboxd.yaml").write_text("version: 1\nkey: {credential: sandboxd.key}\n")
    assert "whose key is a credential" in alone("init", str(fresh), status=5).stderr
    assert not (fresh / "master.key").exists()


def test_what_cannot_be_written_leaves_nothing_behind(alone: Ctl) -> None:
    directory = alone.directory / "half"
    directory.mkdir()
    (directory / "tools").write_text("a file where a directory has to be")
    done = alone("init", str(directory), status=2)
    assert "is not a directory" in done.stderr
    assert tree(directory) == {"tools": b"a file where a directory has to be"}


def test_it_says_what_to_do_next(alone: Ctl) -> None:
    here = alone.directory / "there"
    text = alone("init", str(here)).stdout
    assert f"sandboxd --config {here}" in text
    assert "sandboxctl run -t example" in text
    default = alone("init").stdout
    assert f"created {alone.directory}/config/sandboxd.yaml" in default
    assert "  sandboxd  " in default
    assert json.loads(alone("config", "check", str(here), "--json").stdout)["generation"]


def test_the_example_agent_runs(daemon: Ctl) -> None:
    done = daemon("run", "example", stdin=b"echo hello from $HOME; exit 3\n", status=3)
    assert done.stdout.startswith("hello from /")
