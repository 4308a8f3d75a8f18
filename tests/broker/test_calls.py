"""The life of a tool call, with a real launcher, vault and audit log."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from broker_parts import AGENT, ORDINARY_UID, Broker

from sandboxd.broker.calls import Bounds
from sandboxd.broker.result import CallResult
from sandboxd.errors import KernelError, StoreError
from sandboxd.secret import Secret
from sandboxd.vault.vault import Sealed

TOKEN = "hunter2-is-the-value"


def secret(variable: str = "TOKEN", delivery: str = "env", **more: Any) -> list[dict[str, Any]]:
    return [{"variable": variable, "delivery": delivery, **more}]


async def running(broker: Broker, count: int = 1) -> None:
    """Wait until so many tools have been launched."""
    with trio.fail_after(20):
        while len(broker.records("call.launched")) < count:  # noqa: ASYNC110 - a log has no event
            await trio.sleep(0.005)


def alive(marker: str) -> list[int]:
    """Host pids of processes that carry ``marker`` in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# --- what a tool gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["root", "user"] if os.geteuid() == 0 else ["user"])
async def test_a_tool_uses_a_secret_that_its_output_does_not_show(
    mode: str, open_broker: Callable[..., Any]
) -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    async with open_broker(mode) as broker:
        broker.set(TOKEN=TOKEN)
        result = await broker.run(
            'printf %s "$TOKEN" | sha256sum; echo "it is $TOKEN"', secrets=secret()
        )
    assert result.outcome == "ok", result
    assert result.stdout.decode() == f"{digest}  -\nit is [redacted:TOKEN]\n"
    assert result.exit_code == 0


