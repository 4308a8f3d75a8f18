"""The demo for real: what it shows, what makes it fail, and that nothing of it stays behind.

The agent's searches are tried outside a sandbox as well, where each must find what was planted:
a search that can't find anything would make the demo's table worthless.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from sandboxd import demo
from sandboxd.demo import report, show, stage
from sandboxd.demo.hostile import probes
from sandboxd.demo.hostile.agent import ATTEMPTS
from sandboxd.demo.report import Result, Row
from sandboxd.demo.server import open_bank
from sandboxd.demo.stage import VARIABLE, open_stage
from sandboxd.errors import Unavailable
from sandboxd.secret import Secret
from sandboxd.trial import hunt, reach
from sandboxd.trial import stage as trial_stage

ROOT = Path(__file__).resolve().parent.parent


def arguments(*, as_json: bool = True, keep: bool = False) -> argparse.Namespace:
    return argparse.Namespace(json=as_json, keep=keep)


def rows_of(printed: str) -> dict[str, dict[str, object]]:
    return {row["attempt"]: row for row in json.loads(printed)["attempts"]}


# -- the demo as users start it ---------------------------------------------------------------


@pytest.fixture(scope="module")
def shown() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandboxd.cli", "demo", "--json", "--keep"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="module")
def kept(shown: subprocess.CompletedProcess[str]) -> Iterator[Path]:
    """The directory that --keep left behind."""
    import shutil

    top = Path(json.loads(shown.stdout)["kept"])
    yield top
    shutil.rmtree(top)


def test_every_attempt_finds_nothing_and_every_control_passes(
    shown: subprocess.CompletedProcess[str],
) -> None:
    result = json.loads(shown.stdout)
    assert [row for row in result["attempts"] if not row["ok"]] == []
    assert tuple(row["attempt"] for row in result["attempts"]) == ATTEMPTS
    assert len(ATTEMPTS) >= 12
    assert (result["ok"], result["leaks"], result["problems"]) == (True, [], [])
    assert shown.returncode == 0


def test_the_tool_used_the_secret_and_the_audit_log_tells_of_it(
    shown: subprocess.CompletedProcess[str], kept: Path
) -> None:
    result = json.loads(shown.stdout)
    assert result["tool_used_secret"] is True
    assert result["payments"] == 5  # three harmless injections, the one spied on, the real one
    assert result["audit"]["ok"] is True
    log = b"".join(path.read_bytes() for path in (kept / "s" / "audit").iterdir() if path.is_file())
    assert VARIABLE.encode() in log
    assert hunt.PREFIX not in log


def test_what_is_kept_tells_who_could_read_it_and_holds_no_secret(kept: Path) -> None:
    assert (kept / "key").stat().st_mode & 0o777 == 0o400
    assert (kept / "s").stat().st_mode & 0o777 == 0o700
    opened = (kept / "open").read_bytes()
    values = set()
    for path in kept.rglob("*"):
        if path.is_file():
            values |= set(hunt.PATTERN.findall(path.read_bytes()))
    assert values == {opened}


# -- a demo that is sabotaged says so ---------------------------------------------------------


@pytest.fixture
def _short_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the walk over the system's 100,000 files, which a test above has made already."""
    plan = show._plan
    roots = {"roots": ["/tmp", "/home", "/run", "/workspace"]}
    monkeypatch.setattr(show, "_plan", lambda *given: {**plan(*given), **roots})


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory of the host with a socket that answers everybody who can see it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"{name}/socket")
            (path / "socket").chmod(0o666)
            listener.listen()
            yield path


@pytest.mark.usefixtures("_short_walk")
def test_a_leaking_sandbox_and_a_redactor_that_does_nothing_fail_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], open_directory: Path
) -> None:
    written = stage.configuration

    def sabotaged(on: stage.Stage, port: int) -> dict[str, str]:
        files = written(on, port)
        # The agent gets a socket of the host's, the secret as a constant, and the host's network.
        files["agents/hostile.yaml"] += (
            f"  - source: {open_directory}\n    target: /home/open\n"
            f"environment:\n  TOKEN: {on.secret.reveal().decode()}\nnetwork: host\n"
        )
        files["policies/demo.yaml"] = files["policies/demo.yaml"].replace(
            "agent_network: none", "agent_network: host"
        )
        return files

    monkeypatch.setattr(stage, "configuration", sabotaged)
    run = [sys.executable, "-c", WITHOUT_REDACTION]
    monkeypatch.setattr(trial_stage, "daemon_program", lambda: run)
    assert demo.main(arguments()) == 1
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    for attempt in (
        "its own environment",
        "environments of all processes",
        "memory of all processes",
        "the host's network",
        "Unix sockets: admin, docker, D-Bus",
        "a tool that prints its secret",
    ):
        assert rows[attempt]["found"] is True, attempt
    assert rows["a tool that prints its secret"]["control"] is False  # nothing was masked
    assert rows["kernel keyrings"]["ok"] is True
    assert rows["a tool without secrets"]["ok"] is True
    assert "the agent's stdout" in json.loads(printed)["leaks"]
    assert hunt.PATTERN.search(printed.encode()) is None  # the demo itself repeats no value


