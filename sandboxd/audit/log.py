"""The audit log: one keyed hash chain, on disk before what it records happens.

A record is one line of JSON. It names the record before it (``prev``) and ends in an HMAC-SHA256
over everything before (``mac``), so a changed, removed, added or reordered line breaks the chain.
A head file remembers the last record, so that lines cut off the end are missed too. The head is
written after each fdatasync(2) of the log and never before: it may lag behind after a crash, never
lead. Somebody who puts back an older log together with its head is not noticed here.

What is to happen is recorded by :meth:`AuditLog.append`, which returns when the record is on disk.
What has happened, and can't be prevented any more, by :meth:`AuditLog.note`: it gets there with the
next one, or before :data:`LATEST` has passed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from sandboxd.audit.chain import (
    HEAD,
    LOG,
    MAX_RECORD,
    START,
    AuditReport,
    Mark,
    authenticate_end,
    head_line,
    sign,
    verify,
)
from sandboxd.audit.worker import Worker
from sandboxd.errors import Conflict, Invalid, StoreError
from sandboxd.files import fsync_directory, open_private, write_all
from sandboxd.secret import Secret

__all__ = ["JSON", "LATEST", "AuditLog"]

_logger = logging.getLogger(__name__)

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]

_OWN_FIELDS = frozenset({"seq", "at", "event", "prev", "mac"})
_KEY_SIZE = 32
#: Seconds that a noted record may wait for others before it is written for its own sake.
LATEST = 0.05

#: How far back records are looked for that only some are.
_SEARCHED = 256 << 20

_FLAGS = os.O_RDWR | os.O_CREAT


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
                log = open_private(directory / LOG, _FLAGS | os.O_APPEND, "the audit log")
                opened.callback(os.close, log)
                # No O_APPEND for the head: with it, pwrite(2) appends (BUGS there).
                head = open_private(directory / HEAD, _FLAGS, "the audit head")
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
        #: What is not known to be on disk, in order: what is being written, what waits for that.
        self._waiting: list[tuple[int, bytes]] = []
        self._wanted = 0  # up to this record somebody waits
        self._failure = ""
        self._worker = Worker("audit log")
        self._led = False  # a task waits for the worker, the others for that task
        self._others = trio.lowlevel.ParkingLot()
        self._noted = trio.Event()
        if os.fstat(log).st_size == 0 == os.fstat(head).st_size:
            os.pwrite(head, head_line(START, key), 0)
            os.fsync(head)
            fsync_directory(directory)
        self._durable, torn = authenticate_end(directory, log, head, key)
        self._next = self._writing = self._durable
        if torn:
            os.ftruncate(log, self._durable.size)
            self._wanted = self._enqueue("audit.repaired", {"dropped_bytes": torn})
            self._write_here()
            self._raise_failure()
        else:
            os.pwrite(head, head_line(self._durable, key), 0)

    async def append(self, event: str, **fields: JSON) -> int:
        """Add a record; gives its number. It is on disk when this returns.

        Concurrent appends share one fdatasync(2). Raises :class:`StoreError` when the record
        can't be written, and then for every later one: a log with a gap is worth nothing. Once
        begun it isn't cancelled.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        seq = self.start(event, **fields)
        await self.settle(seq)
        return seq

    def start(self, event: str, **fields: JSON) -> int:
        """Add a record and send it on its way; gives its number, to :meth:`settle` it.

        Raises as ``append`` does.
        """
        self._raise_failure()
        self._wanted = self._enqueue(event, fields)
        self._write()
        return self._wanted

    def note(self, event: str, **fields: JSON) -> int:
        """Add a record that need not be on disk yet; gives its number.

        It gets there with the next :meth:`append`, by :meth:`settle` or by :meth:`keep`. Raises as
        ``append`` does.
        """
        self._raise_failure()
        seq = self._enqueue(event, fields)
        self._noted.set()
        return seq

    async def settle(self, seq: int | None = None) -> None:
        """Return once record ``seq``, or all there are, is on disk. Raises StoreError.

        It isn't cancelled.
        """
        seq = self._next.seq if seq is None else seq
        self._wanted = max(self._wanted, seq)
        with trio.CancelScope(shield=True):
            while self._durable.seq < seq and not self._failure:
                self._write()
                if self._led:
                    await self._others.park()
                    continue
                self._led = True
                try:
                    await self._worker.wait()
                    self._written()
                    self._write()  # what came meanwhile need not wait for its task's turn
                finally:
                    self._led = False
                    self._others.unpark_all()
        if self._durable.seq < seq:
            self._raise_failure()

    async def keep(self) -> None:
        """See to it that noted records are on disk soon, until cancelled."""
        while True:
            await self._noted.wait()
            self._noted, seq = trio.Event(), self._next.seq
            await trio.sleep(LATEST)
            try:
                await self.settle(seq)
            except StoreError as error:
                _logger.error("%s", error.message)

    @property
    def last(self) -> int:
        """The number of the newest record that is on disk."""
        return self._durable.seq

    @property
    def newest(self) -> int:
        """The number of the newest record there is."""
        return self._next.seq

    def tail(
        self,
        n: int,
        *,
        after: int = -1,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
        having: bytes = b"",
    ) -> list[dict[str, Any]]:
        """The last ``n`` records, oldest first, those that are on their way to the disk included.

        With ``after`` only those behind the record of that number, which are counted when the log
        is read. With ``where`` those of them for which it is true; then it looks back
        :data:`_SEARCHED` bytes at most. ``having`` is text that each such record's line contains:
        others are not even parsed. Any thread may call it. Raises StoreError.
        """
        waiting = list(self._waiting)  # looked at first: what leaves it is in the file by then
        durable = self._durable
        start, end = durable.size, max(0, durable.size - _SEARCHED) if where is not None else 0
        found: list[dict[str, Any]] = []
        if after >= 0:
            n = min(n, max(durable.seq, waiting[-1][0] if waiting else 0) - after)

        def look(lines: Iterable[bytes]) -> None:
            for line in lines:
                if len(found) < n and line and having in line:
                    record = json.loads(line)
                    if where is None or where(record):
                        found.append(record)

        rest = b""  # of a line that begins further ahead
        with self._reading():
            look(line for seq, line in reversed(waiting) if seq > durable.seq)
            while start > end and len(found) < n:
                step = min(start, 1 << 16)
                start -= step
                lines = (os.pread(self._log, step, start) + rest).split(b"\n")
                rest = lines[0]
                look(reversed(lines[1:] if start else lines))
        return found[::-1]

    def verify(self) -> AuditReport:
        """Read everything and check every record. Any thread may call it, appends go on.

        Raises :class:`StoreError` when the files can't be read at all.
        """
        with self._reading():
            return verify(self._log, self._head, self._key)

    def close(self) -> None:
        """Write what waits and close the files; later appends raise StoreError."""
        if self._log >= 0:
            self._worker.close()
            self._written()
            self._wanted = self._next.seq
            self._write_here()
            self._failure = self._failure or "the audit log is closed"
            self._waiting.clear()
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
        if len(body) > MAX_RECORD:
            raise Invalid(f"an audit record has at most {MAX_RECORD:,} bytes")
        mac = sign(self._key, body)
        line = body + b',"mac":"' + mac.hex().encode() + b'"}\n'
        self._waiting.append((seq, line))
        self._next = Mark(seq, mac, self._next.size + len(line))
        return seq

    def _write(self) -> None:
        """Have the worker write all that waits, if somebody wants it and it is idle."""
        if self._durable.seq < self._wanted and not self._worker.busy and not self._failure:
            self._worker.start(*self._order())

    def _write_here(self) -> None:
        """The same without the worker, where nothing else runs."""
        if self._durable.seq < self._wanted and not self._failure:
            for action in self._order():
                action()
            self._written()

    def _order(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """What writes all that waits, syncs once, and then the head. Failing is for good.

        Only what may wait for the disk is left to be done in a thread: at each system call there
        it has to wait for the event loop's thread as well.
        """
        mark = self._writing = self._next
        batch = b"".join(line for _, line in self._waiting)
        head = head_line(mark, self._key)
        try:
            self._check_place()
        except OSError as error:
            self._fail(error)

        def write() -> None:
            if self._failure:
                return
            try:
                write_all(self._log, batch)
                os.fdatasync(self._log)
            except BaseException as error:  # noqa: BLE001 - told to all who wait for it
                with contextlib.suppress(OSError):  # nobody was told that these are recorded
                    os.ftruncate(self._log, self._durable.size)
                self._fail(error)

        def remember() -> None:
            if not self._failure:
                try:
                    os.pwrite(self._head, head, 0)
                except BaseException as error:  # noqa: BLE001 - told to whoever comes next
                    self._fail(error)

        return write, remember

    def _written(self) -> None:
        """The worker has ended what it was told to write."""
        if self._failure:
            self._waiting.clear()
        elif self._durable.seq < self._writing.seq:
            count = self._writing.seq - self._durable.seq
            self._durable = self._writing
            del self._waiting[:count]

    def _fail(self, error: BaseException) -> None:
        why = error.strerror if isinstance(error, OSError) else "internal error"
        self._failure = f"can't write the audit log {self._directory}: {why}"

    def _check_place(self) -> None:
        """The open files are still the named ones and end where we left off."""
        for fd, name in ((self._log, LOG), (self._head, HEAD)):
            ours, named = os.fstat(fd), os.lstat(f"{self._directory}/{name}")
            if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
                raise OSError(errno.ESTALE, f"{name} was replaced by another file")
            if fd == self._log and ours.st_size != self._durable.size:
                raise OSError(errno.ESTALE, f"somebody else wrote to {LOG}")

    def _raise_failure(self) -> None:
        if self._failure:
            raise StoreError(
                self._failure,
                hint="nothing runs without its record: make room or repair the disk, "
                "then restart sandboxd",
            )


def _utc(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(mode=0o700)
        fsync_directory(path.parent)
