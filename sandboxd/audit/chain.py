"""The chain of an audit log: how records are signed, and what is wrong with those that are there.

Everything here is of the files alone, whether a daemon has them open or not.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import StoreError
from sandboxd.files import open_private
from sandboxd.secret import Secret

__all__ = [
    "HEAD",
    "LOG",
    "MAX_RECORD",
    "START",
    "AuditReport",
    "Bad",
    "Mark",
    "authenticate_end",
    "head_line",
    "sign",
    "verify",
    "verify_log",
]

LOG, HEAD = "audit.jsonl", "audit.head"
MAX_RECORD = 1 << 20
#: How much of the end is authenticated at start; all of it is, when the head lies before that.
_TAIL = 1 << 20

_LINE = re.compile(rb'(\{.*),"mac":"([0-9a-f]{64})"\}', re.DOTALL)
_HEAD_LINE = re.compile(rb"sandboxd-audit-1 ([0-9]{20}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
_BAD_HEAD = "the head file is missing, damaged or not signed with the key of this log"
_EVIDENCE = "keep the files as evidence; move the audit directory away to start a new log"


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
class Mark:
    """A place in the chain: the record's number and mac, and where its line ends."""

    seq: int
    mac: bytes
    size: int


START = Mark(0, bytes(32), 0)


def verify_log(directory: Path, key: bytes | Secret) -> AuditReport:
    """Check every record of a log that need not be open, and of one that :class:`AuditLog` refuses.

    Raises :class:`StoreError` when its files can't be read and :class:`Denied` when they aren't
    private.
    """
    secret = key if isinstance(key, Secret) else Secret(key)
    del key
    fds: list[int] = []
    try:
        for name in (LOG, HEAD):
            fds.append(open_private(directory / name, os.O_RDONLY, "the audit file"))
        return verify(fds[0], fds[1], secret)
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
        self.mark, self.line = Mark(0, START.mac, start), 0
        self.first = 0

    def step(self, line: bytes) -> str:
        """Why this can't be the next record; "" if it is, and then it is the last good one."""
        found = _LINE.fullmatch(line)
        if found is None:
            return "is not a signed record"
        body, mac = found[1], bytes.fromhex(found[2].decode())
        if not hmac.compare_digest(mac, sign(self._key, body)):
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
        self.mark = Mark(seq, mac, self.mark.size + len(line) + 1)
        return ""

    def walk(self, log: int, remembered: Mark) -> tuple[Bad | None, int]:
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


def verify(log: int, head: int, key: Secret) -> AuditReport:
    """Walk the whole log. The head is read first: from then on it can only be behind."""
    remembered = _read_head(head, key)
    chain = _Chain(key, 0)
    bad, _ = chain.walk(log, remembered or START)
    if bad is None and remembered is None:
        bad = Bad(0, 0, _BAD_HEAD)
    return AuditReport(bad is None, chain.line, bad)


def authenticate_end(directory: Path, log: int, head: int, key: Secret) -> tuple[Mark, int]:
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
        if len(rest) > 2 * MAX_RECORD:
            break  # no record of ours
    if rest:
        yield rest, False


def _line_start(fd: int, offset: int) -> int:
    """Where the first line after ``offset`` starts; 0 when there is none."""
    if offset <= 0:
        return 0
    place = os.pread(fd, 2 * MAX_RECORD, offset).find(b"\n")
    return offset + place + 1 if place >= 0 else 0


def _read_head(fd: int, key: Secret) -> Mark | None:
    """What the head remembers; None when it isn't ours."""
    found = _HEAD_LINE.fullmatch(os.pread(fd, 512, 0))
    if found is None:
        return None
    mark = Mark(int(found[1]), bytes.fromhex(found[2].decode()), 0)
    return mark if hmac.compare_digest(head_line(mark, key), found[0]) else None


def head_line(mark: Mark, key: Secret) -> bytes:
    """Always the same length, within one disk sector, so that a crash can't tear it."""
    text = f"sandboxd-audit-1 {mark.seq:020} {mark.mac.hex()}"
    return f"{text} {sign(key, text.encode()).hex()}\n".encode()


def sign(key: Secret, text: bytes) -> bytes:
    return hmac.digest(key.reveal(), text, "sha256")


def _told(bad: Bad | None) -> str:
    if bad is None:
        return ""
    return f"line {bad.line}, record {bad.seq} {bad.why}" if bad.line else bad.why
