"""The audit log: one keyed hash chain, on disk before what it records happens.

A record is one line of JSON. It names the record before it (``prev``) and ends in an HMAC-SHA256
over everything before (``mac``), so a changed, removed, added or reordered line breaks the chain.
A head file remembers the last record, so that lines cut off the end are missed too. The head is
written after each fdatasync(2) of the log and never before: it may lag behind after a crash, never
lead. Somebody who puts back an older log together with its head is not noticed here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from sandboxd.errors import Conflict, Invalid, StoreError
from sandboxd.files import fsync_directory, open_private, write_all
from sandboxd.secret import Secret

__all__ = ["AuditLog", "AuditReport", "Bad", "verify_log"]

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]

_LOG, _HEAD = "audit.jsonl", "audit.head"
_OWN_FIELDS = frozenset({"seq", "at", "event", "prev", "mac"})
_MAX_RECORD = 1 << 20
_KEY_SIZE = 32
#: How much of the end is authenticated at start; all of it is, when the head lies before that.
_TAIL = 1 << 20
#: How far back records are looked for that only some are.
_SEARCHED = 256 << 20

_LINE = re.compile(rb'(\{.*),"mac":"([0-9a-f]{64})"\}', re.DOTALL)
_HEAD_LINE = re.compile(rb"sandboxd-audit-1 ([0-9]{20}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
_BAD_HEAD = "the head file is missing, damaged or not signed with the key of this log"
_EVIDENCE = "keep the files as evidence; move the audit directory away to start a new log"
_FLAGS = os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Bad:
    """The first thing wrong: the record's number, its line (1-based) and what is wrong."""

    seq: int
    line: int
    why: str


@dataclass(frozen=True)
class AuditReport:
    """What verification found; ``records`` counts those before the first bad one."""

    ok: bool
    records: int
    first_bad: Bad | None = None

    @property
    def problem(self) -> str:
        """The same for people; "" when all is well."""
        return _told(self.first_bad)


@dataclass(frozen=True)
class _Mark:
    """A place in the chain: the record's number and mac, and where its line ends."""

    seq: int
    mac: bytes
    size: int


_START = _Mark(0, bytes(32), 0)


