"""The audit log: durable before it returns, and whatever is done to it afterwards shows."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sandboxd.audit import AuditLog, Bad, verify_log
from sandboxd.errors import Conflict, Denied, Invalid, StoreError
from sandboxd.secret import Secret

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))

Open = Callable[..., AuditLog]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def reopen(directory: Path) -> Iterator[Open]:
    """Open the log (again); what is still open at the end is closed."""
    opened: list[AuditLog] = []

    def open_it(key: bytes = KEY, **options: object) -> AuditLog:
        for log in opened:
            log.close()
        opened.append(AuditLog.open(directory, key, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_it
    for log in opened:
        log.close()


@pytest.fixture
def log(reopen: Open) -> AuditLog:
    return reopen()


@pytest.fixture
def five(directory: Path) -> Path:
    """The file of a closed log with five records."""
    return written(directory, "call.decided")


def written(directory: Path, event: str) -> Path:
    async def write() -> None:
        for n in range(5):
            await log.append(event, n=n)

    log = AuditLog.open(directory, KEY)
    trio.run(write)
    log.close()
    return directory / "audit.jsonl"


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


class Syncs:
    """Counts fdatasync(2), which still happens; ``fails`` makes it fail as a dying disk would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.fails = 0, False
        self.real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.count += 1
        if self.fails:
            raise OSError(5, "Input/output error")
        self.real(fd)


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


async def test_a_record_is_one_line_of_json_chained_and_signed(reopen: Open) -> None:
    log = reopen(clock=lambda: 1_767_225_600.25)
    assert await log.append("env.set", agent="bot", names=["A", "B"], now=False) == 1
    assert await log.append("session.started", session="s-1", pid=None) == 2
    first, second = (json.loads(line) for line in lines(log._directory / "audit.jsonl"))
    assert list(first) == ["seq", "at", "event", "agent", "names", "now", "prev", "mac"]
    assert first["at"] == "2026-01-01T00:00:00.250Z"
    assert (first["seq"], first["event"], first["names"]) == (1, "env.set", ["A", "B"])
    assert first["prev"] == "0" * 64
    assert second["prev"] == first["mac"]
    assert log.tail(10) == [first, second]
    assert log.verify().ok
    assert log.verify().records == 2
    assert log.verify().problem == ""


async def test_the_mac_is_hmac_sha256_over_everything_before_it(five: Path) -> None:
    import hmac

    for line in lines(five):
        body, mac = line.rsplit(b',"mac":"', 1)
        assert mac == hmac.digest(KEY, body, "sha256").hex().encode() + b'"}\n'


async def test_the_chain_goes_on_after_a_restart(reopen: Open) -> None:
    await reopen().append("daemon.started")
    assert await reopen().append("daemon.started") == 2
    assert reopen().verify().records == 2


async def test_an_empty_log_verifies_and_reopens(reopen: Open) -> None:
    assert reopen().verify().ok
    assert reopen().tail(5) == []
    assert reopen().verify().records == 0


def test_files_and_directory_are_private_whatever_the_umask(directory: Path) -> None:
    old = os.umask(0)
    try:
        written(directory, "x")
    finally:
        os.umask(old)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {each.name: each.stat().st_mode & 0o777 for each in directory.iterdir()} == {
        "audit.jsonl": 0o600,
        "audit.head": 0o600,
    }


async def test_a_record_is_synced_when_append_returns(log: AuditLog, syncs: Syncs) -> None:
    for n in range(1, 4):
        await log.append("x")
        assert syncs.count == n


