"""docs/mcp-servers.md: its example is imported, loads and decides; its table names every key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest

from sandboxd.authoring.mcpfile import convert
from sandboxd.cli.mcpimport import manifest_text
from sandboxd.paths import shipped
from sandboxd.policy import decide, load_config
from sandboxd.policy.definitions import Definition
from sandboxd.policy.mcpserver import McpServer, Pin, with_pins
from sandboxd.policy.structure import keys_of

DOCUMENT = Path(__file__).parents[2] / "docs/mcp-servers.md"


@pytest.fixture
def examples() -> dict[str, str]:
    text = DOCUMENT.read_text()
    found = dict(re.findall(r"<!-- file: (\S+) -->\n```(?:yaml|json)\n(.*?)```", text, re.S))
    assert text.count("<!-- file: ") == len(found) == 4
    return found


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory like /opt/mcp, with the example's two packages."""
    for name, version in (
        ("@modelcontextprotocol/server-filesystem", "2026.8.31"),
        ("@example/tracker-mcp", "1.4.0"),
    ):
        folder = tmp_path / "opt" / "node_modules" / name
        (folder / "dist").mkdir(parents=True)
        (folder / "dist/index.js").write_text("#!/usr/bin/env node\n")
        about = {"name": name, "version": version, "bin": {"server": "dist/index.js"}}
        (folder / "package.json").write_text(json.dumps(about))
    return tmp_path / "opt"


def test_the_example_is_imported_to_the_manifest_that_is_shown(
    examples: dict[str, str], packages: Path
) -> None:
    entries, problems = convert(
        examples["mcp.json"].encode(), source="mcp.json", packages=[packages]
    )
    assert not problems
    tracker = next(entry for entry in entries if entry.name == "tracker")
    made = manifest_text(tracker).replace(str(packages), "/opt/mcp")
    assert made == examples["tools/tracker/tool.yaml"]
    assert tracker.cleaned["env"] == {"TRACKER_TOKEN": "${TRACKER_TOKEN}", "LOG_LEVEL": "info"}


def test_the_example_loads_and_its_policy_does_what_it_says(
    examples: dict[str, str], packages: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    entries, _ = convert(examples["mcp.json"].encode(), source="mcp.json", packages=[packages])
    files = {f"tools/{e.name}/tool.yaml": manifest_text(e) for e in entries}
    files |= {k: v for k, v in examples.items() if k.startswith(("agents", "policies"))}
    files["agents/helper.yaml"] += "policy: readers\n"
    for name, text in files.items():
        (config / name).parent.mkdir(parents=True, exist_ok=True)
        (config / name).write_text(text)
    loaded = load_config(
        config, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    offered = {"files": ("write_file", "read_file"), "tracker": ("search_issues", "close_issue")}
    pins = {
        server: Pin(
            server,
            tuple(Definition(n, {"name": n, "inputSchema": schema}) for n in names),
            "tester",
            0.0,
        )
        for server, names in offered.items()
    }
    accepted = with_pins(loaded, pins)
    agent = accepted.agents["helper"]

    def verdict(tool: str, path: str) -> str:
        return decide(accepted, agent, tool, {"path": path}).verdict

    assert verdict("files__read_file", "/workspace/x") == "allow"
    assert verdict("files__write_file", "/workspace/drafts/x") == "allow"
    assert verdict("files__write_file", "/workspace/x") == "deny"
    assert verdict("tracker__search_issues", "x") == "allow"
    assert verdict("tracker__close_issue", "x") == "deny"  # the agent's file doesn't list it


def test_the_table_names_every_key() -> None:
    table = DOCUMENT.read_text().split("## The manifest")[1].split("\n**")[0]
    rows = re.findall(r"^\| `([a-z_]+)` \|", table, re.M)
    assert sorted(rows) == sorted(keys_of(McpServer))
    shown = dict(re.findall(r"^\| `([a-z_]+)` \| `([^`]+)` \|", table, re.M))
    stated = {f.name: f.default for f in attrs.fields(McpServer)}
    seconds = {"5m": 300.0, "30s": 30.0, "60s": 60.0}
    for name, text in shown.items():
        assert seconds.get(text, 1 << 20 if text == "1M" else text) == stated[name], name
