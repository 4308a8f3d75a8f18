"""Files of a live session's workspace, for whoever runs the session.

Each operation is done by :mod:`sandboxd.sessions.fileops` in a sandbox of its own, as the
workspace's owner: what it writes belongs to whom the agent's own files belong to. A copy-on-write
session's operations see and change its own view. They are part of the session: none outlives it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from sandboxd.audit import JSON, AuditLog
from sandboxd.errors import Conflict, Denied, Invalid, NotFound, SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher
from sandboxd.isolation.overlay import MERGED
from sandboxd.isolation.uids import UidPool
from sandboxd.isolation.wire import MountSpec
from sandboxd.names import shown
from sandboxd.sessions.fileops import WORKSPACE
from sandboxd.sessions.helper import ask
from sandboxd.sessions.session import Session

__all__ = ["MAX_BYTES", "MAX_FILES", "MAX_LISTED", "Content", "Files", "NewFile", "plain_path"]

T = TypeVar("T")

#: Bytes that one request reads, or writes altogether.
MAX_BYTES = 8 << 20
#: Files that one request writes.
MAX_FILES = 256
#: Directories within directories that one listing goes into.
MAX_LISTED = 32

#: Seconds for one operation, and bytes of what it answers.
_PATIENCE = 60.0
_MAX_ANSWER = 24 << 20
_MEMORY = 256 << 20
#: Operations of all sessions at once, and of one.
_AT_ONCE, _OF_ONE = 8, 2
#: Bytes of a path, and of one name in it (limits.h).
_MAX_PATH, _MAX_NAME = 4095, 255
#: Paths that an audit record names.
_TOLD_PATHS = 50

_READING = frozenset(("read", "list", "info", "exists"))

_ERRORS: dict[str, type[SandboxdError]] = {
    "not_found": NotFound,
    "denied": Denied,
    "invalid": Invalid,
    "conflict": Conflict,
}


@dataclass(frozen=True)
class NewFile:
    """A file to write: ``mode`` None keeps that of the file it replaces, or is 0644."""

    path: str
    data: bytes
    mode: int | None = None


@dataclass(frozen=True)
class Content:
    """A whole file, and its entry as :meth:`Files.info` gives it."""

    data: bytes
    entry: dict[str, Any]


class Files:
    """The workspaces of all live sessions.

    Paths are relative to the workspace, or absolute as the agent sees them (/workspace/...). No
    path goes through a symbolic link. Every method raises Invalid for a path that leads out,
    NotFound where there is nothing, or no workspace, Denied for links, foreign files and
    read-only workspaces, Conflict for what stands in the way and for a session that isn't
    running, Unavailable when the work can't be done to its end.
    """

    def __init__(self, *, launcher: Launcher, uids: UidPool, audit: AuditLog) -> None:
        self._launcher, self._uids, self._audit = launcher, uids, audit
        self._all = trio.CapacityLimiter(_AT_ONCE)
        self._of: dict[str, tuple[trio.CapacityLimiter, int]] = {}

    async def read(self, session: Session, path: str, *, by: str) -> Content:
        """A whole file of at most MAX_BYTES."""
        plain = plain_path(path)
        await self._record(session, "read", [plain], by)
        answer = await self._do(session, op="read", path=plain, limit=MAX_BYTES)
        data = base64.b64decode(answer.pop("content"))
        return Content(data, answer)

    async def write(self, session: Session, files: Sequence[NewFile], *, by: str) -> int:
        """Write each file whole or not at all, in order, with the directories it needs.

        Returns how many. At most MAX_FILES with MAX_BYTES altogether.
        """
        if not 0 < len(files) <= MAX_FILES:
            raise Invalid(f"one request writes 1 to {MAX_FILES} files, not {len(files)}")
        if sum(len(file.data) for file in files) > MAX_BYTES:
            raise Invalid(
                f"one request writes at most {MAX_BYTES:,} bytes", hint="use several requests"
            )
        rows = [
            {
                "path": _below(plain_path(file.path)),
                "content": base64.b64encode(file.data).decode("ascii"),
                "mode": file.mode,
            }
            for file in files
        ]
        if any(file.mode is not None and not 0 <= file.mode <= 0o777 for file in files):
            raise Invalid("a file's mode is from 0 to 0o777")
        paths = [str(row["path"]) for row in rows]
        self._writable(session)
        await self._record(session, "write", paths, by)
        answer = await self._do(session, op="write", path=paths[0], files=rows)
        return int(answer["written"])

    async def remove(self, session: Session, path: str, *, recursive: bool, by: str) -> int:
        """Remove a file, a link or a directory; how many entries that were.

        Without ``recursive`` a directory must be empty.
        """
        plain = _below(plain_path(path))
        self._writable(session)
        await self._record(session, "remove", [plain], by)
        answer = await self._do(session, op="remove", path=plain, recursive=recursive)
        return int(answer["removed"])

    async def list(self, session: Session, path: str, *, depth: int = 1) -> dict[str, Any]:
        """``{"entries": [...], "truncated": bool}``: what a directory holds, ``depth`` levels."""
        if not 1 <= depth <= MAX_LISTED:
            raise Invalid(f"a listing goes 1 to {MAX_LISTED} directories deep")
        return await self._do(session, op="list", path=plain_path(path), depth=depth)

    async def info(self, session: Session, path: str) -> dict[str, Any]:
        """One entry: path, name, type, size, mode, modified, a link's target. Follows no link."""
        return await self._do(session, op="info", path=plain_path(path))

    async def exists(self, session: Session, path: str) -> bool:
        """Whether something is there, be it a link that leads nowhere."""
        return bool((await self._do(session, op="exists", path=plain_path(path)))["exists"])

    async def mkdir(self, session: Session, path: str, *, by: str) -> bool:
        """Make a directory and those above it; False if it is there already."""
        plain = _below(plain_path(path))
        self._writable(session)
        await self._record(session, "mkdir", [plain], by)
        return bool((await self._do(session, op="mkdir", path=plain))["created"])

    async def rename(
        self, session: Session, old: str, new: str, *, overwrite: bool, by: str
    ) -> None:
        """Give a file, link or directory another path. Replaces a file only if ``overwrite``."""
        path, target = _below(plain_path(old)), _below(plain_path(new))
        self._writable(session)
        await self._record(session, "rename", [path, target], by)
        await self._do(session, op="rename", path=path, new=target, overwrite=overwrite)

    async def _record(self, session: Session, op: str, paths: Sequence[str], by: str) -> None:
        told: list[JSON] = [shown(path) for path in paths[:_TOLD_PATHS]]
        await self._audit.append(
            "session.files",
            **session.about,
            by=by,
            op=op,
            paths=told,
            more_paths=max(0, len(paths) - _TOLD_PATHS),
        )

    def _workspace(self, session: Session) -> None:
        if session.workspace is None:
            raise NotFound(
                f"session {session.id} has no workspace",
                hint="its policy or its agent's file says: workspace: none",
            )

    def _writable(self, session: Session) -> None:
        self._workspace(session)
        if session.terms.workspace == "ro":
            raise Denied(
                "the workspace of this session is read-only",
                rule="workspace: ro",
                hint="the agent's file and its policy say so; see docs/configuration.md",
            )

    async def _do(self, session: Session, **request: Any) -> dict[str, Any]:
        self._workspace(session)
        answer = await _within(session, lambda: self._ask(session, request))
        if "code" not in answer:
            return answer
        done = answer["done"]
        before = f" ({done} files before it were written)" if done else ""
        path = f"{WORKSPACE}/{answer['path']}".rstrip("/")
        raise _ERRORS[answer["code"]](f"{shown(path)} {answer['why']}{before}")

    async def _ask(self, session: Session, request: dict[str, Any]) -> dict[str, Any]:
        readonly = session.terms.workspace == "ro" or request["op"] in _READING
        async with self._turn(session.id), self._all:
            if session.overlay >= 0:
                # overlayfs has no id-mapped mounts: who shares its files has to share its uid.
                mount = MountSpec(MERGED, WORKSPACE, readonly=readonly, shared=True)
                return await self._run(request, mount, session.uid, session.overlay)
            mount = MountSpec(str(session.workspace), WORKSPACE, readonly=readonly, idmap=True)
            with self._uids.lease() as uid:
                return await self._run(request, mount, uid, None)

    async def _run(
        self, request: dict[str, Any], mount: MountSpec, uid: int, namespace: int | None
    ) -> dict[str, Any]:
        answer = await ask(
            self._launcher,
            "fileops",
            json.dumps(request).encode(),
            mounts=(mount,),
            uid=uid,
            namespace=namespace,
            patience=_PATIENCE,
            max_answer=_MAX_ANSWER,
            memory=_MEMORY,
        )
        if answer is None:
            raise Unavailable(
                "the files could not be read or written to the end",
                hint="what is there may be too much for the memory and time of one request",
            )
        return answer

    @asynccontextmanager
    async def _turn(self, session: str) -> AsyncIterator[None]:
        """One session's operations don't keep those of others waiting."""
        limiter, users = self._of.get(session) or (trio.CapacityLimiter(_OF_ONE), 0)
        self._of[session] = limiter, users + 1
        try:
            async with limiter:
                yield
        finally:
            limiter, users = self._of[session]
            if users == 1:
                del self._of[session]
            else:
                self._of[session] = limiter, users - 1


