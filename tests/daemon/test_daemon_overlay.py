"""Copy-on-write workspaces of a real daemon: what an agent changes is reviewed before it lands."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from real_daemon import RealDaemon, until

from sandboxd.errors import Conflict, Invalid, NotFound

WORK = """
echo changed > /workspace/kept
echo new > /workspace/new
mkdir /workspace/made && printf 'a\\000b' > /workspace/made/binary
rm /workspace/gone
rm -r /workspace/old && mkdir /workspace/old && echo y > /workspace/old/y
ln -s /etc/passwd /workspace/link
chmod 755 /workspace/script
"""


def owned(daemon: RealDaemon, path: Path) -> None:
    """Give what a test made to the daemon's user, as if that user had made it."""
    owner = daemon.paths.state.stat()
    for made in (path, *path.rglob("*")):
        os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=False)


def workspace(daemon: RealDaemon, agent: str, **files: str) -> Path:
    """The default workspace of ``agent`` with these files; the daemon runs already."""
    path = daemon.paths.workspaces / agent
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    owned(daemon, path.parent)
    return path


def session_of(daemon: RealDaemon, agent: str) -> str:
    """Run ``agent`` to its end; the session's id."""
    done = daemon.run(agent)
    assert done.returncode == 0, done.stderr
    sessions = daemon.call("session.list", all=True)["sessions"]
    return str(next(row["id"] for row in reversed(sessions) if row["agent"] == agent))


def changes(daemon: RealDaemon, session: str, *paths: str) -> dict[str, dict[str, Any]]:
    got = daemon.call("session.diff", id=session, paths=list(paths))
    return {f"{c['change']} {c['path']}": c for c in got["changes"]}