class AuditLog:
    """Append records and read them back. One per directory; a lock keeps other processes out."""

    @classmethod
    def open(
        cls, directory: Path, key: bytes | Secret, clock: Callable[[], float] = time.time
    ) -> AuditLog:
        """The log in ``directory``, made when there is none, its end authenticated.

        A last line that a crash left unfinished is cut off, and a record ``audit.repaired`` says
        so. Raises :class:`StoreError` when anything else is wrong or the log can't be written,
        :class:`Denied` when its files aren't private, :class:`Conflict` when another process has
        it open.
        """
        secret = key if isinstance(key, Secret) else Secret(key)
        del key  # a traceback that shows locals must not show it
        if len(secret) < _KEY_SIZE:
            raise Invalid(f"an audit key has at least {_KEY_SIZE} bytes")
        with contextlib.ExitStack() as opened:
            try:
                _make_directory(directory)
                log = open_private(directory / _LOG, _FLAGS | os.O_APPEND, "the audit log")
                opened.callback(os.close, log)
                # No O_APPEND for the head: with it, pwrite(2) appends (BUGS there).
                head = open_private(directory / _HEAD, _FLAGS, "the audit head")
                opened.callback(os.close, head)
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                audit = cls(directory, secret, clock, log, head)
                opened.pop_all()
                return audit
            except BlockingIOError:
                raise Conflict(
                    f"another process has the audit log {directory} open",
                    hint="stop the other sandboxd, or give this one its own state directory",
                ) from None
            except OSError as error:
                raise StoreError(
                    f"can't open the audit log {directory}: {error.strerror}",
                    hint="sandboxd must be able to write there",
                ) from None

    def __init__(
        self, directory: Path, key: Secret, clock: Callable[[], float], log: int, head: int
    ) -> None:
        self._directory, self._key, self._clock = directory, key, clock
        self._log, self._head = log, head
        self._pending: list[bytes] = []
        self._failure = ""
        self._turn = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)  # never queued behind other threads
        if os.fstat(log).st_size == 0 == os.fstat(head).st_size:
            os.pwrite(head, _head_line(_START, key), 0)
            os.fsync(head)
            fsync_directory(directory)
        self._durable, torn = _authenticate_end(directory, log, head, key)
        self._next = self._durable
        if torn:
            os.ftruncate(log, self._durable.size)
            self._enqueue("audit.repaired", {"dropped_bytes": torn})
            self._flush(*self._batch())
            self._raise_failure()
        else:
            os.pwrite(head, _head_line(self._durable, key), 0)

    async def append(self, event: str, **fields: JSON) -> int:
        """Add a record; gives its number. It is on disk when this returns.

        Concurrent appends share one fdatasync(2). Raises :class:`StoreError` when the record
        can't be written, and then for every later one: a log with a gap is worth nothing. Once
        begun it isn't cancelled.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._raise_failure()
        seq = self._enqueue(event, fields)
        await self.settle(seq)
        return seq

    def note(self, event: str, **fields: JSON) -> int:
        """Add a record that need not be on disk yet; gives its number.

        It gets there with the next :meth:`append`, or by :meth:`settle`. Raises as ``append`` does.
        """
        self._raise_failure()
        return self._enqueue(event, fields)

    async def settle(self, seq: int) -> None:
        """Return once record ``seq`` is on disk. Raises StoreError, and isn't cancelled."""
        with trio.CancelScope(shield=True):
            async with self._turn:
                if self._durable.seq < seq and not self._failure:
                    batch, mark = self._batch()
                    await trio.to_thread.run_sync(self._flush, batch, mark, limiter=self._limiter)
        if self._durable.seq < seq:
            self._raise_failure()

    @property
    def last(self) -> int:
        """The number of the newest record that is on disk."""
        return self._durable.seq

    def tail(
        self,
        n: int,
        *,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
        having: bytes = b"",
    ) -> list[dict[str, Any]]:
        """The last ``n`` records, oldest first. Any thread may call it. Raises StoreError.

        With ``where`` those of them for which it is true; then it looks back :data:`_SEARCHED`
        bytes at most. ``having`` is text that each such record's line contains: others are not
        even parsed.
        """
        start = self._durable.size
        end = max(0, start - _SEARCHED) if where is not None else 0
        found: list[dict[str, Any]] = []
        rest = b""  # of a line that begins further ahead
        with self._reading():
            while start > end and len(found) < n:
                step = min(start, 1 << 16)
                start -= step
                lines = (os.pread(self._log, step, start) + rest).split(b"\n")
                rest = lines[0]
                for line in reversed(lines[1:] if start else lines):
                    if len(found) < n and line and having in line:
                        record = json.loads(line)
                        if where is None or where(record):
                            found.append(record)
        return found[::-1]

    def verify(self) -> AuditReport:
        """Read everything and check every record. Any thread may call it, appends go on.

        Raises :class:`StoreError` when the files can't be read at all.
        """
        with self._reading():
            return _verify(self._log, self._head, self._key)

    def close(self) -> None:
        """Close the files; later appends raise StoreError."""
        if self._log >= 0:
            self._failure = self._failure or "the audit log is closed"
            with contextlib.suppress(OSError):
                os.fsync(self._head)
            os.close(self._log)
            os.close(self._head)
            self._log = self._head = -1

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
            return
        except OSError as error:
            problem = f"can't be read: {error.strerror}"
        except ValueError:
            problem = "holds a line that is not JSON"
        raise StoreError(f"the audit log {self._directory} {problem}")

    def _enqueue(self, event: str, fields: Mapping[str, JSON]) -> int:
        """Chain a record to the last one. No await in here: the order is the order of calls."""
        own = _OWN_FIELDS.intersection(fields)
        if own:
            raise Invalid(f"an audit record has its own {', '.join(sorted(own))}")
        seq = self._next.seq + 1
        record = {"seq": seq, "at": _utc(self._clock()), "event": event}
        record |= {**fields, "prev": self._next.mac.hex()}
        # ASCII only: neither a terminal nor another program can be steered by a record.
        body = json.dumps(record, separators=(",", ":"), allow_nan=False)[:-1].encode()
        if len(body) > _MAX_RECORD:
            raise Invalid(f"an audit record has at most {_MAX_RECORD:,} bytes")
        mac = _mac(self._key, body)
        line = body + b',"mac":"' + mac.hex().encode() + b'"}\n'
        self._pending.append(line)
        self._next = _Mark(seq, mac, self._next.size + len(line))
        return seq

    def _batch(self) -> tuple[bytes, _Mark]:
        """Everything pending and where it ends. Records from here on wait for the next turn."""
        lines, self._pending = self._pending, []
        return b"".join(lines), self._next

    def _flush(self, batch: bytes, mark: _Mark) -> None:
        """Write and sync once. Runs in a thread; failing is for good."""
        try:
            self._check_place()
            write_all(self._log, batch)
            os.fdatasync(self._log)
            self._durable = mark
            os.pwrite(self._head, _head_line(mark, self._key), 0)
        except OSError as error:
            self._failure = f"can't write the audit log {self._directory}: {error.strerror}"
            with contextlib.suppress(OSError):  # nobody was told that these are recorded
                os.ftruncate(self._log, self._durable.size)
        except BaseException:
            self._failure = f"can't write the audit log {self._directory}: internal error"
            raise

    def _check_place(self) -> None:
        """The open files are still the named ones and end where we left off."""
        for fd, name in ((self._log, _LOG), (self._head, _HEAD)):
            ours, named = os.fstat(fd), os.lstat(f"{self._directory}/{name}")
            if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
                raise OSError(errno.ESTALE, f"{name} was replaced by another file")
        if os.fstat(self._log).st_size != self._durable.size:
            raise OSError(errno.ESTALE, f"somebody else wrote to {_LOG}")

    def _raise_failure(self) -> None:
        if self._failure:
            raise StoreError(
                self._failure,
                hint="nothing runs without its record: make room or repair the disk, "
                "then restart sandboxd",
            )


