"""Tool calls through everything: an agent in its sandbox, the bridge, the daemon, a tool."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest
from real_daemon import RealDaemon, until

from sandboxd.errors import Invalid

SECRET = "s3cr3t-value-of-the-tests"

#: Speaks MCP over the real bridge: argument 1 is a JSON list of [tool, arguments].
AGENT = """
import json, subprocess, sys
bridge = subprocess.Popen(["sandboxd-mcp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def say(**message):
    bridge.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\\n")
    bridge.stdin.flush()
def ask(id, method, **params):
    say(id=id, method=method, params=params)
    while True:
        answer = json.loads(bridge.stdout.readline())
        if answer.get("id") == id:
            return answer
ask(0, "initialize", protocolVersion="2025-06-18", capabilities={},
    clientInfo={"name": "test", "version": "1"})
say(method="notifications/initialized")
print(json.dumps(ask(1, "tools/list")), flush=True)
for number, (tool, arguments) in enumerate(json.loads(sys.argv[1]), 2):
    print(json.dumps(ask(number, "tools/call", name=tool, arguments=arguments)), flush=True)
"""

_CALLED = "[use_secret, slow, flood, picky, gone]"


@pytest.fixture
def tooled(configured: RealDaemon) -> RealDaemon:
    """An agent ``caller`` whose argument says what to call, and tools to call."""
    configured.python_agent("caller", AGENT, tools=_CALLED)
    secret = "secrets: [{variable: TOKEN}]\n"
    configured.tool(
        "use_secret", '#!/bin/sh\necho "token $TOKEN"; env | cut -d= -f1 | sort | xargs\n', secret
    )
    configured.tool("slow", "#!/bin/sh\nsetsid sleep 301 & sleep 301\n", secret + "timeout: 60s\n")
    configured.tool(
        "flood", "#!/bin/sh\nyes '0123456789'\n", "output_limit: 64K\non_overflow: kill\n"
    )
    configured.tool(
        "picky",
        '#!/bin/sh\necho "got $1"\n',
        """
        input:
          type: object
          properties: {word: {type: string, maxLength: 10}}
          required: [word]
          additionalProperties: false
        argv: ["{word}"]
        """,
    )
    configured.tool("gone", "no program and no script\n", "")
    for name in ("use_secret", "slow", "flood", "gone"):
        path = configured.paths.config / f"tools/{name}/tool.yaml"
        path.write_text(path.read_text() + "input: {type: object, additionalProperties: false}\n")
    configured.start()
    configured.set("caller", TOKEN=SECRET)
    return configured


def calls(daemon: RealDaemon, *wanted: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of tool calls made by an agent in a session of its own."""
    done = daemon.run("caller", json.dumps(wanted))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[1:]]


def text(answer: dict[str, Any]) -> str:
    return "\n".join(block.get("text", "") for block in answer["result"]["content"])


def sleepers() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if "301" in (p.info["cmdline"] or [])]


def in_background(daemon: RealDaemon, tool: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "sandboxd.cli", "--config", str(daemon.paths.config)),
        *("--state", str(daemon.paths.state), "--runtime", str(daemon.paths.runtime)),
        *("run", "caller", "--", json.dumps([(tool, {})])),
    ]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_tool_gets_the_secret_and_the_agent_does_not(tooled: RealDaemon) -> None:
    (answer,) = calls(tooled, ("use_secret", {}))
    assert text(answer).startswith("token [redacted:TOKEN]")
    names = set(text(answer).splitlines()[1].split())
    assert "TOKEN" in names
    assert names <= {"HOME", "LANG", "PATH", "PWD", "TMPDIR", "TOKEN", "_", "SHLVL"}
    decided = next(r for r in tooled.audit() if r["event"] == "call.decided")
    assert decided["decision"] == "allow"
    assert [(i["name"], i["version"]) for i in decided["injected"]] == [("TOKEN", 1)]
    assert SECRET not in json.dumps(tooled.audit())
    assert SECRET.encode() not in tooled.paths.store.read_bytes()
    assert SECRET not in tooled.log.read_text()