async def test_concurrent_appends_share_one_sync(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one sync runs, everything that arrives waits for the next one together."""
    real, count, go_on, begun = os.fdatasync, 0, threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        nonlocal count
        count += 1
        begun.set()
        assert go_on.wait(10)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    numbers: list[int] = []

    async def append(n: int) -> None:
        numbers.append(await log.append("x", n=n))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(append, 0)
        await trio.to_thread.run_sync(begun.wait, 10)
        for n in range(1, 100):
            nursery.start_soon(append, n)
        await trio.testing.wait_all_tasks_blocked()
        assert numbers == []  # none returns before its own sync
        go_on.set()
    assert count == 2
    assert sorted(numbers) == list(range(1, 101))
    assert log.verify().records == 100


async def test_a_cancelled_append_that_has_begun_is_still_written(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go_on, begun = os.fdatasync, threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        begun.set()
        assert go_on.wait(10)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.append, "first")
        await trio.to_thread.run_sync(begun.wait, 10)
        nursery.start_soon(log.append, "second")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        go_on.set()
    assert [r["event"] for r in log.tail(5)] == ["first", "second"]
    assert log.verify().ok


async def test_an_append_in_a_cancelled_scope_writes_nothing(log: AuditLog) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.append("x")
    assert scope.cancelled_caught
    assert log.tail(5) == []
    assert await log.append("y") == 1


async def test_a_noted_record_is_on_disk_soon_where_somebody_sees_to_it(
    log: AuditLog, syncs: Syncs
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.keep)
        for seq in (1, 2):
            assert log.note("x") == seq
            assert (syncs.count, log.last) == (seq - 1, seq - 1)
            with trio.fail_after(20):
                while log.last < seq:  # noqa: ASYNC110 - a log has no event
                    await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert syncs.count == 2
    assert log.verify().records == 2


async def test_noted_records_share_the_sync_of_the_next_one(log: AuditLog, syncs: Syncs) -> None:
    for _ in range(3):
        log.note("x")
    assert log.last == 0
    assert [r["seq"] for r in log.tail(5)] == [1, 2, 3]  # on their way
    assert [r["seq"] for r in log.tail(5, after=1)] == [2, 3]
    assert await log.append("y") == 4
    assert (syncs.count, log.last) == (1, 4)
    assert [r["seq"] for r in log.tail(3)] == [2, 3, 4]
    log.note("z")
    assert [r["seq"] for r in log.tail(9, after=3)] == [4, 5]
    assert log.tail(9, after=5) == log.tail(9, after=7) == []
    await log.settle()


async def test_a_started_record_is_written_while_its_maker_does_something_else(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fdatasync, threading.Event()

    def sync(fd: int) -> None:
        real(fd)
        synced.set()

    monkeypatch.setattr(os, "fdatasync", sync)
    seq = log.start("x")
    assert synced.wait(20)  # without a turn of the event loop
    await log.settle(seq)
    assert log.last == seq
    await log.settle()


async def test_closing_writes_what_was_noted(reopen: Open) -> None:
    log = reopen()
    await log.append("x")
    log.note("y")
    log.start("z")
    log.note("last")
    log.close()
    assert [r["event"] for r in reopen().tail(5)] == ["x", "y", "z", "last"]


async def test_a_noted_record_that_can_not_be_written_fails_the_next_ones(
    log: AuditLog, syncs: Syncs, caplog: pytest.LogCaptureFixture
) -> None:
    syncs.fails = True
    log.note("x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.keep)
        with trio.fail_after(20):
            while "can't write the audit log" not in caplog.text:  # noqa: ASYNC110
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    for call in (log.note, log.start):
        with pytest.raises(StoreError, match="can't write the audit log"):
            call("y")
    assert log.tail(5) == []


async def test_tail_gives_the_last_records_also_across_blocks(log: AuditLog) -> None:
    for n in range(12):
        await log.append("x", n=n, filler="f" * 30_000)
    for count in (0, 1, 2, 3, 7, 12, 50):
        assert [r["n"] for r in log.tail(count)] == list(range(12))[12 - min(count, 12) :]
    assert log.tail(-1) == []


async def test_the_last_records_of_one_kind_are_found_between_others(log: AuditLog) -> None:
    for n in range(12):
        await log.append("x", n=n, team="red" if n % 5 == 0 else "blue", filler="f" * 30_000)

    def red(record: Mapping[str, Any]) -> bool:
        return record["team"] == "red"

    for having in (b"", b'"team":"red"'):
        assert [r["n"] for r in log.tail(2, where=red, having=having)] == [5, 10]
        assert [r["n"] for r in log.tail(9, where=red, having=having)] == [0, 5, 10]
    # The text spares parsing; which records are given is up to the function.
    assert log.tail(9, where=lambda r: r["n"] == 1, having=b'"team":"red"') == []
    assert [r["n"] for r in log.tail(9, where=lambda r: r["n"] == 1)] == [1]


async def test_verification_runs_beside_appends(log: AuditLog) -> None:
    await log.append("x")
    reports = []

    async def verify() -> None:
        while len(reports) < 20:
            reports.append(await trio.to_thread.run_sync(log.verify))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(verify)
        while len(reports) < 20:
            await log.append("x", filler="f" * 1000)
    assert all(report.ok for report in reports)


# Tampering: each kind, found by verify, with the place.


def verified(file: Path, key: bytes = KEY) -> Bad | None:
    report = verify_log(file.parent, key)
    assert report.ok is (report.first_bad is None)
    if report.first_bad:
        assert report.first_bad.why in report.problem
    return report.first_bad


def test_an_untouched_log_verifies_closed_too(five: Path) -> None:
    assert verified(five) is None
    assert verify_log(five.parent, KEY).records == 5


def test_a_flipped_bit_anywhere_is_found_in_its_line(five: Path) -> None:
    good = five.read_bytes()
    for at in range(0, len(good), 7):
        five.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
        bad = verified(five)
        assert bad is not None
        assert bad.line == good[:at].count(b"\n") + 1
    five.write_bytes(good)
    assert verified(five) is None


def test_a_changed_record_is_found(five: Path) -> None:
    five.write_bytes(five.read_bytes().replace(b'"n":2', b'"n":7'))
    assert verified(five) == Bad(3, 3, "was changed, or is not signed with the key of this log")


def test_white_space_that_json_ignores_is_a_change_too(five: Path) -> None:
    five.write_bytes(five.read_bytes().replace(b'"n":2', b'"n": 2'))
    assert verified(five) == Bad(3, 3, "was changed, or is not signed with the key of this log")


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_a_removed_record_is_found(five: Path, removed: int) -> None:
    kept = lines(five)
    del kept[removed]
    five.write_bytes(b"".join(kept))
    why = f"is record {removed + 2}: records were removed, repeated or reordered"
    assert verified(five) == Bad(removed + 1, removed + 1, why)


def test_reordered_records_are_found(five: Path) -> None:
    a, b, c, d, e = lines(five)
    five.write_bytes(a + c + b + d + e)
    why = "is record 3: records were removed, repeated or reordered"
    assert verified(five) == Bad(2, 2, why)


def test_a_repeated_record_is_found(five: Path) -> None:
    a, b, *rest = lines(five)
    five.write_bytes(b"".join([a, b, b, *rest]))
    assert verified(five) == Bad(3, 3, "is record 2: records were removed, repeated or reordered")


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_an_end_cut_off_is_found_and_refused_at_start(five: Path, reopen: Open, kept: int) -> None:
    five.write_bytes(b"".join(lines(five)[:kept]))
    why = "is missing: the head remembers 5 records, the end was cut off"
    assert verified(five) == Bad(kept + 1, kept + 1, why)
    with pytest.raises(StoreError, match=f"line {kept + 1}, record {kept + 1} is missing"):
        reopen()


@pytest.mark.parametrize(
    "line",
    [
        b'{"seq":6,"at":"2026-01-01T00:00:00.000Z","event":"call.decided"}\n',
        b"not even JSON\n",
        b"\n",
        b'{"seq":6,"mac":"' + b"0" * 64 + b'"}\n',
    ],
)
def test_an_unkeyed_line_is_found_and_refused_at_start(
    five: Path, reopen: Open, line: bytes
) -> None:
    with five.open("ab") as file:
        file.write(line)
    bad = verified(five)
    assert bad is not None
    assert (bad.seq, bad.line) == (6, 6)
    assert "signed" in bad.why
    with pytest.raises(StoreError, match="line 6, record 6"):
        reopen()


def test_a_record_of_another_history_with_the_same_key_is_found(five: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", "harmless")
    kept = lines(five)
    kept[2] = lines(other)[2]
    five.write_bytes(b"".join(kept))
    why = "doesn't follow from the record before it: it is from another history"
    assert verified(five) == Bad(3, 3, why)
    # All of another history fits in itself, but not with what the head remembers.
    five.write_bytes(other.read_bytes())
    assert verified(five) == Bad(5, 5, "is not the record that the head remembers")


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "forge", "missing"])
def test_a_damaged_head_is_found_and_refused_at_start(
    five: Path, reopen: Open, change: str
) -> None:
    head = five.with_name("audit.head")
    good = head.read_bytes()
    if change == "missing":
        head.unlink()
        with pytest.raises(StoreError, match=r"can't read the audit log .*: No such file"):
            verified(five)
    else:
        head.write_bytes(
            {
                "flip": good[:30] + bytes([good[30] ^ 1]) + good[31:],
                "cut": good[:-10],
                "empty": b"",
                "forge": good.replace(b"5 ", b"4 ", 1),
            }[change]
        )
        bad = verified(five)
        assert bad is not None
        assert (bad.seq, bad.line) == (0, 0)
        assert "head file" in bad.why
    with pytest.raises(StoreError, match="damaged or was tampered with: the head file"):
        reopen()


def test_another_key_verifies_nothing_and_opens_nothing(five: Path, reopen: Open) -> None:
    assert verified(five, OTHER_KEY) is not None
    with pytest.raises(StoreError):
        reopen(OTHER_KEY)
    assert reopen().verify().ok


async def test_a_log_longer_than_what_start_reads_opens_and_its_middle_is_still_verified(
    reopen: Open, directory: Path
) -> None:
    log = reopen()
    for n in range(12):
        await log.append("x", n=n, filler="f" * 200_000)
    assert await reopen().append("x") == 13
    reopen().close()
    file = directory / "audit.jsonl"
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"n":1,', b'"n":7,'))
    log = reopen()  # the end is whole
    assert log.verify().first_bad == Bad(
        2, 2, "was changed, or is not signed with the key of this log"
    )
    log.close()
    # A flaw in the end is told with its line in the whole file.
    file.write_bytes(good.replace(b'"n":11,', b'"n":77,'))
    with pytest.raises(StoreError, match="line 12, record 12 was changed"):
        reopen()
    # A head from long ago is found again, however far back.
    file.write_bytes(good)
    assert reopen().verify().records == 13


# Crashes.


def test_an_unfinished_last_line_is_cut_off_and_that_is_recorded(five: Path, reopen: Open) -> None:
    whole = five.read_bytes()
    torn = b'{"seq":6,"at":"2026-01-01T00:0'
    five.write_bytes(whole + torn)
    assert verify_log(five.parent, KEY).ok  # as while a record is being written
    log = reopen()
    assert five.read_bytes().startswith(whole + b'{"seq":6,')
    (repaired,) = log.tail(1)
    assert (repaired["event"], repaired["dropped_bytes"]) == ("audit.repaired", len(torn))
    assert log.verify().records == 6
    assert reopen().verify().records == 6


@pytest.mark.parametrize("torn", [b"{", b'{"seq":6', bytes(4096), b'{"seq":6,"a' + bytes(100)])
def test_whatever_a_crash_can_leave_of_a_record_is_repaired(
    five: Path, reopen: Open, torn: bytes
) -> None:
    with five.open("ab") as file:
        file.write(torn)
    assert reopen().tail(1)[0]["dropped_bytes"] == len(torn)


@pytest.mark.parametrize("junk", [b"x", b'{"seq":7,', b'{"seq":5,"at', b"\0x", b"x" * (3 << 20)])
def test_an_unfinished_line_that_no_crash_can_leave_is_refused(
    five: Path, reopen: Open, junk: bytes
) -> None:
    with five.open("ab") as file:
        file.write(junk)
    assert verified(five) == Bad(6, 6, "is neither a record nor the beginning of one")
    with pytest.raises(StoreError, match="line 6, record 6 is neither"):
        reopen()
    assert five.read_bytes().endswith(junk)


def test_a_record_that_lost_its_end_after_it_was_promised_is_not_repaired(
    five: Path, reopen: Open
) -> None:
    whole = five.read_bytes()
    for cut in (1, 30, 200):
        five.write_bytes(whole[:-cut])
        assert verified(five) == Bad(5, 5, "is cut off, and the head remembers it whole")
        with pytest.raises(StoreError, match="line 5, record 5 is cut off"):
            reopen()
        assert five.read_bytes() == whole[:-cut]


async def test_records_that_the_head_does_not_know_yet_are_kept(
    reopen: Open, directory: Path
) -> None:
    """Killed after the sync and before the head was written."""
    log = reopen()
    await log.append("x")
    head = (directory / "audit.head").read_bytes()
    await log.append("y")
    log.close()
    (directory / "audit.head").write_bytes(head)
    assert [r["event"] for r in reopen().tail(5)] == ["x", "y"]
    assert (directory / "audit.head").read_bytes() != head


def test_a_log_whose_making_was_interrupted_is_made(directory: Path, reopen: Open) -> None:
    directory.mkdir(mode=0o700)
    (directory / "audit.jsonl").touch(mode=0o600)
    assert reopen().verify().ok


CHILD = """
import sys, trio
from pathlib import Path
from sandboxd.audit import AuditLog
log = AuditLog.open(Path(sys.argv[1]), bytes(range(32)))
"""


def test_killed_at_any_moment_every_promised_record_is_there(directory: Path, reopen: Open) -> None:
    code = """
async def appender():
    while True:
        print(await log.append("x", filler="f" * 3000), flush=True)
async def main():
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(appender)
trio.run(main)
"""
    for count in (1, 20, 50):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD + code, str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        try:
            promised = [process.stdout.readline() for _ in range(count)]
        finally:
            process.kill()
            promised += process.communicate(timeout=60)[0].splitlines(keepends=True)
        last = max(int(line) for line in promised if line.endswith("\n"))
        log = reopen()
        report = log.verify()
        assert report.ok
        assert report.records >= last
        log.close()


# When it can't be written.


async def test_a_failed_sync_fails_its_records_and_every_later_one(
    reopen: Open, syncs: Syncs, directory: Path
) -> None:
    log = reopen()
    await log.append("good")
    syncs.fails = True
    failures: list[str] = []

    async def append() -> None:
        with pytest.raises(
            StoreError, match=r"can't write the audit log .*: Input/output"
        ) as caught:
            await log.append("lost")
        failures.append(caught.value.hint)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(append)
    syncs.fails = False  # an fsync that works after one that failed proves nothing (fsync(2))
    await append()
    assert len(failures) == 6
    assert all("nothing runs without its record" in hint for hint in failures)
    assert [r["event"] for r in log.tail(5)] == ["good"]
    assert [r["event"] for r in reopen().tail(5)] == ["good"]
    assert directory.joinpath("audit.jsonl").read_bytes().count(b"lost") == 0


def test_a_full_disk_fails_appends_and_a_restart_with_room_goes_on(
    directory: Path, reopen: Open
) -> None:
    """RLIMIT_FSIZE makes write(2) short and then EFBIG, in the middle of a record."""
    code = """
async def main():
    for n in range(100):
        try:
            await log.append("x", filler="f" * 300)
        except Exception as error:
            print(n, type(error).__name__, error.message.rsplit(": ", 1)[1])
            break
    try:
        await log.append("x")
    except Exception as error:
        print(type(error).__name__)
trio.run(main)
"""
    limited = subprocess.run(
        [sys.executable, "-c", CHILD + code, str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )
    assert limited.stderr == ""
    first, second = limited.stdout.splitlines()
    count = int(first.split()[0])
    assert count > 1
    assert first.endswith("StoreError File too large")
    assert second == "StoreError"
    log = reopen()
    assert log.verify().records == count


@pytest.mark.parametrize("what", ["removed", "replaced", "written", "cut"])
async def test_a_log_pulled_away_from_under_the_daemon_fails_appends(
    reopen: Open, directory: Path, what: str
) -> None:
    log = reopen()
    await log.append("x")
    file = directory / "audit.jsonl"
    if what == "removed":
        file.unlink()
    elif what == "replaced":
        file.rename(directory / "audit.jsonl.1")  # as logrotate would
        file.touch(mode=0o600)
    elif what == "written":
        with file.open("ab") as other:
            other.write(b"x")
    else:
        os.truncate(file, 10)
    for _ in range(2):
        with pytest.raises(StoreError, match="can't write the audit log"):
            await log.append("y")


async def test_a_closed_log_takes_no_records(log: AuditLog) -> None:
    await log.append("x")
    log.close()
    log.close()
    with pytest.raises(StoreError, match="closed"):
        await log.append("y")
    with pytest.raises(StoreError):
        log.tail(1)
    with pytest.raises(StoreError):
        log.verify()


def test_a_second_process_or_object_is_kept_out(log: AuditLog, directory: Path) -> None:
    with pytest.raises(Conflict, match="another process has the audit log"):
        AuditLog.open(directory, KEY)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory)], capture_output=True, text=True, check=False
    )
    assert "Conflict" in done.stderr
    log.close()
    AuditLog.open(directory, KEY).close()


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.head"])
def test_files_open_to_others_or_linked_are_refused(five: Path, reopen: Open, name: str) -> None:
    file = five.parent / name
    file.chmod(0o640)
    with pytest.raises(Denied, match="has mode 0640"):
        reopen()
    file.rename(five.parent / "elsewhere")
    file.symlink_to("elsewhere")
    with pytest.raises(Denied, match="symbolic link"):
        reopen()


def test_a_directory_that_can_not_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "none" / "audit", tmp_path / "file" / "audit", tmp_path / "file"):
        with pytest.raises(StoreError, match="can't open the audit log"):
            AuditLog.open(directory, KEY)


async def test_a_field_that_would_forge_the_record_is_refused(log: AuditLog) -> None:
    for field in ("seq", "at", "prev", "mac"):
        with pytest.raises(Invalid, match=f"its own {field}"):
            await log.append("x", **{field: "forged"})
    with pytest.raises(Invalid, match="at most"):
        await log.append("x", filler="f" * (1 << 20))
    await log.append("x", text='","mac":"' + "0" * 64 + '"}\n\x1b[2J\u202e')
    assert log.verify().records == 1
    assert log.tail(1)[0]["text"].endswith("\u202e")
    raw = (log._directory / "audit.jsonl").read_bytes()
    assert raw.isascii()
    assert b"\x1b" not in raw


async def test_what_is_no_json_is_refused_and_breaks_nothing(log: AuditLog) -> None:
    for value in (Secret(b"hunter2"), b"hunter2", float("nan"), object()):
        with pytest.raises((TypeError, ValueError)) as caught:
            await log.append("x", value=value)  # type: ignore[arg-type]
        assert "hunter2" not in str(caught.value)
    assert await log.append("y") == 1
    assert log.verify().ok


def test_a_short_key_is_refused_and_a_secret_is_a_key(directory: Path) -> None:
    with pytest.raises(Invalid, match="at least 32 bytes"):
        AuditLog.open(directory, KEY[:31])
    assert not directory.exists()
    AuditLog.open(directory, Secret(KEY)).close()
    assert verify_log(directory, KEY).ok


def test_no_error_shows_the_key(five: Path, reopen: Open, tmp_path: Path) -> None:
    five.write_bytes(five.read_bytes()[:-30])
    shown = []
    for opened in (
        lambda: AuditLog.open(five.parent, b"hunter2-" * 4),
        lambda: AuditLog.open(tmp_path / "none" / "x", b"hunter2-" * 4),
        lambda: verify_log(tmp_path / "none", b"hunter2-" * 4),
    ):
        with pytest.raises(StoreError) as caught:
            opened()
        trace = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        shown += [repr(frame.locals) for frame in trace.stack if frame.filename != __file__]
        assert "hunter2" not in str(caught.value)
    assert len(shown) >= 4
    assert "hunter2" not in "".join(shown)


def test_no_descriptor_is_left_open_or_inherited(directory: Path) -> None:
    def open_files() -> list[int]:
        links = {fd: f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")}
        return [
            int(fd)
            for fd, link in links.items()
            if os.path.lexists(link) and os.readlink(link).startswith(str(directory))
        ]

    log = AuditLog.open(directory, KEY)
    assert len(open_files()) == 2
    assert not any(os.get_inheritable(fd) for fd in open_files())
    with pytest.raises(Conflict):
        AuditLog.open(directory, KEY)
    assert len(open_files()) == 2
    log.close()
    assert open_files() == []