def tree(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_text()
        for p in path.rglob("*")
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture(params=["disk", "memory"])
def worked(request: pytest.FixtureRequest, configured: RealDaemon) -> tuple[RealDaemon, str, Path]:
    """A daemon, an ended session that changed a lot, and the workspace it changed nothing in."""
    quota = ", quota: 4M" if request.param == "memory" else ""
    configured.agent("worker", WORK, workspace=f"{{mode: overlay{quota}}}")
    configured.start()
    path = workspace(
        configured,
        "worker",
        **{"kept": "before\n", "gone": "x\n", "old/x": "x\n", "script": "#!/bin/sh\n", "same": "s"},
    )
    return configured, session_of(configured, "worker"), path


def test_nothing_lands_by_itself(worked: tuple[RealDaemon, str, Path]) -> None:
    daemon, session, path = worked
    assert tree(path) == {
        "kept": "before\n",
        "gone": "x\n",
        "old/x": "x\n",
        "script": "#!/bin/sh\n",
        "same": "s",
    }
    assert daemon.call("session.show", id=session)["changes"] == "kept"


def test_a_diff_tells_what_changed_and_how(worked: tuple[RealDaemon, str, Path]) -> None:
    daemon, session, _ = worked
    told = changes(daemon, session)
    assert list(told) == [
        "deleted gone",
        "changed kept",
        "added link",
        "added made",
        "added made/binary",
        "added new",
        "added old/y",
        "deleted old/x",
        "changed script",
    ]
    assert told["changed kept"]["text"].splitlines()[-2:] == ["-before", "+changed"]
    assert told["deleted gone"]["text"].splitlines()[-1] == "-x"
    assert told["added made/binary"]["binary"] is True
    assert told["added link"]["target"] == "/etc/passwd"
    assert "leads out" in told["added link"]["note"]
    assert (told["changed script"]["mode"], told["changed script"]["old_mode"]) == (0o755, 0o644)
    assert not [c for c in told.values() if "conflict" in c or "problem" in c]
    assert list(changes(daemon, session, "old")) == ["added old/y", "deleted old/x"]
    with pytest.raises(Invalid, match="nothing changed at nowhere"):
        changes(daemon, session, "nowhere")


def test_named_paths_land_first_and_the_rest_later(worked: tuple[RealDaemon, str, Path]) -> None:
    daemon, session, path = worked
    done = daemon.call("session.apply", id=session, paths=["made", "kept"])
    assert (done["added"], done["changed"], done["deleted"], done["failed"]) == (2, 1, 0, [])
    assert (path / "made/binary").read_bytes() == b"a\0b"
    assert (path / "gone").exists()
    assert "changed kept" not in changes(daemon, session)
    done = daemon.call("session.apply", id=session)
    assert (done["remaining"], done["failed"]) == (0, [])
    assert tree(path) == {
        "kept": "changed\n",
        "new": "new\n",
        "made/binary": "a\0b",
        "old/y": "y\n",
        "link": "/etc/passwd",
        "script": "#!/bin/sh\n",
        "same": "s",
    }
    owner = path.stat().st_uid
    assert {p.lstat().st_uid for p in path.rglob("*")} == {owner}
    assert (path / "script").stat().st_mode & 0o7777 == 0o755
    assert not (daemon.paths.logs / session / "overlay").exists()
    with pytest.raises(NotFound, match="were applied"):
        changes(daemon, session)
    applied = [r for r in daemon.audit() if r["event"] == "session.applied"]
    assert [(r["added"], r["changed"], r["deleted"]) for r in applied] == [(2, 1, 0), (3, 1, 2)]
    assert applied[0]["paths"] == ["'kept'", "'made'", "'made/binary'"]
    assert len([r for r in daemon.audit() if r["event"] == "session.applying"]) == 2


def test_discarded_changes_are_gone(worked: tuple[RealDaemon, str, Path]) -> None:
    daemon, session, path = worked
    before = tree(path)
    assert daemon.ctl("session", "discard", session).stdout == f"{session} discarded\n"
    assert tree(path) == before
    assert not (daemon.paths.logs / session / "overlay").exists()
    refused = daemon.ctl("session", "apply", session)
    assert refused.returncode == 3
    assert "were discarded" in refused.stderr
    assert daemon.audit()[-1]["event"] == "session.discarded"


def test_what_the_workspace_changed_meanwhile_is_a_conflict(
    worked: tuple[RealDaemon, str, Path],
) -> None:
    daemon, session, path = worked
    (path / "kept").write_text("somebody else's\n")
    (path / "new").write_text("also new\n")
    os.chown(path / "new", path.stat().st_uid, path.stat().st_gid)
    before = tree(path)
    told = changes(daemon, session)
    assert {key for key, c in told.items() if "conflict" in c} == {"changed kept", "changed new"}
    with pytest.raises(Conflict, match="2 of the changes"):
        daemon.call("session.apply", id=session)
    assert tree(path) == before
    refused = daemon.audit()[-1]
    assert refused["event"] == "session.apply_refused"
    assert "'kept'" in refused["reason"]
    daemon.call("session.apply", id=session, paths=["gone"])  # the others can land
    assert not (path / "gone").exists()
    done = daemon.ctl("session", "apply", "--force", session)
    assert done.returncode == 0, done.stderr
    assert tree(path)["kept"] == "changed\n"


def test_the_command_shows_what_changed(worked: tuple[RealDaemon, str, Path]) -> None:
    daemon, session, _ = worked
    shown = daemon.ctl("session", "diff", session[:8])
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert "added   link  (a link to /etc/passwd; leads out of the workspace)" in lines
    assert "added   made/  (mode 0755)" in lines
    assert "changed script  (mode 0755, was 0644)" in lines
    assert "  +changed" in lines
    names = daemon.ctl("session", "diff", "--names", session, "old").stdout
    assert names.splitlines() == ["added   old/y  (mode 0644)", "deleted old/x"]
    assert json.loads(daemon.ctl("--json", "session", "diff", session).stdout)["total"] == 9


def test_a_session_that_changed_nothing_leaves_nothing(configured: RealDaemon) -> None:
    configured.agent("reader", "ls /workspace", workspace="{mode: overlay}")
    configured.start()
    session = session_of(configured, "reader")
    assert configured.call("session.show", id=session)["changes"] == "discarded"
    assert not (configured.paths.logs / session / "overlay").exists()


def test_a_live_session_can_be_looked_at_but_not_applied(configured: RealDaemon) -> None:
    for name, quota in (("disk", ""), ("memory", ", quota: 1M")):
        configured.agent(
            name,
            "echo x > /workspace/x; echo done; sleep 300",
            workspace=f"{{mode: overlay{quota}}}",
        )
    configured.start()
    for name in ("disk", "memory"):
        session = configured.call("session.start", agent=name)["id"]
        until(lambda: configured.call("session.diff", id=session)["total"] == 1)  # noqa: B023
        for method in ("session.apply", "session.discard"):
            with pytest.raises(Conflict, match="still running"):
                configured.call(method, id=session)
        configured.call("session.stop", id=session, grace=0)
        configured.call("session.apply", id=session)
        assert tree(configured.paths.workspaces / name) == {"x": "x\n"}


def test_a_workspace_is_not_changed_below_a_running_overlay(configured: RealDaemon) -> None:
    configured.agent("short", "echo x > /workspace/x", workspace="{mode: overlay}")
    shared = configured.base / "shared"
    shared.mkdir()
    for name, script in (("short", "echo x > /workspace/x"), ("long", "sleep 300")):
        configured.agent(name, script, workspace=f"{{mode: overlay, path: {shared}}}")
    configured.start()
    owned(configured, shared)
    session = session_of(configured, "short")
    other = configured.call("session.start", agent="long")["id"]
    with pytest.raises(Conflict, match=f"{other} is running on top"):
        configured.call("session.apply", id=session)
    configured.call("session.stop", id=other, grace=0)
    configured.call("session.apply", id=session)
    assert (shared / "x").read_text() == "x\n"


def test_a_quota_bounds_what_a_session_can_change(configured: RealDaemon) -> None:
    configured.agent(
        "filler",
        "head -c 3000000 /dev/zero > /workspace/big 2>&1; stat -c %s /workspace/big\n"
        "i=0; while [ $i -lt 2000 ] && (: > /workspace/$i); do i=$((i+1)); done; echo $i",
        workspace="{mode: overlay, quota: 2M}",
    )
    configured.start()
    out = configured.run("filler").stdout.split()
    assert 0 < int(out[-2]) <= 2 << 20
    assert int(out[-1]) <= 1024


def test_a_killed_daemon_keeps_what_is_on_disk_and_tells_what_it_lost(
    configured: RealDaemon,
) -> None:
    for name, quota in (("disk", ""), ("memory", ", quota: 1M")):
        configured.agent(
            name,
            "echo x > /workspace/x; echo done; sleep 300",
            workspace=f"{{mode: overlay{quota}}}",
        )
    configured.start()
    sessions = {n: configured.call("session.start", agent=n)["id"] for n in ("disk", "memory")}
    for session in sessions.values():
        until(lambda: configured.call("session.diff", id=session)["total"] == 1)  # noqa: B023
    configured.stop(signal.SIGKILL)
    configured.start()
    configured.call("session.apply", id=sessions["disk"])
    assert tree(configured.paths.workspaces / "disk") == {"x": "x\n"}
    with pytest.raises(NotFound, match="were in memory, and the daemon died"):
        configured.call("session.apply", id=sessions["memory"])


def test_a_stopped_daemon_keeps_what_was_in_memory(configured: RealDaemon) -> None:
    configured.agent(
        "worker", "echo x > /workspace/x; sleep 300", workspace="{mode: overlay, quota: 1M}"
    )
    configured.start()
    session = configured.call("session.start", agent="worker")["id"]
    until(lambda: configured.call("session.diff", id=session)["total"] == 1)
    assert configured.stop() == 0
    configured.start()
    assert list(changes(configured, session)) == ["added x"]


def test_tools_see_and_change_the_same_view(configured: RealDaemon) -> None:
    agent = """
        import json, os, socket, subprocess
        open("/workspace/by-agent", "w").write("a")
        bridge = subprocess.Popen(["sandboxd-mcp"], stdin=-1, stdout=-1)
        def ask(id, method, **params):
            line = json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
            bridge.stdin.write(line.encode() + b"\\n")
            bridge.stdin.flush()
            while (answer := json.loads(bridge.stdout.readline())).get("id") != id:
                pass
            return answer
        ask(0, "initialize", protocolVersion="2025-06-18", capabilities={},
            clientInfo={"name": "test", "version": "1"})
        for tool in ("writer", "reader"):
            answer = ask(tool, "tools/call", name=tool, arguments={})
            print(answer["result"]["content"][0]["text"].strip(), flush=True)
        print(open("/workspace/by-tool").read(), flush=True)
    """
    configured.python_agent("caller", agent, tools="[writer, reader]", workspace="{mode: overlay}")
    schema = "input: {type: object, additionalProperties: false}\n"
    configured.tool(
        "writer",
        "#!/bin/sh\ncat /workspace/by-agent; printf t > /workspace/by-tool\n",
        schema + "workspace: rw\n",
    )
    configured.tool(
        "reader",
        "#!/bin/sh\ncat /workspace/by-tool; (: > /workspace/x) || echo refused\n",
        schema + "workspace: ro\n",
    )
    configured.start()
    done = configured.run("caller")
    assert done.returncode == 0, done.stderr
    out = done.stdout.split()
    assert out[0] == "a"
    assert out[1].startswith("t")
    assert "refused" in done.stdout
    assert out[-1] == "t"
    session = configured.call("session.list", all=True)["sessions"][0]["id"]
    assert list(changes(configured, session)) == ["added by-agent", "added by-tool"]
    assert tree(configured.paths.workspaces / "caller") == {}


def test_names_of_any_bytes_are_told_landed_and_recorded(configured: RealDaemon) -> None:
    configured.agent(
        "worker", r"""touch "/workspace/$(printf 'a\377\033[31m')" """, workspace="{mode: overlay}"
    )
    configured.start()
    session = session_of(configured, "worker")
    shown = configured.ctl("session", "diff", session).stdout
    assert "\x1b" not in shown
    (change,) = configured.call("session.diff", id=session)["changes"]
    assert os.fsencode(change["path"]) == b"a\xff\x1b[31m"
    done = configured.ctl("session", "apply", session, change["path"])
    assert done.stdout == "1 added, 0 changed, 0 deleted\n", done.stderr
    landed = os.listdir(os.fsencode(configured.paths.workspaces / "worker"))
    assert landed == [b"a\xff\x1b[31m"]
    assert configured.call("audit.verify")["ok"]


def test_a_policy_can_make_every_workspace_an_overlay(configured: RealDaemon) -> None:
    configured.write(
        "policies/reviewed.yaml",
        "version: 1\ndescription: nothing lands unseen\nextends: default\nworkspace: overlay\n",
    )
    configured.agent("worker", "echo x > /workspace/x", policy="reviewed")
    configured.start()
    session = session_of(configured, "worker")
    assert tree(configured.paths.workspaces / "worker") == {}
    assert list(changes(configured, session)) == ["added x"]


def test_sessions_without_an_overlay_have_nothing_to_review(configured: RealDaemon) -> None:
    configured.agent("plain", "echo x > /workspace/x")
    configured.start()
    session = session_of(configured, "plain")
    assert configured.call("session.show", id=session)["changes"] is None
    with pytest.raises(NotFound, match="was no overlay"):
        configured.call("session.diff", id=session)