async def test_the_environment_of_a_tool_is_what_the_manifest_says_and_nothing_else(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAK", "from-the-daemon")
    broker.set(TOKEN=TOKEN, OTHER="not-declared-by-the-tool")
    result = await broker.run(
        "exec /usr/bin/env -u PWD", secrets=secret(**{"as": "API_KEY"}), environment={"REGION": "x"}
    )
    assert sorted(result.stdout.decode().splitlines()) == [
        "API_KEY=[redacted:TOKEN]",
        "HOME=/home/tool",
        "LANG=C.UTF-8",
        "PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "REGION=x",
        "TMPDIR=/tmp",
    ]


async def test_a_secret_delivered_as_a_file_is_private_and_whole(broker: Broker) -> None:
    value = bytes(range(1, 256)) * 3
    broker.set(KEY=value)
    result = await broker.run(
        "stat -c '%a %s' /run/secrets/key.pem; sha256sum < /run/secrets/key.pem; env | grep -c KEY",
        secrets=secret("KEY", "file", **{"as": "key.pem"}),
    )
    digest = hashlib.sha256(value).hexdigest()
    assert result.stdout.decode() == f"400 {len(value)}\n{digest}  -\n0\n"


async def test_a_secret_delivered_on_stdin_is_all_of_it(broker: Broker) -> None:
    broker.set(KEY=b"line one\nline two")
    result = await broker.run("sha256sum", secrets=secret("KEY", "stdin"))
    assert result.stdout.decode().split()[0] == hashlib.sha256(b"line one\nline two").hexdigest()


async def test_a_variable_that_is_a_plain_setting_is_shown_and_its_neighbour_is_not(
    broker: Broker,
) -> None:
    broker.set(MODE="read-write", TOKEN="s3cret-value")
    secrets = [*secret("MODE", redact=False), *secret()]
    result = await broker.run('echo "$MODE $TOKEN"', secrets=secrets)
    assert result.stdout == b"read-write [redacted:TOKEN]\n"


async def test_secrets_delivered_on_descriptors_are_named_by_the_environment(
    broker: Broker,
) -> None:
    broker.set(ONE="first-value", TWO="second-value")
    result = await broker.run(
        'echo $ONE_FD $TWO_FD; sha256sum <&"$ONE_FD"; sha256sum <&"$TWO_FD"',
        secrets=[
            *secret("ONE", "fd", **{"as": "ONE_FD"}),
            *secret("TWO", "fd", **{"as": "TWO_FD"}),
        ],
    )
    lines = result.stdout.decode().splitlines()
    assert lines[0] == "3 4", result
    assert lines[1].startswith(hashlib.sha256(b"first-value").hexdigest())
    assert lines[2].startswith(hashlib.sha256(b"second-value").hexdigest())


async def test_stdin_is_at_its_end_unless_the_manifest_fills_it(broker: Broker) -> None:
    assert (await broker.run("cat; echo end")).stdout == b"end\n"


async def test_arguments_arrive_as_json_on_stdin(broker: Broker) -> None:
    broker.tool("reader", "cat", argv=["-c", "cat"], stdin="json")
    result = await broker.call("reader", {"word": "größe"})
    assert result.stdout.decode() == '{"word":"größe"}\n'


async def test_standard_streams_can_be_opened_by_path(broker: Broker) -> None:
    result = await broker.run("cat /dev/stdin > /dev/stdout; echo oops > /dev/stderr", stdin="json")
    assert (result.stdout, result.stderr) == (b"{}\n", b"oops\n")


async def test_a_tool_without_a_workspace_sees_none(broker: Broker) -> None:
    broker.make_workspace()
    result = await broker.run("pwd; ls -d /workspace")
    assert result.stdout == b"/tmp\n"
    assert result.exit_code != 0


@pytest.mark.parametrize(("access", "wrote"), [("rw", True), ("ro", False)])
async def test_a_workspace_is_mounted_as_declared(broker: Broker, access: str, wrote: bool) -> None:
    workspace = broker.make_workspace()
    (workspace / "given").write_text("hello\n")
    result = await broker.run("pwd; cat given; echo made > new", workspace=access)
    assert result.stdout == b"/workspace\nhello\n"
    assert (workspace / "new").exists() is wrote
    assert (result.exit_code == 0) is wrote


async def test_a_python_tool_runs_with_the_daemon_s_interpreter(broker: Broker) -> None:
    broker.tool(
        "py",
        program="program.py",
        runtime="python",
        argv=["{word}"],
        beside={
            "program.py": "import sys, trio\nprint(sys.argv[1:], sys.flags.isolated, sys.path)\n"
        },
    )
    result = await broker.call("py", {"word": "a b"})
    assert result.stdout.startswith(b"['a b'] 1 "), result
    assert b"/tmp'" not in result.stdout


# --- how a call ends ----------------------------------------------------------------------------


async def test_a_status_other_than_zero_is_a_failure_with_its_output(broker: Broker) -> None:
    result = await broker.run("echo out; echo err >&2; exit 3")
    assert (result.outcome, result.exit_code, result.signal) == ("failed", 3, None)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.message == "t0 ended with status 3"


async def test_a_deadly_signal_is_named(broker: Broker) -> None:
    result = await broker.run("kill -SEGV $$")
    assert (result.outcome, result.signal) == ("failed", signal.SIGSEGV)
    assert "SIGSEGV" in result.message


async def test_a_timeout_ends_the_tool_and_keeps_what_it_printed(broker: Broker) -> None:
    result = await broker.run("echo begun; sleep 88001", timeout="1s")
    assert result.outcome == "timeout"
    assert result.stdout == b"begun\n"
    assert "1 s" in result.message
    assert alive("88001") == []


async def test_a_background_process_can_not_hold_the_call(broker: Broker) -> None:
    with trio.fail_after(15):
        result = await broker.run("(trap '' TERM HUP; setsid sleep 88002) & echo done")
    assert (result.outcome, result.stdout) == ("ok", b"done\n")
    assert alive("88002") == []


async def test_a_descriptor_that_escaped_can_not_hold_the_call(broker: Broker) -> None:
    workspace = broker.make_workspace()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(workspace / "s"))
        if os.geteuid() == 0:
            os.chown(workspace / "s", ORDINARY_UID, ORDINARY_UID)
        listener.listen()
        listener.settimeout(5)
        broker.tool(
            "escape",
            program="program.py",
            runtime="python",
            argv=[],
            workspace="rw",
            beside={
                "program.py": "import socket\n"
                "s = socket.socket(socket.AF_UNIX)\n"
                "s.connect('s')\n"
                "socket.send_fds(s, [b'x'], [1])\n"
                "print('passed on', flush=True)\n"
            },
        )
        with trio.fail_after(15):
            result = await broker.call("escape")
        assert (result.outcome, result.stdout) == ("ok", b"passed on\n"), result.stderr
        taken, _ = listener.accept()
        with taken:
            _, fds, _, _ = socket.recv_fds(taken, 1, 4)
    with pytest.raises(BrokenPipeError):
        os.write(fds[0], b"nobody reads this")
    os.close(fds[0])


