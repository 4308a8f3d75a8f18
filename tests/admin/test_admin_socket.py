"""A real admin server on a real socket, spoken to by the real client and by raw bytes."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.lowlevel

from sandboxd.admin import protocol
from sandboxd.admin.client import AdminClient
from sandboxd.admin.server import Caller, Reply, serve_admin
from sandboxd.errors import (
    ConfigError,
    Conflict,
    Denied,
    Invalid,
    KernelError,
    NotFound,
    SandboxdError,
    StoreError,
    Unavailable,
)
from sandboxd.paths import Paths

T = TypeVar("T")


def paths_in(directory: Path) -> Paths:
    return Paths(config=directory / "config", state=directory / "state", runtime=directory)


@asynccontextmanager
async def serving(
    directory: Path, methods: dict[str, Any], **options: Any
) -> AsyncIterator[trio.Nursery]:
    options.setdefault("allow", lambda uid, gids: True)
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_admin(directory / "admin.sock", methods, task_status=task_status, **options)

        await nursery.start(serve)
        yield nursery
        nursery.cancel_scope.cancel()


async def with_client(directory: Path, use: Callable[[AdminClient], T]) -> T:
    def run() -> T:
        with AdminClient.connect(paths_in(directory)) as client:
            return use(client)

    with trio.fail_after(10):
        return await trio.to_thread.run_sync(run)


async def raw(directory: Path, sent: bytes, lines: int = 1) -> list[dict[str, Any]]:
    with trio.fail_after(10):
        stream = await trio.open_unix_socket(directory / "admin.sock")
        async with stream:
            await stream.send_all(sent)
            got = bytearray()
            while got.count(b"\n") < lines:
                chunk = await stream.receive_some()
                if not chunk:
                    break
                got += chunk
            return [json.loads(line) for line in got.splitlines()]


async def echo(caller: Caller, params: dict[str, Any]) -> Reply:
    return Reply({"uid": caller.uid, "pid": caller.pid, "name": caller.name, "params": params})


async def test_a_method_gets_its_params_and_knows_who_asks(tmp_path: Path) -> None:
    async with serving(tmp_path, {"echo": echo}):
        got = await with_client(tmp_path, lambda c: c.call("echo", a=[1, {"b": None}], name="ü\n"))
    assert got["params"] == {"a": [1, {"b": None}], "name": "ü\n"}
    assert (got["uid"], got["pid"]) == (os.getuid(), os.getpid())


@pytest.mark.parametrize(
    "error",
    [
        Invalid("bad", hint="do good"),
        NotFound("no such agent 'x'", hint="see: sandboxctl agents"),
        Denied("no", rule="policies/default.yaml:3 deny", hint="h"),
        Conflict("ended"),
        Unavailable("no launcher"),
        StoreError("row"),
        KernelError("mount", 1, "/proc", hint="h"),
        ConfigError("unknown key 'x'", file="a.yaml", line=3, column=5, hint="h"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_expected_failure_arrives_as_the_same_class(
    tmp_path: Path, error: SandboxdError
) -> None:
    async def fail(caller: Caller, params: dict[str, Any]) -> Reply:
        raise error

    def use(client: AdminClient) -> SandboxdError:
        with pytest.raises(SandboxdError) as caught:
            client.call("fail")
        return caught.value

    async with serving(tmp_path, {"fail": fail}):
        got = await with_client(tmp_path, use)
    assert type(got) is type(error)
    assert (got.message, got.hint, got.exit_code) == (error.message, error.hint, error.exit_code)
    for field in ("rule", "syscall", "errno", "path"):
        assert getattr(got, field, None) == getattr(error, field, None)


async def test_every_problem_of_a_configuration_arrives(tmp_path: Path) -> None:
    class ConfigErrors(SandboxdError):
        code, exit_code = "config", 2
        errors = (ConfigError("one", file="a.yaml", line=1, column=2), ConfigError("two", hint="h"))

    async def fail(caller: Caller, params: dict[str, Any]) -> Reply:
        raise ConfigErrors("2 problems")

    def use(client: AdminClient) -> SandboxdError:
        with pytest.raises(protocol.ConfigErrorList) as caught:
            client.call("fail")
        return caught.value

    async with serving(tmp_path, {"fail": fail}):
        got = await with_client(tmp_path, use)
    assert got.exit_code == 2
    assert [(e.message, e.hint) for e in got.errors] == [("a.yaml:1:2: one", ""), ("two", "h")]


async def test_an_error_inside_a_nursery_of_the_method_arrives_as_itself(tmp_path: Path) -> None:
    async def fail(caller: Caller, params: dict[str, Any]) -> Reply:
        async def child() -> None:
            raise NotFound("gone")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
        raise AssertionError

    def use(client: AdminClient) -> None:
        with pytest.raises(NotFound, match=r"^gone$"):
            client.call("fail")

    async with serving(tmp_path, {"fail": fail}):
        await with_client(tmp_path, use)


async def test_a_bug_in_a_method_tells_its_place_and_no_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def bug(caller: Caller, params: dict[str, Any]) -> Reply:
        raise ValueError("hunter2")

    def use(client: AdminClient) -> tuple[SandboxdError, Any]:
        with pytest.raises(SandboxdError) as caught:
            client.call("bug")
        return caught.value, client.call("echo")

    async with serving(tmp_path, {"bug": bug, "echo": echo}):
        error, after = await with_client(tmp_path, use)
    assert (error.code, error.exit_code) == ("internal", 1)
    assert "ValueError" in error.message
    assert after["uid"] == os.getuid(), "the connection survives"
    assert "test_admin_socket.py" in caplog.text
    assert "hunter2" not in caplog.text + error.message + error.hint


async def test_a_result_that_is_not_json_is_a_bug_and_not_a_hang(tmp_path: Path) -> None:
    async def bad(caller: Caller, params: dict[str, Any]) -> Reply:
        return Reply({"path": tmp_path})

    def use(client: AdminClient) -> SandboxdError:
        with pytest.raises(SandboxdError) as caught:
            client.call("bad")
        return caught.value

    async with serving(tmp_path, {"bad": bad}):
        assert (await with_client(tmp_path, use)).code == "internal"


async def test_a_stream_yields_its_items_then_ends(tmp_path: Path) -> None:
    async def count(caller: Caller, params: dict[str, Any]) -> AsyncIterator[Any]:
        for n in range(params["to"]):
            yield {"n": n}
        yield Reply({"done": True})

    async def plain(caller: Caller, params: dict[str, Any]) -> AsyncIterator[Any]:
        yield 1
        raise NotFound("the rest")

    def use(client: AdminClient) -> None:
        assert [item["n"] for item in client.stream("count", to=1000)] == list(range(1000))
        items = client.stream("plain")
        assert next(items) == 1
        with pytest.raises(NotFound, match="the rest"):
            next(items)
        assert client.call("echo")["uid"] == os.getuid()

    async with serving(tmp_path, {"count": count, "plain": plain, "echo": echo}):
        await with_client(tmp_path, use)


async def test_descriptors_ride_on_their_own_reply(tmp_path: Path) -> None:
    async def pipes(caller: Caller, params: dict[str, Any]) -> Reply:
        read, write = os.pipe()
        os.write(write, params["text"].encode())
        return Reply({"padding": "x" * 300_000}, fds=[read, write])

    def use(client: AdminClient) -> None:
        first, second = client.submit("pipes", text="one"), client.submit("pipes", text="two")
        client.result(second)  # its descriptors are closed, not mixed up with those of the first
        _, fds = client.call_with_fds("pipes", text="three")
        assert len(fds) == 2
        assert os.read(fds[0], 10) == b"three"
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)
        client.result(first)

    before = len(os.listdir("/proc/self/fd"))
    async with serving(tmp_path, {"pipes": pipes}):
        await with_client(tmp_path, use)
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "both sides closed what they held"


async def test_descriptors_are_closed_when_the_reply_cannot_be_sent(tmp_path: Path) -> None:
    read, write = os.pipe()

    async def bad(caller: Caller, params: dict[str, Any]) -> Reply:
        return Reply({"not json": {1, 2}}, fds=[write])

    def use(client: AdminClient) -> None:
        with pytest.raises(SandboxdError):
            client.call("bad")

    async with serving(tmp_path, {"bad": bad}):
        await with_client(tmp_path, use)
        assert os.read(read, 1) == b"", "end of file: nobody holds the write end"
        os.close(read)


async def test_requests_of_one_connection_run_side_by_side(tmp_path: Path) -> None:
    released = trio.Event()

    async def wait(caller: Caller, params: dict[str, Any]) -> Reply:
        await released.wait()
        return Reply("waited")

    async def release(caller: Caller, params: dict[str, Any]) -> Reply:
        released.set()
        return Reply("released")

    def use(client: AdminClient) -> None:
        waiting = client.submit("wait")
        assert not client.ready(waiting)
        assert client.call("release") == "released"
        assert client.result(waiting) == "waited"

    async with serving(tmp_path, {"wait": wait, "release": release}):
        await with_client(tmp_path, use)


async def test_a_client_that_goes_away_cancels_its_method_then_cleans_up(tmp_path: Path) -> None:
    events: list[str] = []
    started, cleaned = trio.Event(), trio.Event()

    async def hang(caller: Caller, params: dict[str, Any]) -> Reply:
        async def stop() -> None:
            await trio.lowlevel.checkpoint()
            events.append("cleaned up")
            cleaned.set()

        caller.on_disconnect(stop)
        caller.on_disconnect(trio.sleep_forever)()  # taken back: it would run first, and hang
        started.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            events.append("cancelled")
            raise
        raise AssertionError

    async with serving(tmp_path, {"hang": hang}):
        with trio.fail_after(10):
            stream = await trio.open_unix_socket(tmp_path / "admin.sock")
            await stream.send_all(protocol.encode(protocol.request(1, "hang", {})))
            await started.wait()
            await stream.aclose()
            await cleaned.wait()
    assert events == ["cancelled", "cleaned up"]


async def test_a_stream_stops_when_its_reader_leaves(tmp_path: Path) -> None:
    closed = trio.Event()

    async def forever(caller: Caller, params: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            while True:
                yield "x" * 10_000
        finally:
            closed.set()

    def use(client: AdminClient) -> None:
        assert next(client.stream("forever")) == "x" * 10_000

    async with serving(tmp_path, {"forever": forever}):
        await with_client(tmp_path, use)
        with trio.fail_after(10):
            await closed.wait()


async def test_a_stranger_is_refused_and_told_who_may(tmp_path: Path) -> None:
    asked: list[tuple[int, list[int]]] = []
    told: list[Caller] = []

    def nobody(uid: int, gids: list[int]) -> bool:
        asked.append((uid, gids))
        return False

    async def refused(caller: Caller) -> None:
        told.append(caller)

    def use(client: AdminClient) -> None:
        with pytest.raises(Denied, match="may not administer this sandboxd"):
            client.call("echo")

    async with serving(tmp_path, {"echo": echo}, allow=nobody, refused=refused):
        await with_client(tmp_path, use)
    assert asked[0][0] == os.getuid()
    assert set(asked[0][1]) >= {os.getgid(), *os.getgroups()}
    assert told[0].uid == os.getuid()


@pytest.mark.skipif(os.getuid() != 0, reason="changing uid needs root")
async def test_the_kernel_names_another_user_and_their_groups(tmp_path: Path) -> None:
    seen: list[tuple[int, list[int]]] = []

    def allow(uid: int, gids: list[int]) -> bool:
        seen.append((uid, gids))
        return 4242 in gids

    os.chmod(tmp_path, 0o755)
    script = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "groups = [int(g) for g in sys.argv[2:]]\n"
        "os.setgroups(groups); os.setgid(65534); os.setuid(65534)\n"
        "s.connect(sys.argv[1])\n"
        "try:\n"
        '    s.sendall(b\'{"jsonrpc":"2.0","id":1,"method":"echo"}\\n\')\n'
        "except BrokenPipeError:\n"
        "    pass  # refused before it could ask\n"
        "print(s.recv(65536).decode(), end='')\n"
    )
    # pytest's directories above are private to root; the connecting process needs a way in.
    with socket_directory() as directory:
        async with serving(
            Path(directory), {"echo": echo}, allow=allow, mode=0o666, group=os.getgid()
        ):
            replies = [
                json.loads(
                    (
                        await trio.run_process(
                            [sys.executable, "-c", script, f"{directory}/admin.sock", *groups],
                            capture_stdout=True,
                        )
                    ).stdout
                )
                for groups in (["4242", "7"], ["7"])
            ]
    assert replies[0]["result"]["uid"] == 65534
    assert replies[1]["error"]["data"]["code"] == "denied"
    assert seen == [(65534, [65534, 7, 4242]), (65534, [65534, 7])]


@pytest.mark.skipif(os.getuid() != 0, reason="changing uid needs root")
async def test_a_user_with_more_groups_than_python_reads_is_still_served(tmp_path: Path) -> None:
    script = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "os.setgroups(range(1000, 1400))\n"
        "s.connect(sys.argv[1])\n"
        's.sendall(b\'{"jsonrpc":"2.0","id":1,"method":"echo"}\\n\')\n'
        "print(s.recv(65536).decode(), end='')\n"
    )
    async with serving(tmp_path, {"echo": echo}):
        done = await trio.run_process(
            [sys.executable, "-c", script, str(tmp_path / "admin.sock")], capture_stdout=True
        )
    assert json.loads(done.stdout)["result"]["uid"] == 0


@pytest.mark.parametrize(
    ("sent", "number", "text"),
    [
        (b"not json\n", protocol.PARSE_ERROR, "not valid JSON"),
        (b"[1]\n", protocol.PARSE_ERROR, "not a JSON object"),
        (b"[" * 100_000 + b"\n", protocol.PARSE_ERROR, "nested too deeply"),
        (b'{"id":1,"id":2}\n', protocol.PARSE_ERROR, "same key twice"),
        (b'{"jsonrpc":"2.0","id":null,"method":"echo"}\n', protocol.INVALID_REQUEST, "needs an id"),
        (b'{"jsonrpc":"2.0","id":true,"method":"echo"}\n', protocol.INVALID_REQUEST, "needs an id"),
        (b'{"id":1,"method":"echo"}\n', protocol.INVALID_REQUEST, "jsonrpc 2.0"),
        (b'{"jsonrpc":"2.0","id":1,"method":7}\n', protocol.INVALID_REQUEST, "with a method"),
        (
            b'{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}\n',
            protocol.INVALID_REQUEST,
            "object of params",
        ),
        (b'{"jsonrpc":"2.0","id":1,"method":"no\\u001b"}\n', protocol.METHOD_NOT_FOUND, "no\\x1b"),
    ],
)
async def test_a_malformed_request_is_answered_and_the_connection_survives(
    tmp_path: Path, sent: bytes, number: int, text: str
) -> None:
    good = b'{"jsonrpc":"2.0","id":9,"method":"echo","params":{}}\n'
    async with serving(tmp_path, {"echo": echo}):
        first, second = await raw(tmp_path, sent + good, lines=2)
    assert first["error"]["code"] == number
    assert text in first["error"]["message"]
    assert second["id"] == 9
    assert second["result"]["uid"] == os.getuid()


async def test_a_notification_is_not_answered(tmp_path: Path) -> None:
    sent = b'\n{"jsonrpc":"2.0","method":"x"}\n{"jsonrpc":"2.0","id":"a","method":"echo"}\n'
    async with serving(tmp_path, {"echo": echo}):
        (only,) = await raw(tmp_path, sent)
    assert only["id"] == "a"


async def test_an_endless_line_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_LINE", 100_000)
    async with serving(tmp_path, {"echo": echo}):
        (only,) = await raw(tmp_path, b"x" * 100_000, lines=2)
        assert "100,000 bytes" in only["error"]["message"]
        assert (await with_client(tmp_path, lambda c: c.call("echo")))["uid"] == os.getuid()


async def test_too_many_requests_at_once_are_refused(tmp_path: Path) -> None:
    async def hang(caller: Caller, params: dict[str, Any]) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    lines = b"".join(protocol.encode(protocol.request(n, "hang", {})) for n in range(33))
    async with serving(tmp_path, {"hang": hang}):
        (only,) = await raw(tmp_path, lines)
        (twice,) = await raw(tmp_path, 2 * protocol.encode(protocol.request(7, "hang", {})))
    assert (only["id"], only["error"]["data"]["code"]) == (32, "conflict")
    assert (twice["id"], twice["error"]["data"]["code"]) == (7, "conflict")


async def test_the_socket_is_private_unless_asked_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    old = os.umask(0)
    try:
        async with serving(tmp_path, {}):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not path.exists()
        async with serving(tmp_path, {}, mode=0o660, group=os.getgid()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
    finally:
        os.umask(old)
    assert os.listdir(tmp_path) == ["admin.sock.lock"]


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    assert path.exists()
    async with serving(tmp_path, {"echo": echo}):
        assert (await with_client(tmp_path, lambda c: c.call("echo")))["uid"] == os.getuid()


async def test_a_second_daemon_leaves_the_first_ones_socket_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, {"echo": echo}):
        with pytest.raises(Conflict, match="another sandboxd already serves"):
            await serve_admin(tmp_path / "admin.sock", {}, allow=lambda uid, gids: True)
        assert (await with_client(tmp_path, lambda c: c.call("echo")))["uid"] == os.getuid()


@pytest.mark.parametrize("backlog", [5, 0])
async def test_a_listener_that_holds_no_lock_is_left_alone_too(
    tmp_path: Path, backlog: int
) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(os.fspath(path))
        other.listen(backlog)
        if not backlog:
            waiting.connect(os.fspath(path))  # a full queue answers EAGAIN
        with pytest.raises(Conflict, match="another sandboxd already serves"):
            await serve_admin(path, {}, allow=lambda uid, gids: True)
        assert path.exists()


async def test_a_file_at_the_sockets_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(Conflict, match="is not a socket"):
        await serve_admin(path, {}, allow=lambda uid, gids: True)
    assert path.read_text() == "precious"


async def test_a_socket_that_somebody_else_put_there_is_not_unlinked_at_the_end(
    tmp_path: Path,
) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as other:
        async with serving(tmp_path, {}):
            path.unlink()
            other.bind(os.fspath(path))
        assert path.exists()


async def test_a_path_too_long_for_the_kernel_is_refused_with_the_limit(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    with pytest.raises(Invalid, match="too long"):
        await serve_admin(long / "admin.sock", {}, allow=lambda uid, gids: True)
    with pytest.raises(Invalid, match="longer than 107 bytes"):
        AdminClient.connect(paths_in(long))


async def test_a_listener_of_the_service_manager_is_served_and_left_in_place(
    tmp_path: Path,
) -> None:
    path = tmp_path / "admin.sock"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen()
    async with serving(tmp_path, {"echo": echo}, listener=sock):
        assert (await with_client(tmp_path, lambda c: c.call("echo")))["uid"] == os.getuid()
    assert path.exists()


def test_without_a_daemon_the_client_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no sandboxd is running: there is no") as caught:
        AdminClient.connect(paths_in(tmp_path))
    assert "sandboxd" in caught.value.hint
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(tmp_path / "admin.sock"))
    with pytest.raises(Unavailable, match="nobody answers at"):
        AdminClient.connect(paths_in(tmp_path))


async def test_a_daemon_that_dies_in_mid_call_is_told_apart_from_an_answer(tmp_path: Path) -> None:
    started = trio.Event()

    async def hang(caller: Caller, params: dict[str, Any]) -> Reply:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    def use(client: AdminClient) -> None:
        with pytest.raises(Unavailable, match="closed the connection"):
            client.call("hang")

    async with trio.open_nursery() as outer:
        async with serving(tmp_path, {"hang": hang}):
            outer.start_soon(with_client, tmp_path, use)
            with trio.fail_after(10):
                await started.wait()


def test_the_client_imports_neither_trio_nor_mcp() -> None:
    code = (
        "import sys, sandboxd.admin.client\n"
        "print([m for m in ('trio', 'mcp', 'attrs', 'yaml', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class socket_directory:
    """A short directory outside pytest's private ones, that every user may enter."""

    def __enter__(self) -> str:
        import tempfile

        self.directory = tempfile.TemporaryDirectory(prefix="sbx-", dir="/tmp")
        os.chmod(self.directory.name, 0o755)
        return self.directory.name

    def __exit__(self, *exc: object) -> None:
        self.directory.cleanup()