def test_what_is_wrong_with_a_call_is_said(tooled: RealDaemon) -> None:
    unknown, other, missing, option, too_long, fine = calls(
        tooled,
        ("no_such_tool", {}),
        ("shell", {"command": "id"}),
        ("picky", {}),
        ("picky", {"word": "--help"}),
        ("picky", {"word": "x" * 11}),
        ("picky", {"word": "yes"}),
    )
    for answer in (unknown, other):
        assert "unknown tool" in answer["error"]["message"]
    assert "word" in json.dumps(missing)
    assert "-" in json.dumps(option)
    assert "isError" in json.dumps(option) or "error" in option
    assert "10" in json.dumps(too_long)
    assert text(fine).strip() == "got yes"
    denied = [r for r in tooled.audit() if r.get("decision") == "deny"]
    assert len(denied) == 5


def test_a_program_that_cannot_run_is_told_from_one_that_fails(tooled: RealDaemon) -> None:
    (answer,) = calls(tooled, ("gone", {}))
    assert answer["result"]["isError"] is True
    assert "ENOEXEC" in text(answer)
    assert tooled.audit()[-2]["outcome"] == "failed"


def test_output_over_its_cap_kills_the_tool(tooled: RealDaemon) -> None:
    (answer,) = calls(tooled, ("flood", {}))
    assert answer["result"]["isError"] is True
    assert len(text(answer)) <= (64 << 10) + 1000
    ended = next(r for r in tooled.audit() if r["event"] == "call.ended")
    assert ended["outcome"] == "overflow"


def test_a_timeout_kills_the_whole_tree(tooled: RealDaemon) -> None:
    manifest = tooled.paths.config / "tools/slow/tool.yaml"
    manifest.write_text(manifest.read_text().replace("timeout: 60s", "timeout: 1s"))
    tooled.call("reload")
    (answer,) = calls(tooled, ("slow", {}))
    assert answer["result"]["isError"] is True
    assert "timeout" in text(answer) or "1 s" in text(answer)
    assert sleepers() == []
    ended = next(r for r in tooled.audit() if r["event"] == "call.ended")
    assert ended["outcome"] == "timeout"


def test_an_agent_that_goes_in_mid_call_takes_the_call_along(tooled: RealDaemon) -> None:
    running = in_background(tooled, "slow")
    until(lambda: len(sleepers()) == 2)
    running.send_signal(signal.SIGKILL)  # sandboxctl dies, so its session is stopped
    running.communicate()
    until(lambda: sleepers() == [])
    until(lambda: tooled.audit()[-1]["event"] == "session.ended")
    ended = next(r for r in tooled.audit() if r["event"] == "call.ended")
    assert ended["outcome"] == "cancelled"


def test_a_daemon_killed_in_mid_call_orphans_nothing(tooled: RealDaemon) -> None:
    running = in_background(tooled, "slow")
    until(lambda: len(sleepers()) == 2)
    tooled.stop(signal.SIGKILL)
    until(lambda: sleepers() == [])
    _, errors = running.communicate(timeout=30)
    assert running.returncode != 0
    assert SECRET not in errors
    tooled.start()
    assert tooled.call("audit.verify")["ok"]
    assert tooled.call("session.list", all=True)["sessions"][0]["reason"] == "the daemon died"


def test_revoking_now_kills_the_call_that_holds_the_old_value(tooled: RealDaemon) -> None:
    running = in_background(tooled, "slow")
    until(lambda: len(sleepers()) == 2)
    done = tooled.set("caller", now=True, TOKEN="another-value")
    assert done["cancelled_calls"] == 1
    assert sleepers() == []
    out, _ = running.communicate(timeout=30)
    assert "revoked" in out
    (answer,) = calls(tooled, ("use_secret", {}))  # the next session has the new one
    assert text(answer).startswith("token [redacted:TOKEN]")