async def test_a_launcher_that_dies_fails_the_call_and_every_later_one(broker: Broker) -> None:
    broker.tool("long", "sleep 88012")
    results: list[CallResult] = []

    async def call() -> None:
        results.append(await broker.call("long"))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await running(broker)
            broker.launcher._sock.shutdown(socket.SHUT_RDWR)
        await call()
    assert [result.outcome for result in results] == ["failed", "failed"]
    assert all("the launcher is gone" in result.message for result in results)
    assert broker.calls.running() == 0


async def test_output_over_the_bound_is_cut_and_the_tool_may_finish(broker: Broker) -> None:
    result = await broker.run(
        "head -c 300000 /dev/zero | tr '\\0' x; echo finished >&2; exit 0", output_limit=1000
    )
    assert result.outcome == "ok"
    assert result.truncated
    assert len(result.stdout) + len(result.stderr) == 1000
    assert "1,000 bytes" in result.message
    assert broker.records("call.ended")[-1]["output_bytes"] == 300_009


async def test_cut_output_ends_at_a_character(broker: Broker) -> None:
    result = await broker.run("printf 'aäöü€€€€'", output_limit=12)
    assert result.stdout.decode() == "aäöü€"


async def test_output_over_the_bound_can_end_the_tool(broker: Broker) -> None:
    with trio.fail_after(20):
        result = await broker.run("yes 88003", output_limit=1000, on_overflow="kill")
    assert result.outcome == "overflow"
    assert len(result.stdout) == 1000
    assert alive("88003") == []


async def test_endless_output_ends_the_tool_also_when_it_is_only_cut(broker: Broker) -> None:
    with trio.fail_after(20):
        result = await broker.run("yes 88004", output_limit=1000)
    assert result.outcome == "overflow"


