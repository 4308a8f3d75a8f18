"""What agents changed in copy-on-write workspaces: kept, reviewed, applied, discarded.

A session whose workspace is an overlay sees the workspace and writes to layers of its own:
directories below the daemon's state, or memory where a quota must hold. The layers belong to the
broker's user on disk whoever the sandbox runs as (id-mapped mounts), so the broker can move and
remove them. It never reads what is in them: that is done by :mod:`sandboxd.sessions.landing`, in
a sandbox.

Layers of a session live from its start until everything in them was applied, or they are
discarded. Those in memory are copied to disk when the session ends; a daemon that is killed
loses them, and says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import trio

from sandboxd.audit import JSON, AuditLog
from sandboxd.errors import Conflict, Invalid, NotFound, SandboxdError, Unavailable
from sandboxd.files import replace_file
from sandboxd.isolation.client import Launcher
from sandboxd.isolation.overlay import LAYERS
from sandboxd.isolation.uids import UidPool
from sandboxd.isolation.wire import LaunchSpec, MountSpec, OverlaySpec
from sandboxd.names import shown
from sandboxd.paths import Paths
from sandboxd.policy.model import DEFAULT_TEAM
from sandboxd.sessions.helper import ask
from sandboxd.sessions.landing import CHANGES, KEPT, WORKSPACE
from sandboxd.sessions.trees import is_empty, remove

__all__ = ["OVERLAY", "Changes", "Layers"]

#: Where a session's layers are, below its directory.
OVERLAY = "overlay"

State = Literal["live", "kept", "applied", "discarded", "lost"]

_log = logging.getLogger(__name__)

#: Seconds for a review or an application, and bytes of what it answers.
_PATIENCE = 600.0
_MAX_ANSWER = 24 << 20
_MAX_REQUEST = 4 << 20
#: Paths that an audit record names.
_TOLD_PATHS = 50


@dataclass(frozen=True)
class Layers:
    """What is remembered of one session's layers, in STATE/sessions/ID/overlay.json.

    ``since``: the kernel's time when they were made, in nanoseconds. What changed in the
    workspace later changed behind the session's back.
    """

    session: str
    agent: str
    workspace: str
    since: int
    quota: int
    state: State
    why: str = ""
    team: str = DEFAULT_TEAM


@dataclass
class _View:
    """What a live session holds. ``namespace`` is -1 until the view is there."""

    workspace: str
    uid: int
    team: str
    namespace: int = -1


class Changes:
    """The layers of every session, live and ended."""

    def __init__(self, *, paths: Paths, launcher: Launcher, uids: UidPool, audit: AuditLog) -> None:
        self._paths, self._launcher, self._uids, self._audit = paths, launcher, uids, audit
        self._live: dict[str, _View] = {}
        self._busy: set[str] = set()
        self._landing: set[str] = set()  # workspaces that are changing now

    async def begin(
        self, session: str, agent: str, team: str, workspace: Path, *, quota: int, uid: int
    ) -> int:
        """Make a copy-on-write view of ``workspace``; returns the mount namespace that holds it.

        The descriptor is closed by :meth:`end`. Raises KernelError where the kernel or a file
        system can't have it; nothing is left then.
        """
        if str(workspace) in self._landing:
            raise Conflict(
                f"changes are being applied to {workspace} at this moment", hint="try again"
            )
        view = self._live[session] = _View(str(workspace), uid, team)  # seen by apply from here on
        layers = self._layers(session)
        try:
            since = await trio.to_thread.run_sync(_make, layers, workspace)
            self._write(Layers(session, agent, str(workspace), since, quota, "live", team=team))
            spec = LaunchSpec(
                id=session,
                argv=(b"/nothing",),
                env=(),
                uid=uid,
                overlay=OverlaySpec(str(workspace), "" if quota else str(layers), quota),
            )
            view.namespace = await self._namespace(spec)
        except BaseException:
            del self._live[session]
            with contextlib.suppress(OSError):
                remove(layers)
                self._meta(session).unlink(missing_ok=True)
                layers.parent.rmdir()
            raise
        return view.namespace

    async def end(self, session: str) -> None:
        """The agent and its calls are gone: keep what it changed, or forget that it did nothing.

        What goes wrong is logged and remembered, never raised.
        """
        view = self._live[session]
        try:
            layers = self._read(session)
            if layers.quota:
                layers = await self._keep(layers, view)
            else:
                layers = replace(layers, state="kept")
            path = self._layers(session)
            if layers.state == "kept":
                (path / "upper").chmod(0o755)  # the agent may have closed its workspace's root
                if is_empty(path / "upper"):
                    layers = replace(layers, state="discarded", why="it changed nothing")
            if layers.state != "kept":
                await trio.to_thread.run_sync(remove, path)
            self._write(layers)
        except (OSError, SandboxdError) as failure:
            _log.error("the changes of session %s can't be put away: %s", session, failure)
        finally:
            del self._live[session]
            os.close(view.namespace)

    def state(self, session: str) -> Layers | None:
        """What became of a session's changes; None when its workspace was no overlay."""
        try:
            layers = self._read(session)
        except NotFound:
            return None
        if layers.state == "live" and session not in self._live:
            # A daemon that was killed: what was in memory is gone, what was on disk is there.
            lost = "they were in memory, and the daemon died"
            layers = replace(layers, state="lost", why=lost) if layers.quota else layers
            layers = layers if layers.quota else replace(layers, state="kept")
        return layers

    async def diff(self, session: str, paths: Sequence[str], *, text: bool) -> dict[str, Any]:
        """What differs from the workspace as it is now, of a live session too.

        Raises NotFound when there is nothing to review or nothing changed at one of ``paths``.
        """
        layers = self._reviewable(session)
        async with self._alone(session):
            answer = await self._ask(layers, op="diff", paths=list(paths), text=text)
        return {"session": session, "workspace": layers.workspace, "state": layers.state, **answer}

    async def apply(
        self, session: str, paths: Sequence[str], *, force: bool, by: str
    ) -> dict[str, Any]:
        """Land an ended session's changes, or those at ``paths``, in its workspace.

        Raises Conflict while it runs, while another session has the same workspace as its lower
        layer, and, unless ``force``, where the workspace changed meanwhile: nothing is done then.
        What can't be applied for another reason is in the result's ``failed``.
        """
        layers = self._reviewable(session)
        who = {**_about(layers), "by": by}
        # What has begun goes to its end, also when the operator leaves.
        with trio.CancelScope(shield=True):
            async with self._alone(session, landing=layers):
                await self._audit.append("session.applying", **who, force=force, **_told(paths))
                try:
                    done = await self._land(layers, list(paths), force=force)
                except SandboxdError as failure:
                    reason = failure.message
                    await self._audit.append("session.apply_refused", **who, reason=reason)
                    raise
                applied = done.pop("applied")
                counts = {kind: done[kind] for kind in ("added", "changed", "deleted")}
                await self._audit.append(
                    "session.applied", **who, **counts, failed=len(done["failed"]), **_told(applied)
                )
                if not done["remaining"]:
                    await trio.to_thread.run_sync(remove, self._layers(session))
                    self._write(replace(layers, state="applied"))
        return {"session": session, "workspace": layers.workspace, "paths": applied, **done}

    async def discard(self, session: str, *, by: str) -> None:
        """Remove an ended session's changes. Raises Conflict while it runs, NotFound if none."""
        layers = self._reviewable(session)
        _refuse_running(layers)
        async with self._alone(session):
            await self._audit.append("session.discarded", **_about(layers), by=by)
            await trio.to_thread.run_sync(remove, self._layers(session))
            self._write(replace(layers, state="discarded", why=f"by {by}"))

    async def _land(self, layers: Layers, paths: list[str], *, force: bool) -> dict[str, Any]:
        done = await self._ask(layers, write=True, op="apply", paths=paths, force=force)
        if conflicts := done["conflicts"]:
            first = ", ".join(shown(conflict["path"]) for conflict in conflicts[:5])
            raise Conflict(
                f"{len(conflicts)} of the changes meet a workspace that changed since the session "
                f"began: {first}",
                hint="look at both (sandboxctl session diff); --force takes the session's",
            )
        return done

    def _reviewable(self, session: str) -> Layers:
        layers = self.state(session)
        if layers is None:
            raise NotFound(
                f"the workspace of {session} was no overlay",
                hint="what it changed is in the workspace already; see docs/configuration.md",
            )
        if layers.state not in ("live", "kept"):
            why = f" ({layers.why})" if layers.why else ""
            raise NotFound(f"the changes of {session} were {layers.state}{why}")
        return layers

    @asynccontextmanager
    async def _alone(self, session: str, landing: Layers | None = None) -> AsyncIterator[None]:
        """Nobody else has to do with the layers, nor with the workspace that is ``landing``."""
        if session in self._busy:
            raise Conflict(f"somebody is reviewing {session} at this moment")
        if landing is not None:
            self._refuse_in_use(landing)
            self._landing.add(landing.workspace)
        self._busy.add(session)
        try:
            yield
        finally:
            self._busy.discard(session)
            if landing is not None:
                self._landing.discard(landing.workspace)

    def _refuse_in_use(self, layers: Layers) -> None:
        _refuse_running(layers)
        if layers.workspace in self._landing:
            raise Conflict(f"{layers.workspace} is changing at this moment", hint="try again")
        for other, view in self._live.items():
            if view.workspace == layers.workspace:
                # "the behavior of the overlay is undefined" (overlayfs.rst, Changes to
                # underlying filesystems)
                # Another team's is not to be named to whoever applies this one's.
                who = other if view.team == layers.team else "a session of another team"
                raise Conflict(
                    f"{who} is running on top of the same workspace",
                    hint="a workspace can't change below a running overlay: stop that session",
                )

    async def _keep(self, layers: Layers, view: _View) -> Layers:
        """Copy layers in memory to disk."""
        try:
            mounts = (
                MountSpec(f"{LAYERS}/upper", CHANGES, readonly=False, shared=True),
                MountSpec(str(self._layers(layers.session) / "upper"), KEPT, False, idmap=True),
            )
            answer = await self._run(mounts, view.uid, view.namespace, {"op": "keep"})
        except SandboxdError as failure:
            _log.error("the changes of session %s are lost: %s", layers.session, failure.message)
            return replace(layers, state="lost", why=failure.message)
        if answer["left_out"]:
            _log.warning(
                "session %s: %d entries of its workspace are too deep, or no files, to keep",
                *(layers.session, answer["left_out"]),
            )
        return replace(layers, state="kept")

    async def _ask(self, layers: Layers, *, write: bool = False, **request: Any) -> dict[str, Any]:
        """Have a sandbox answer ``request`` about the layers and their workspace."""
        workspace = MountSpec(layers.workspace, WORKSPACE, readonly=not write, idmap=True)
        request["since"] = layers.since
        if layers.state == "live" and layers.quota:
            view = self._live[layers.session]
            if view.namespace < 0:
                raise Conflict(f"{layers.session} is only starting")
            upper = MountSpec(f"{LAYERS}/upper", CHANGES, shared=True)
            return await self._run((workspace, upper), view.uid, view.namespace, request)
        with self._uids.lease() as uid:
            upper = MountSpec(str(self._layers(layers.session) / "upper"), CHANGES, idmap=True)
            return await self._run((workspace, upper), uid, None, request)

    async def _run(
        self,
        mounts: tuple[MountSpec, ...],
        uid: int,
        namespace: int | None,
        request: dict[str, Any],
    ) -> dict[str, Any]:
        """One run of the program; its answer. Raises Unavailable when it gives none."""
        asked = json.dumps(request).encode()
        if len(asked) > _MAX_REQUEST:
            raise Invalid("too many paths for one request", hint="name directories instead")
        answer = await ask(
            self._launcher,
            "landing",
            asked,
            mounts=mounts,
            uid=uid,
            namespace=namespace,
            patience=_PATIENCE,
            max_answer=_MAX_ANSWER,
        )
        if answer is None:
            raise Unavailable(
                "the changes could not be read to the end",
                hint="there may be too many of them for the memory and time of a review",
            )
        if trouble := answer.get("trouble"):
            raise Invalid(str(trouble))
        return answer

    async def _namespace(self, spec: LaunchSpec) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            fd = theirs.fileno()  # it runs no program that could take the others for anything
            process = await self._launcher.launch(spec, stdin=fd, stdout=fd, stderr=fd)
            # It was sent before the start was reported.
            ours.setblocking(False)
            _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
            with trio.CancelScope(shield=True):  # it has nothing left to do but to end
                await process.wait()
        return fds[0]

    def _layers(self, session: str) -> Path:
        return self._paths.logs / session / OVERLAY

    def _meta(self, session: str) -> Path:
        return self._paths.logs / session / "overlay.json"

    def _write(self, layers: Layers) -> None:
        replace_file(self._meta(layers.session), json.dumps(asdict(layers)).encode())

    def _read(self, session: str) -> Layers:
        try:
            return Layers(**json.loads(self._meta(session).read_bytes()))
        except FileNotFoundError:
            raise NotFound(f"the workspace of {session} was no overlay") from None


def _refuse_running(layers: Layers) -> None:
    if layers.state == "live":
        raise Conflict(
            f"{layers.session} is still running, and may change what is reviewed",
            hint=f"end it first: sandboxctl session stop {layers.session}",
        )


def _about(layers: Layers) -> dict[str, Any]:
    return {"session": layers.session, "agent": layers.agent, "team": layers.team}


def _make(layers: Path, workspace: Path) -> int:
    """Make the directories of the layers; the kernel's time at that moment, in nanoseconds."""
    layers.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    layers.mkdir(mode=0o700)
    mode = 0o755
    with contextlib.suppress(OSError):  # it may lie where only the launcher comes
        mode = stat.S_IMODE(workspace.stat().st_mode) & 0o777
    for name in ("work", "upper"):
        (layers / name).mkdir()
    (layers / "upper").chmod(mode)
    return (layers / "upper").stat().st_ctime_ns


def _told(paths: Sequence[str]) -> dict[str, Any]:
    """Paths as an audit record names them: not more than anybody reads."""
    told: list[JSON] = [shown(path) for path in paths[:_TOLD_PATHS]]
    return {"paths": told, "more_paths": max(0, len(paths) - _TOLD_PATHS)}