def test_a_change_takes_effect_on_the_next_session(tooled: RealDaemon) -> None:
    gate = tooled.paths.workspaces / "caller"
    fifo_agent = AGENT.replace(
        "for number",
        "open('/workspace/ready', 'w').close(); open('/workspace/go').read()\nfor number",
    )
    tooled.python_agent("caller", fifo_agent, tools=_CALLED)
    tooled.call("reload")
    gate.mkdir(mode=0o700, parents=True)
    for made in (gate.parent, gate):
        os.chown(made, tooled.paths.state.stat().st_uid, tooled.paths.state.stat().st_gid)
    os.chown(gate, tooled.paths.state.stat().st_uid, tooled.paths.state.stat().st_gid)
    os.mkfifo(gate / "go", 0o600)
    os.chown(gate / "go", gate.stat().st_uid, gate.stat().st_gid)
    running = in_background(tooled, "use_secret")
    until(lambda: (gate / "ready").exists())
    assert tooled.set("caller", TOKEN="the-second-value")["live_sessions"]
    threading.Thread(target=(gate / "go").write_text, args=("go",)).start()
    running.communicate(timeout=30)
    decided = [r for r in tooled.audit() if r["event"] == "call.decided"]
    assert [i["version"] for i in decided[-1]["injected"]] == [1]


def test_revoking_is_done_to_the_end_when_its_operator_leaves(tooled: RealDaemon) -> None:
    running = in_background(tooled, "slow")
    until(lambda: len(sleepers()) == 2)
    encoded = base64.b64encode(b"another-value").decode()
    for number in range(10):
        with tooled.client() as client:
            client.submit("env.set", agent="caller", values={"TOKEN": encoded}, now=True)
            time.sleep(number / 1000)
    until(lambda: sleepers() == [])
    running.communicate(timeout=30)
    names = ("env.set", "env.revoked", "admin.failed")
    until(lambda: len([r for r in tooled.audit() if r["event"] == "env.revoked"]) >= 1)
    events = [r["event"] for r in tooled.audit() if r["event"] in names]
    sets = events.count("env.set")
    assert sets >= 2  # the fixture's and at least one of ours
    until(lambda: tooled.call("env.list", agent="caller")["variables"][0]["version"] == sets)
    until(
        lambda: (
            [r["up_to"] for r in tooled.audit() if r["event"] == "env.revoked"][-1:] == [sets - 1]
        )
    )


def test_what_was_removed_can_still_be_taken_from_live_sessions(tooled: RealDaemon) -> None:
    running = in_background(tooled, "slow")
    until(lambda: len(sleepers()) == 2)
    assert tooled.call("env.remove", agent="caller", names=["TOKEN"], now=False)["live_sessions"]
    done = tooled.call("env.remove", agent="caller", names=["TOKEN"], now=True)
    assert done["cancelled_calls"] == 1
    assert done["live_sessions"] == []
    running.communicate(timeout=30)


def test_a_pasted_value_in_place_of_a_name_is_not_recorded(tooled: RealDaemon) -> None:
    for method, more in (
        ("env.remove", {"names": ["sk-live-PASTED"]}),
        ("env.set", {"values": {"sk-live-PASTED": ""}}),
    ):
        with pytest.raises(Invalid):
            tooled.call(method, agent="caller", now=False, **more)
    assert "PASTED" not in json.dumps(tooled.audit())


def test_an_agent_cannot_fill_the_disk_with_refusals(tooled: RealDaemon) -> None:
    asked = [("n" * 500_000, {})] * 3 + [("nothing", {})] * 150
    path = tooled.base / "asked.json"
    path.write_text(json.dumps(asked))
    before = sum(f.stat().st_size for f in tooled.paths.audit.iterdir())
    agent = tooled.paths.config / "agents/caller.yaml"
    text = agent.read_text().replace("json.loads(sys.argv[1])", "json.load(open('/asked'))")
    agent.write_text(text + f"mounts: [{{source: {path}, target: /asked}}]\n")
    tooled.call("reload")
    done = tooled.run("caller", "x")
    assert done.returncode == 0, done.stderr
    assert "denied 120 calls within a minute" in done.stdout
    grown = sum(f.stat().st_size for f in tooled.paths.audit.iterdir()) - before
    assert grown < 150_000
    assert len([r for r in tooled.audit() if r.get("decision") == "deny"]) == 120