async def test_a_cut_can_not_uncover_half_a_secret(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    result = await broker.run('printf "%s" "0123456789$TOKEN"', secrets=secret(), output_limit=14)
    assert result.stdout == b"0123456789[red"


async def test_bytes_that_are_no_text_come_back_whole(broker: Broker) -> None:
    result = await broker.run("printf '\\377\\376\\000\\001'")
    assert result.stdout == b"\xff\xfe\x00\x01"


async def test_progress_shows_redacted_output_while_the_tool_runs(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    seen: list[tuple[float, str]] = []
    go = trio.Event()

    async def progress(received: float, text: str) -> None:
        seen.append((received, text))
        if "last" in text:
            go.set()

    broker.tool("talk", 'echo "first $TOKEN"; sleep 0.3; echo last; sleep 88005', secrets=secret())
    async with trio.open_nursery() as nursery:
        with trio.fail_after(20):

            async def call() -> None:
                await broker.call("talk", progress=progress)

            nursery.start_soon(call)
            await go.wait()
            nursery.cancel_scope.cancel()
    text = "".join(text for _, text in seen)
    assert text == "first [redacted:TOKEN]\nlast\n"
    assert [received for received, _ in seen] == sorted(received for received, _ in seen)


async def test_a_watcher_that_takes_nothing_does_not_hold_the_tool(broker: Broker) -> None:
    async def stuck(received: float, text: str) -> None:
        await trio.sleep_forever()

    broker.tool("talk", "for i in 1 2 3; do head -c 100000 /dev/zero; sleep 0.05; done")
    with trio.fail_after(20):
        result = await broker.call("talk", progress=stuck)
    assert (result.outcome, len(result.stdout)) == ("ok", 300_000)


# --- what is refused ----------------------------------------------------------------------------


async def test_a_tool_outside_the_agent_s_list_is_denied_and_recorded(broker: Broker) -> None:
    broker.tool("mine", "echo hi")
    result = await broker.call("other")
    assert (result.outcome, result.stdout) == ("denied", b"")
    (record,) = broker.records()
    assert (record["event"], record["decision"], record["injected"]) == ("call.decided", "deny", [])


async def test_arguments_against_the_schema_are_denied(broker: Broker) -> None:
    broker.tool("mine", "echo hi")
    result = await broker.call("mine", {"word": 5})
    assert result.outcome == "denied"
    assert "word" in result.message
    assert broker.records("call.launched") == []


async def test_a_missing_variable_is_named_with_the_way_to_set_it(broker: Broker) -> None:
    result = await broker.run("echo ran", secrets=secret())
    assert result.outcome == "denied"
    assert result.message == f"{AGENT} has no variable TOKEN"
    assert f"sandboxctl env set {AGENT} TOKEN" in result.hint
    assert [r["decision"] for r in broker.records()] == ["deny"]


async def test_an_optional_variable_may_be_missing(broker: Broker) -> None:
    result = await broker.run('echo "<$TOKEN>"', secrets=secret(required=False))
    assert result.stdout == b"<>\n"


async def test_a_session_keeps_the_version_that_it_started_with(broker: Broker) -> None:
    broker.set(TOKEN="the-old-value")
    broker.tool("show", 'printf %s "$TOKEN" | sha256sum', secrets=secret())
    session = broker.session()
    broker.set(TOKEN="the-new-value")
    old = await broker.call("show", session=session)
    new = await broker.call("show")
    assert old.stdout.split()[0].decode() == hashlib.sha256(b"the-old-value").hexdigest()
    assert new.stdout.split()[0].decode() == hashlib.sha256(b"the-new-value").hexdigest()
    versions = [r["injected"][0]["version"] for r in broker.records("call.decided")]
    assert versions == [1, 2]


async def test_a_revoked_version_is_denied(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("show", "echo ran", secrets=secret())
    session = broker.session()
    broker.vault.of("default").revoke(AGENT, "TOKEN", up_to=1)
    result = await broker.call("show", session=session)
    assert (result.outcome, result.stdout) == ("denied", b"")
    assert "revoked" in result.message
    decided = broker.records("call.decided")[-1]
    assert (decided["decision"], decided["injected"]) == ("deny", [])
    assert broker.records("call.launched") == []


async def test_revoking_ends_the_calls_that_hold_the_version(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN, OTHER="another-value")
    broker.tool("holds", "sleep 88006", secrets=secret())
    broker.tool("free", "sleep 88007", secrets=secret("OTHER"))
    results: dict[str, CallResult] = {}

    async def call(name: str) -> None:
        results[name] = await broker.call(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, "holds")
        nursery.start_soon(call, "free")
        await running(broker, 2)
        broker.vault.of("default").revoke(AGENT, "TOKEN", up_to=1)
        assert await broker.calls.cancel_using("default", AGENT, "TOKEN", 1) == 1
        assert alive("88006") == []
        assert alive("88007") != []
        assert await broker.calls.cancel_using("default", "another", "OTHER", 1) == 0
        nursery.cancel_scope.cancel()
    assert results["holds"].outcome == "cancelled"
    assert "TOKEN was revoked" in results["holds"].message
    assert alive("88007") == []


async def test_a_program_that_can_not_start_says_which_call_failed(broker: Broker) -> None:
    broker.tool("broken", program="program.sh", argv=[], beside={"program.sh": "not a program\n"})
    result = await broker.call("broken")
    assert result.outcome == "failed"
    assert "execve" in result.message
    assert broker.records("call.ended")[-1]["outcome"] == "failed"
    assert broker.calls.running() == 0


async def test_an_environment_too_large_for_the_kernel_is_told_before_launch(
    broker: Broker,
) -> None:
    names = [f"BIG{i}" for i in range(18)]
    broker.set(**{name: "x" * 125_000 + name for name in names})
    result = await broker.run("echo ran", secrets=[s for n in names for s in secret(n)])
    assert result.outcome == "failed"
    assert "too large for the kernel" in result.message
    assert "delivery: file" in result.hint
    assert broker.records("call.launched") == []


async def test_nothing_runs_when_the_audit_log_can_not_be_written(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = broker.make_workspace() / "ran"
    broker.tool("mark", "touch ran", workspace="rw")
    assert (await broker.call("mark")).outcome == "ok"
    marker.unlink()

    def full(event: str, **fields: Any) -> int:
        raise StoreError("no space left on the device")

    monkeypatch.setattr(broker.audit, "start", full)
    result = await broker.call("mark")
    assert result.outcome == "failed"
    assert "audit" in result.message
    assert not marker.exists()


@pytest.mark.parametrize("late", [False, True])
async def test_a_tool_whose_launch_can_not_be_recorded_is_killed(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    settle = broker.audit.settle

    def full(event: str, **fields: Any) -> int:
        raise StoreError("no space left on the device")

    async def full_late(seq: int) -> None:
        if any(b'"call.launched"' in line for _, line in broker.audit._waiting):
            raise StoreError("no space left on the device")
        await settle(seq)

    if late:
        monkeypatch.setattr(broker.audit, "settle", full_late)
    else:
        monkeypatch.setattr(broker.audit, "note", full)
    with trio.fail_after(20):
        result = await broker.run("sleep 88008")
    assert result.outcome == "failed"
    assert alive("88008") == []


async def test_the_record_of_a_launch_is_on_disk_while_its_tool_runs(broker: Broker) -> None:
    broker.tool("long", "sleep 88010")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.call, "long")
        await running(broker)
        (launched,) = broker.records("call.launched")
        with trio.fail_after(20):
            while broker.audit.last < launched["seq"]:  # noqa: ASYNC110 - a log has no event
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


async def test_no_program_starts_before_the_decision_is_on_disk(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = broker.make_workspace() / "ran"
    broker.set(TOKEN=TOKEN)
    broker.tool("mark", "touch ran", workspace="rw", secrets=secret())
    real, go_on, begun = os.fdatasync, threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        begun.set()
        assert go_on.wait(20)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    opened, unseal = [], broker.vault.unseal

    def noted(sealed: Sealed) -> Secret:
        opened.append(sealed.name)
        return unseal(sealed)

    monkeypatch.setattr(broker.vault, "unseal", noted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.call, "mark")
        await trio.to_thread.run_sync(begun.wait, 20)
        await trio.testing.wait_all_tasks_blocked()
        assert not marker.exists()
        assert (opened, broker.records("call.launched")) == ([], [])
        go_on.set()
    assert marker.exists()
    assert opened == ["TOKEN"]
    assert broker.records("call.ended")[-1]["outcome"] == "ok"


# --- being cancelled ----------------------------------------------------------------------------


async def test_a_cancelled_call_is_dead_and_recorded_when_it_returns(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("long", "sleep 88009 & sleep 88009", secrets=secret())
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            await broker.call("long")

        nursery.start_soon(call)
        await running(broker)
        nursery.cancel_scope.cancel()
    assert alive("88009") == []
    (ended,) = broker.records("call.ended")
    assert ended["outcome"] == "cancelled"
    assert broker.audit.verify().ok
    assert broker.calls.running() == 0


async def test_ending_a_session_ends_its_calls_only(broker: Broker) -> None:
    broker.tool("long", "sleep 88010")
    one, two = broker.session("s-00000000000000aa"), broker.session("s-00000000000000bb")
    async with trio.open_nursery() as nursery:

        async def call(session: Any) -> None:
            await broker.call("long", session=session)

        nursery.start_soon(call, one)
        nursery.start_soon(call, two)
        await running(broker, 2)
        assert broker.calls.running(one.id) == 1
        assert await broker.calls.cancel_session(one.id) == 1
        assert (broker.calls.running(one.id), broker.calls.running()) == (0, 1)
        nursery.cancel_scope.cancel()


async def test_a_session_over_its_share_is_told_to_wait(open_broker: Callable[..., Any]) -> None:
    bounds = Bounds(total=4, per_session=1, queue=1, patience=60)
    async with open_broker("root", bounds) as broker:
        broker.tool("long", "sleep 88011")
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                await broker.call("long")

            nursery.start_soon(call)
            await running(broker)
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked(0.02)
            result = await broker.call("long")
            nursery.cancel_scope.cancel()
    assert result.outcome == "busy"
    assert "1 waiting" in result.message
    assert result.hint


# --- what is written down -----------------------------------------------------------------------


async def test_a_call_leaves_three_records_that_hold_no_value(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("use", 'echo "$TOKEN $TOKEN"; exit 4', secrets=secret())
    result = await broker.call("use", {"word": "private-argument"})
    decided, launched, ended = broker.records()
    assert [r["event"] for r in (decided, launched, ended)] == [
        "call.decided",
        "call.launched",
        "call.ended",
    ]
    assert {r["call"] for r in (decided, launched, ended)} == {result.call}
    assert decided["injected"] == [{"name": "TOKEN", "version": 1, "delivery": "env"}]
    assert (ended["outcome"], ended["exit_code"], ended["redactions"]) == ("failed", 4, 2)
    assert ended["max_rss_kib"] > 0
    log = b"".join(p.read_bytes() for p in (broker.root / "audit").iterdir())
    assert TOKEN.encode() not in log
    assert b"private-argument" not in log


async def test_the_last_use_of_a_variable_is_remembered(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN, UNUSED="another-value")
    await broker.run("true", secrets=secret())
    used = {v.name: v.last_used_at for v in broker.vault.of("default").list(AGENT)}
    assert used["TOKEN"] is not None
    assert used["UNUSED"] is None


async def test_an_internal_error_is_logged_without_its_text(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker.set(TOKEN=TOKEN)

    async def fails(spec: Any, **fds: Any) -> None:
        raise ValueError(dict(spec.env)[b"TOKEN"])

    monkeypatch.setattr(broker.launcher, "launch", fails)
    with caplog.at_level(logging.DEBUG):
        result = await broker.run("true", secrets=secret())
    assert result.outcome == "failed"
    assert "internal error" in result.message
    assert "ValueError at test_calls.py" in caplog.text
    for text in (caplog.text, repr(result), str(broker.records())):
        assert TOKEN not in text


async def test_an_error_of_the_kernel_names_no_value(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker.set(TOKEN=TOKEN)

    async def fails(spec: Any, **fds: Any) -> None:
        raise KernelError("execve", 7, "/bin/sh", hint="too large")

    monkeypatch.setattr(broker.launcher, "launch", fails)
    result = await broker.run("true", secrets=secret())
    assert result.message == "t0 could not run: execve: E2BIG (Argument list too long)"
    assert "execve /bin/sh: E2BIG" in caplog.text  # the host's path is for the operator alone
    assert TOKEN not in caplog.text + repr(result) + str(broker.records())


async def test_no_descriptor_stays_open(broker: Broker) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("ok", "true", secrets=secret("TOKEN", "fd"), stdin="json")
    broker.tool("bad", program="program.sh", argv=[], beside={"program.sh": "not a program\n"})
    await broker.call("ok")
    await broker.calls.end_session(broker.session().id)  # what is kept ready has a socket each
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await broker.call("ok")
        await broker.call("bad")
        with trio.move_on_after(0.001):
            await broker.call("ok")
    await broker.calls.end_session(broker.session().id)
    assert sorted(os.listdir("/proc/self/fd")) == before
