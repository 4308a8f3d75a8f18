"""MCP servers through everything: sandboxctl, the daemon, an agent in its sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from real_daemon import RealDaemon, until
from test_daemon_calls import AGENT as CALLER
from test_daemon_calls import SECRET

SERVER = Path(__file__).parents[1] / "mcpservers/stdio_server.py"

#: With a second argument it stays once it has called.
AGENT = f"""{CALLER}
if len(sys.argv) > 2:
    import time
    time.sleep(3600)
"""


@pytest.fixture
def served(configured: RealDaemon) -> RealDaemon:
    """An agent ``caller`` with the server ``kit``, which nobody has accepted yet."""
    configured.python_agent("caller", AGENT, tools="[kit]")
    write_server(configured)
    configured.start()
    configured.set("caller", TOKEN=SECRET)
    return configured


def write_server(daemon: RealDaemon, more: str = "") -> None:
    daemon.write(
        "tools/kit/tool.yaml",
        "version: 1\nkind: mcp\nname: kit\ndescription: a kit\nprogram: server.py\n"
        "runtime: python\nlifetime: session\nsecrets: [TOKEN]\n" + more,
    )
    shutil.copy(SERVER, daemon.paths.config / "tools/kit/server.py")


def test_a_server_is_accepted_called_shown_and_taken_back(served: RealDaemon) -> None:
    assert "never accepted" in "".join(served.call("status")["warnings"])
    refused = served.ctl("tools", "accept", "kit")
    assert refused.returncode == 2, refused.stderr
    assert "+ kit__echo\n    says a word again\n" in refused.stdout
    assert "there is no terminal to ask on" in refused.stderr
    digest = refused.stdout.split("digest ")[1].split()[0]
    wrong = served.ctl("tools", "accept", "kit", "--digest", "sha256:" + "0" * 64)
    assert wrong.returncode == 5, wrong.stderr
    assert served.call("tools.pins")["servers"][0]["state"] == "not accepted"
    done = served.ctl("tools", "accept", "kit", "--digest", digest)
    assert done.returncode == 0, done.stderr
    assert "accepted 17 tools of kit" in done.stdout
    assert served.call("tools.pins")["servers"][0]["state"] == "accepted"

    calls = [["kit__add", {"a": 1, "b": 2}], ["kit__tell", {}], ["kit__echo", {"word": 7}]]
    ran = served.run("caller", json.dumps(calls))
    assert ran.returncode == 0, ran.stderr
    listed, added, told, bad = (json.loads(line)["result"] for line in ran.stdout.splitlines())
    by_name = {tool["name"]: tool for tool in listed["tools"]}
    assert by_name["kit__echo"]["annotations"]["readOnlyHint"] is True
    assert by_name["kit__add"]["outputSchema"]["properties"] == {"sum": {"type": "integer"}}
    assert added["structuredContent"] == {"sum": 3}
    assert SECRET not in ran.stdout
    assert told["content"][0]["text"] == "it is [redacted:TOKEN]"
    assert bad["isError"] is True

    forgotten = served.ctl("tools", "forget", "kit")
    assert forgotten.returncode == 0, forgotten.stderr
    ran = served.run("caller", "[]")
    assert json.loads(ran.stdout)["result"]["tools"] == []
    events = [record["event"] for record in served.audit()]
    assert events.count("tools.inspected") == 3
    assert events.count("tools.accepted") == events.count("tools.forgotten") == 1
    assert served.call("audit.verify")["ok"] is True
    assert SECRET not in str(served.audit()) + served.log.read_text()


def test_a_manifest_that_names_the_definitions_needs_no_operator(served: RealDaemon) -> None:
    digest = json.loads(served.ctl("tools", "accept", "kit", "--json").stdout)["digest"]
    write_server(served, f"definitions: sha256:{'0' * 64}\n")
    served.call("reload")
    ran = served.run("caller", "[]")
    assert json.loads(ran.stdout)["result"]["tools"] == []
    assert f"the server offers {digest}, which is not what" in served.log.read_text()
    write_server(served, f"definitions: {digest}\n")
    served.call("reload")
    ran = served.run("caller", '[["kit__echo", {"word": "x"}]]')
    assert json.loads(ran.stdout.splitlines()[1])["result"]["content"][0]["text"] == "x"
    (accepted,) = [r for r in served.audit() if r["event"] == "tools.accepted"]
    assert (accepted["by"], accepted["digest"]) == ("tools/kit/tool.yaml definitions", digest)


def test_a_live_server_is_shown_and_ends_with_its_secret(served: RealDaemon) -> None:
    assert served.ctl("tools", "accept", "kit", "--yes").returncode == 0
    calls = json.dumps([["kit__count", {}], ["kit__count", {}]])
    id = served.call("session.start", agent="caller", args=[calls, "stay"])["id"]
    until(lambda: [s["calls"] for s in served.call("session.show", id=id)["servers"]] == [2])
    (server,) = served.call("session.show", id=id)["servers"]
    assert server["server"] == "kit"
    assert server["variables"] == {"TOKEN": 1}
    assert "servers" in served.ctl("session", "show", id).stdout
    assert Path(f"/proc/{server['pid']}").exists()
    assert served.ctl("env", "remove", "--now", "caller", "TOKEN").returncode == 0
    assert not Path(f"/proc/{server['pid']}").exists()
    assert served.call("session.show", id=id)["servers"] == []
    ended = [r for r in served.audit() if r["event"] == "server.ended"]
    assert ended[-1]["reason"] == "the variable TOKEN was revoked"


def test_accepted_tools_survive_a_restart_and_a_changed_server_does_not(
    served: RealDaemon,
) -> None:
    assert served.ctl("tools", "accept", "kit", "--yes").returncode == 0
    assert served.stop() == 0
    write_server(served, "environment: {MODE: changed}\n")
    served.start()
    ran = served.run("caller", '[["kit__echo", {"word": "x"}], ["kit__count", {}]]')
    _, echoed, counted = (json.loads(line)["result"] for line in ran.stdout.splitlines())
    assert echoed["isError"] is True
    assert "kit__echo changed since it was accepted" in echoed["content"][0]["text"]
    assert counted["isError"] is False
    assert served.call("tools.pins")["servers"][0]["state"] == "changed"
    shown = served.ctl("tools", "pins")
    assert "kit: echo changed" in shown.stderr
    seen = served.ctl("tools", "accept", "kit", "--yes").stdout
    assert "! kit__echo  (description)\n" in seen
    assert "    it was:\n    says a word again\n" in seen
    ran = served.run("caller", '[["kit__echo", {"word": "x"}]]')
    assert json.loads(ran.stdout.splitlines()[1])["result"]["content"][0]["text"] == "x"


def test_accepted_tools_that_were_tampered_with_keep_the_daemon_from_starting(
    served: RealDaemon,
) -> None:
    assert served.ctl("tools", "accept", "kit", "--yes").returncode == 0
    assert served.stop() == 0
    path = served.paths.pins
    path.write_bytes(path.read_bytes().replace(b"says a word", b"said a word"))
    failed = served.fail_to_start()
    assert failed.returncode == 7
    assert "can't be trusted" in failed.stderr
    assert "sandboxctl tools accept NAME" in failed.stderr