def verify_log(directory: Path, key: bytes | Secret) -> AuditReport:
    """Check every record of a log that need not be open, and of one that :class:`AuditLog` refuses.

    Raises :class:`StoreError` when its files can't be read and :class:`Denied` when they aren't
    private.
    """
    secret = key if isinstance(key, Secret) else Secret(key)
    del key
    fds: list[int] = []
    try:
        for name in (_LOG, _HEAD):
            fds.append(open_private(directory / name, os.O_RDONLY, "the audit file"))
        return _verify(fds[0], fds[1], secret)
    except OSError as error:
        raise StoreError(
            f"can't read the audit log {directory}: {error.strerror} ({error.filename})"
        ) from None
    finally:
        for fd in fds:
            os.close(fd)


class _Chain:
    """Walks the records in order. ``mark`` is the last good one, ``line`` counts them."""

    def __init__(self, key: Secret, start: int) -> None:
        """From byte ``start``; elsewhere than at 0 the first record's past can't be checked."""
        self._key, self._past_known = key, start == 0
        self.mark, self.line = _Mark(0, _START.mac, start), 0
        self.first = 0

    def step(self, line: bytes) -> str:
        """Why this can't be the next record; "" if it is, and then it is the last good one."""
        found = _LINE.fullmatch(line)
        if found is None:
            return "is not a signed record"
        body, mac = found[1], bytes.fromhex(found[2].decode())
        if not hmac.compare_digest(mac, _mac(self._key, body)):
            return "was changed, or is not signed with the key of this log"
        record = json.loads(body + b"}")
        seq = record["seq"]
        if self._past_known and seq != self.mark.seq + 1:
            return f"is record {seq}: records were removed, repeated or reordered"
        if self._past_known and record["prev"] != self.mark.mac.hex():
            return "doesn't follow from the record before it: it is from another history"
        self._past_known = True
        self.line += 1
        self.first = self.first or seq
        self.mark = _Mark(seq, mac, self.mark.size + len(line) + 1)
        return ""

    def walk(self, log: int, remembered: _Mark) -> tuple[Bad | None, int]:
        """Step to the end: the first bad record, and the bytes of an unfinished last line."""
        for line, finished in _lines(log, self.mark.size):
            if finished:
                why = self.step(line)
            elif self.mark.seq < remembered.seq:
                why = "is cut off, and the head remembers it whole"
            elif _is_begun(line, self.mark.seq + 1):
                return None, len(line)
            else:
                why = "is neither a record nor the beginning of one"
            if why:
                return Bad(self.mark.seq + 1, self.line + 1, why), 0
            if self.mark.seq == remembered.seq and self.mark.mac != remembered.mac:
                why = "is not the record that the head remembers"
                return Bad(self.mark.seq, self.line, why), 0
        if self.mark.seq < remembered.seq:
            why = f"is missing: the head remembers {remembered.seq} records, the end was cut off"
            return Bad(self.mark.seq + 1, self.line + 1, why), 0
        return None, 0