WITHOUT_REDACTION = """
import sys
from sandboxd.redact import Streams
Streams.feed = lambda self, name, data: [(name, data)]
Streams.flush = lambda self, name, followed_by=b"": (b"", 0)
from sandboxd.main import main
sys.exit(main())
"""


@pytest.mark.usefixtures("_short_walk")
def test_an_agent_whose_searches_are_blind_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = stage.pack

    def blind(target: Path, modules: Iterable[str], main: str) -> None:
        pack(target, modules, main)
        with zipfile.ZipFile(target) as archive:
            texts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(target, "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text.replace(b'b"[0-9a-f]{32}"', b'b"never"'))

    monkeypatch.setattr(stage, "pack", blind)
    assert demo.main(arguments(as_json=False)) == 1
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("!! ")]
    assert len(lines) >= 10
    assert all("FAILED" in line for line in lines)
    assert "attempts failed the demo" in printed


# -- a host that can't isolate ----------------------------------------------------------------

#: What Docker's default profile does: unshare(2) is refused. 0x7fff0000 allows, 0x50001 is EPERM.
WITHOUT_NAMESPACES = """
import ctypes, platform, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
unshare = {"x86_64": 272}.get(platform.machine(), 97)
program = b"".join(struct.pack("=HBBI", *i) for i in (
    (0x20, 0, 0, 0), (0x15, 0, 1, unshare), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(program, len(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0
filter = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
assert libc.prctl(22, 2, filter, 0, 0) == 0
from sandboxd.main import main
sys.exit(main())
"""


def test_a_host_without_namespaces_is_told_with_a_hint_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tops: set[Path]
) -> None:
    run = [sys.executable, "-c", WITHOUT_NAMESPACES]
    monkeypatch.setattr(trial_stage, "daemon_program", lambda: run)
    with pytest.raises(Unavailable) as caught:
        demo.main(arguments())
    assert caught.value.exit_code == 6
    assert "EPERM" in caught.value.message
    assert "sandboxctl doctor" in caught.value.hint
    assert [top for top in tops if top.exists()] == []


def test_a_daemon_that_does_not_start_is_told_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tops: set[Path]
) -> None:
    monkeypatch.setattr(stage, "configuration", lambda on, port: {"sandboxd.yaml": "version: 9\n"})
    monkeypatch.setattr(stage, "TOOLS", ())
    with pytest.raises(Exception, match="did not start") as caught:
        demo.main(arguments())
    assert getattr(caught.value, "exit_code", None) == 1
    assert [top for top in tops if top.exists()] == []


@pytest.fixture
def tops(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The directories of all stages that a test made."""
    made: set[Path] = set()
    make = trial_stage.tempfile.mkdtemp

    def noted(**options: str) -> str:
        top = make(**options)
        made.add(Path(top))
        return top

    monkeypatch.setattr(trial_stage.tempfile, "mkdtemp", noted)
    return made


# -- nothing stays ----------------------------------------------------------------------------

HELD_STAGE = """
import time
from sandboxd.demo.stage import open_stage
from sandboxd.trial.stage import until_interrupted
with until_interrupted(), open_stage() as stage:
    stage.start(1)
    print(stage.top, stage.daemon.pid, flush=True)
    while True:  # not signal.pause(): a signal right before it would not end it
        time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + 15)]
)
def test_an_interrupted_demo_leaves_no_directory_and_no_daemon(number: int, status: int) -> None:
    held = subprocess.Popen(
        [sys.executable, "-c", HELD_STAGE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert held.stdout is not None
    with held.stdout:
        top, pid = held.stdout.readline().split()
        try:
            assert Path(top, "r", "admin.sock").exists()
            held.send_signal(number)
            held.send_signal(number)  # an impatient second one does not stop the cleanup
            assert held.wait(30) == status
        finally:
            held.kill()
            held.wait()
    assert not Path(top).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_an_error_in_the_middle_leaves_nothing_and_keep_leaves_the_directory() -> None:
    with pytest.raises(FileNotFoundError), open_stage() as broken:
        broken.log.read_text()
    assert not broken.top.exists()
    with open_stage(keep=True) as left:
        pass
    left.top.rmdir()


# -- the bank ---------------------------------------------------------------------------------


def test_the_bank_takes_only_the_right_token() -> None:
    with open_bank(Secret(b"right")) as bank:
        assert bank.take("Bearer wrong", b"{}")[0] == 401
        assert bank.take("Bearer right ", b"{}")[0] == 401
        assert bank.take("Bearer right", b'{"payee": "x"}')[0] == 200
        assert (bank.refused, bank.payments) == (2, [{"payee": "x"}])


# -- the verdict ------------------------------------------------------------------------------

GOOD = Row("a", found=False, result="nothing", control=True, how="decoy found")


def good() -> Result:
    return Result([GOOD], used=True, payments=1, audit_ok=True, records=3, searched=1)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [GOOD, Row("b", found=True, result="", control=True, how="")]},
        {"rows": [GOOD, Row("b", found=False, result="", control=False, how="")]},
        {"used": False},
        {"audit_ok": False},
        {"leaks": ["daemon.log"]},
        {"problems": ["the agent ended early"]},
    ],
)
def test_one_thing_wrong_is_enough_to_fail(change: dict[str, object]) -> None:
    result = good()
    assert result.ok
    for name, value in change.items():
        setattr(result, name, value)
    assert not result.ok