def plain_path(path: str) -> str:
    """``path`` relative to the workspace, "" for the workspace itself. Invalid if it leads out.

    A path that begins with / is one that the agent sees: it must be below /workspace.
    """
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise Invalid("a path is UTF-8") from None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/"):
        if parts[:1] != [WORKSPACE.strip("/")]:
            raise Invalid(
                f"{shown(path)} is not in the workspace",
                hint=f"paths are relative to {WORKSPACE}, or begin with it",
            )
        parts = parts[1:]
    if "\0" in path or ".." in parts:
        raise Invalid("a path has neither '..' nor a NUL byte in it")
    if size > _MAX_PATH or any(len(part.encode()) > _MAX_NAME for part in parts):
        raise Invalid(f"a path has at most {_MAX_PATH} bytes, and a name in it {_MAX_NAME}")
    return "/".join(parts)


def _below(plain: str) -> str:
    if not plain:
        raise Invalid("that is the workspace itself", hint="name something in it")
    return plain


async def _within(session: Session, work: Callable[[], Awaitable[T]]) -> T:
    """Do ``work`` as part of the session: cancelled, and waited for, when either side ends."""
    if session.tasks is None:
        raise Conflict(
            f"session {session.id} is not running", hint="see: sandboxctl session list --all"
        )
    scope, done = trio.CancelScope(), trio.Event()
    results: list[T] = []
    failures: list[Exception] = []

    async def job() -> None:
        try:
            with scope:
                results.append(await work())
        except Exception as failure:  # noqa: BLE001 - its asker's, not the session's
            failures.append(failure)
        finally:
            done.set()

    session.tasks.start_soon(job)
    try:
        await done.wait()
    except trio.Cancelled:
        scope.cancel()
        with trio.CancelScope(shield=True):
            await done.wait()
        raise
    if failures:
        raise failures[0]
    if not results:
        raise Conflict(f"session {session.id} ended while this was under way")
    return results[0]