def _verify(log: int, head: int, key: Secret) -> AuditReport:
    """Walk the whole log. The head is read first: from then on it can only be behind."""
    remembered = _read_head(head, key)
    chain = _Chain(key, 0)
    bad, _ = chain.walk(log, remembered or _START)
    if bad is None and remembered is None:
        bad = Bad(0, 0, _BAD_HEAD)
    return AuditReport(bad is None, chain.line, bad)


def _authenticate_end(directory: Path, log: int, head: int, key: Secret) -> tuple[_Mark, int]:
    """The last record, and how many bytes after it are an unfinished line. Raises StoreError."""
    remembered = _read_head(head, key)
    if remembered is None:
        bad: Bad | None = Bad(0, 0, _BAD_HEAD)
    else:
        chain = _Chain(key, _line_start(log, os.fstat(log).st_size - _TAIL))
        bad, torn = chain.walk(log, remembered)
        if bad is not None or chain.first > remembered.seq:
            chain = _Chain(key, 0)  # from the start, to tell the line, or to reach the head's
            bad, torn = chain.walk(log, remembered)
        if bad is None:
            return chain.mark, torn
    raise StoreError(
        f"the audit log {directory} is damaged or was tampered with: {_told(bad)}", hint=_EVIDENCE
    )


def _is_begun(line: bytes, seq: int) -> bool:
    """Whether a crash can have left this of the record: its beginning, or a hole never filled."""
    begin = b'{"seq":%d,' % seq
    written = line.rstrip(b"\0")
    return written.startswith(begin) or begin.startswith(written)


def _lines(fd: int, offset: int) -> Iterator[tuple[bytes, bool]]:
    """Each line from ``offset`` on without its line feed, and whether it had one."""
    rest = b""
    while block := os.pread(fd, 1 << 18, offset):
        offset += len(block)
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line, True
        if len(rest) > 2 * _MAX_RECORD:
            break  # no record of ours
    if rest:
        yield rest, False


def _line_start(fd: int, offset: int) -> int:
    """Where the first line after ``offset`` starts; 0 when there is none."""
    if offset <= 0:
        return 0
    place = os.pread(fd, 2 * _MAX_RECORD, offset).find(b"\n")
    return offset + place + 1 if place >= 0 else 0


def _read_head(fd: int, key: Secret) -> _Mark | None:
    """What the head remembers; None when it isn't ours."""
    found = _HEAD_LINE.fullmatch(os.pread(fd, 512, 0))
    if found is None:
        return None
    mark = _Mark(int(found[1]), bytes.fromhex(found[2].decode()), 0)
    return mark if hmac.compare_digest(_head_line(mark, key), found[0]) else None


def _head_line(mark: _Mark, key: Secret) -> bytes:
    """Always the same length, within one disk sector, so that a crash can't tear it."""
    text = f"sandboxd-audit-1 {mark.seq:020} {mark.mac.hex()}"
    return f"{text} {_mac(key, text.encode()).hex()}\n".encode()


def _mac(key: Secret, text: bytes) -> bytes:
    return hmac.digest(key.reveal(), text, "sha256")


def _told(bad: Bad | None) -> str:
    if bad is None:
        return ""
    return f"line {bad.line}, record {bad.seq} {bad.why}" if bad.line else bad.why


def _utc(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(mode=0o700)
        fsync_directory(path.parent)