def test_an_attempt_that_was_not_made_fails_its_row() -> None:
    assert not show._row("open descriptors", None, (True, "")).ok


def test_a_control_that_the_kernel_refuses_counts_only_where_it_may() -> None:
    line = {
        "attempt": "kernel keyrings",
        "found": False,
        "loot": [],
        "detail": "nothing",
        "control": "refused: EPERM",
        "control_detail": "",
    }
    assert show._row("kernel keyrings", line, (True, "")).ok
    assert not show._row("open descriptors", line, (True, "")).ok


def test_the_secret_is_recognised_in_the_usual_encodings() -> None:
    on = stage.Stage(Path("/nonexistent"))
    value = on.secret.reveal()
    for text in (value, value.hex().encode(), value.hex().upper().encode(), value[::-1]):
        assert show._holds(on, b"..." + text + b"...")
    for before in (b"", b"x", b"xy", b"xyz"):
        assert show._holds(on, base64.b64encode(before + value + b"after"))
    assert not show._holds(on, base64.b64encode(on.opened.encode()) + on.opened.encode())


@pytest.mark.parametrize("wanted", [True, False])
def test_the_table_is_coloured_only_for_a_terminal_that_wants_it(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not wanted:
        monkeypatch.setenv("NO_COLOR", "1")
    report.show(good())
    printed = capsys.readouterr().out
    assert ("\x1b[" in printed) is wanted
    assert "the tool used the secret: " in printed


def test_a_piped_table_is_plain_and_tells_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    result = good()
    report.show(result)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "the tool used the secret: yes" in printed
    assert "audit chain verified: yes, 3 records" in printed
    result.leaks = ["daemon.log"]
    report.show(result)
    assert "free of the secret: no: daemon.log" in capsys.readouterr().out


# -- the searches, outside a sandbox, find what is there ----------------------------------------


def foreign() -> bytes:
    """A value that the agent did not plant: loot."""
    return hunt.PREFIX + os.urandom(16).hex().encode()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[tuple[int, dict[str, bytes], int]]:
    """Another process with a foreign value in each place; its pid, the values, its descriptor."""
    values = {name: foreign() for name in ("environ", "cmdline", "file")}
    path = tmp_path / "held"
    path.write_bytes(values["file"])
    with path.open("rb") as held:
        child = subprocess.Popen(
            ["/bin/sh", "-c", "echo; read line", values["cmdline"].decode()],
            env={"TOKEN": values["environ"].decode()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[held.fileno()],
        )
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid, values, held.fileno()
        child.kill()
        child.communicate()


def loot_of(outcome: probes.Outcome) -> str:
    return "\n".join(outcome.hunt.loot)


@pytest.mark.parametrize(
    ("attempt", "place"),
    [
        ("environments of all processes", "environ"),
        ("command lines of all processes", "cmdline"),
        ("memory of all processes", "environ"),
        ("memory of all processes", "cmdline"),
        ("open descriptors", "file"),
        ("ptrace and its relatives", "environ"),
    ],
)
def test_searches_of_processes_find_a_value_in_another_one(
    attempt: str, place: str, victim: tuple[int, dict[str, bytes], int]
) -> None:
    pid, values, _ = victim
    plan = probes.Plan(only=frozenset({pid}))
    outcome = probes.PROBES[attempt](plan)
    assert values[place].decode() in loot_of(outcome)
    assert outcome.control is True


def test_tracing_reports_each_way_that_works(victim: tuple[int, dict[str, bytes], int]) -> None:
    pid, values, fd = victim
    for name, attack in reach.ATTACKS.items():
        found = hunt.Hunt()
        attack(found, pid, fd)
        if name == "pidfd_getfd":
            assert found.has(values["file"])
        if name == "process_vm_readv":
            assert found.has(values["environ"])
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    for attack in reach.ATTACKS.values():
        with pytest.raises(ProcessLookupError):
            attack(hunt.Hunt(), gone.pid, 0)


def test_the_search_of_the_own_environment_finds_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    value = foreign()
    agent = "import sys; from sandboxd.demo.hostile.agent import main; main(sys.argv[1:])"
    seen = subprocess.run(
        [sys.executable, "-c", agent, "--own-environment"],
        cwd=ROOT,
        env={**os.environ, "TOKEN": value.decode()},
        capture_output=True,
        check=True,
    )
    assert seen.stdout.split() == [value, value]


def test_the_search_of_files_finds_a_new_file_and_skips_an_older_one(tmp_path: Path) -> None:
    old, new = foreign(), foreign()
    (tmp_path / "old").write_bytes(old)
    border, since = tmp_path / "border", 0.0
    while since <= (tmp_path / "old").stat().st_ctime:  # it ticks every few milliseconds
        border.touch()
        since = border.stat().st_ctime
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    # Across the border of two chunks.
    (deep / "new").write_bytes(b"." * ((1 << 20) - 11) + new + b"." * 99)
    plan = probes.Plan(roots=(str(tmp_path),), since=since)
    loot = loot_of(probes.files(plan))
    assert f"{new.decode()} in {deep}/new" in loot
    assert old.decode() not in loot


def test_the_search_of_host_paths_calls_every_file_that_is_there_a_breach(tmp_path: Path) -> None:
    value = foreign()
    (tmp_path / "store").write_bytes(value)
    (tmp_path / "open").write_bytes(hunt.decoy())
    listening = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(listening))
        paths = (str(tmp_path / "store"), str(tmp_path), str(listening), str(tmp_path / "absent"))
        me = frozenset({os.getpid()})
        plan = probes.Plan(paths=paths, open_path=str(tmp_path / "open"), only=me)
        loot = loot_of(probes.host_paths(plan))
    assert value.decode() in loot
    assert f"opened {tmp_path}\n" in loot + "\n"
    assert f"{listening} is there" in loot
    assert f"opened {tmp_path}/store through process {os.getpid()}" in loot
    assert "absent" not in loot


def test_the_search_of_sockets_connects_to_paths_and_abstract_names(tmp_path: Path) -> None:
    name = f"sandboxd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as path, socket.socket(socket.AF_UNIX) as abstract:
        path.bind(str(tmp_path / "s"))
        path.listen()
        abstract.bind("\0" + name)
        abstract.listen()
        outcome = probes.sockets(probes.Plan(roots=(str(tmp_path),), abstract=name))
    assert f"connected to '{tmp_path}/s'" in loot_of(outcome)
    assert name in loot_of(outcome)
    assert outcome.control is True


def test_the_search_of_keyrings_finds_a_foreign_key() -> None:
    value = foreign()
    try:
        key = reach.add_key(b"sandboxd-test", value)
    except PermissionError:
        pytest.skip("this host refuses keys to everybody")
    try:
        outcome = probes.keyrings(probes.Plan())
    finally:
        reach.remove_key(key)
    assert value.decode() in loot_of(outcome)
    assert outcome.control is True


def test_the_search_of_shared_memory_finds_a_foreign_segment() -> None:
    value = foreign()
    segment = reach.share(value)
    try:
        outcome = probes.shared_memory(probes.Plan())
    finally:
        reach.unshare(segment)
    assert value.decode() in loot_of(outcome)
    assert outcome.control is True


def test_the_search_of_the_network_reports_a_server_that_answers() -> None:
    with open_bank(Secret(b"x")) as bank:
        outcome = probes.network(probes.Plan(addresses=("127.0.0.1",), port=bank.port))
    assert loot_of(outcome) == f"connected to 127.0.0.1:{bank.port}"


def test_a_planted_value_is_no_loot_and_another_one_is() -> None:
    search = hunt.Hunt()
    planted, other = hunt.decoy(), foreign()
    search.look("here", planted + other)
    assert search.loot == [f"{other.decode()} in here"]
    assert search.has(planted)
