"""What a tool used and what it was refused, with the manifest's line that would allow it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sandboxd.isolation.runtime import python_prefixes
from sandboxd.policy import Tool

__all__ = ["Finding", "findings"]

#: Where every program looks, whatever it is for: loader, locale, runtime, the sandbox's own places.
_USUAL = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev")
#: Places of the sandbox's own: what is missing there is not a matter of what is mounted.
_OWN = ("/proc", "/sys", "/dev", "/tmp", "/run/secrets", "/home/tool")  # noqa: S108
_REFUSED = ("EACCES", "EPERM", "EROFS")
_MISSING = ("ENOENT", "ENOTDIR")
_UNREACHABLE = ("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EADDRNOTAVAIL")
#: Programs look for it and do without: translations, the C library's name service cache.
_UNIMPORTANT = ("/usr/share/locale", "/var/run/nscd", "/run/nscd", "/etc/ld.so.preload")

_LIMITS = {
    ("clone", "EAGAIN"): ("processes", "more processes than it may have"),
    ("clone3", "EAGAIN"): ("processes", "more processes than it may have"),
    ("fork", "EAGAIN"): ("processes", "more processes than it may have"),
    ("vfork", "EAGAIN"): ("processes", "more processes than it may have"),
    ("mmap", "ENOMEM"): ("memory", "more memory than it may have"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that the tool did or was refused.

    ``did``: read, wrote, ran, connected, asked. ``refused``: why, empty when it went well.
    ``line``: what in the manifest would allow it, empty when nothing does or need be.
    """

    did: str
    what: str
    refused: str = ""
    line: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"did": self.did, "what": self.what, "refused": self.refused, "line": self.line}


def findings(
    records: Iterable[Mapping[str, Any]], tool: Tool, on_host: Callable[[str], bool]
) -> list[Finding]:
    """Findings in the order in which they first came up, each once.

    ``on_host`` tells whether a path exists outside the sandbox: what is missing inside only
    because it isn't mounted is a refusal, what is missing everywhere is not.
    """
    found: dict[Finding, None] = {}
    for record in records:
        finding = _judge(record, tool, on_host)
        if finding is not None:
            found[finding] = None
    return _without_echoes(list(found))


def _judge(record: Mapping[str, Any], tool: Tool, on_host: Callable[[str], bool]) -> Finding | None:
    call, error = str(record["call"]), str(record.get("error", ""))
    if "address" in record:
        return _connection(call, str(record["address"]), error, tool, on_host)
    if "path" in record:
        return _path(call, str(record["path"]), bool(record.get("writes")), error, tool, on_host)
    if "file" in record:
        return _full(str(record["file"]), error)
    if (call, error) in _LIMITS:
        name, why = _LIMITS[call, error]
        return Finding("asked", call, why, f"limits: {{{name}: ...}}")
    if call == "socket":
        why = f"no sandbox has sockets of family {record.get('family')}"
        return Finding("asked", call, why)
    return Finding("asked", call, f"no sandbox allows it ({error})")


def _path(
    call: str, path: str, writes: bool, error: str, tool: Tool, on_host: Callable[[str], bool]
) -> Finding | None:
    did = "ran" if call.startswith("exec") else "wrote" if writes else "read"
    if error == "EMFILE":
        return Finding(did, path, "more open files than it may have", "limits: {files: ...}")
    if error in ("ENOSPC", "EDQUOT"):
        return _full(path, error)
    if error in _REFUSED:
        return Finding(did, path, *_refusal(path, writes, error, tool))
    if path.endswith(" (deleted)"):  # a file without a name, such as memfd_create(2) makes
        return None
    if error in _MISSING:
        if _below(path, "/workspace"):
            if tool.workspace == "none":
                access = "rw" if writes else "ro"
                return Finding(did, path, "it has no workspace", f"workspace: {access}")
            return None
        if any(_below(path, own) for own in (*_OWN, *_UNIMPORTANT)) or not on_host(path):
            return None
        return Finding(did, path, "not in the sandbox", _mount(path, writes))
    if error or (not writes and did != "ran" and _usual(path, tool)):
        return None
    return Finding(did, path)


def _refusal(path: str, writes: bool, error: str, tool: Tool) -> tuple[str, str]:
    why = "read-only in the sandbox" if error == "EROFS" or writes else "closed to it"
    if _below(path, "/workspace"):
        return why, "workspace: rw" if writes and tool.workspace != "rw" else ""
    for mount in tool.mounts:
        if _below(path, str(mount.target)):
            line = f"mounts: [{{source: {mount.source}, target: {mount.target}, mode: rw}}]"
            return why, line if writes and mount.mode != "rw" else ""
    if writes:
        # Nobody should let a tool write where the system's programs are.
        closed = any(_below(path, p) for p in (*_OWN, *_USUAL))
        return why, "" if closed else _mount(path, True)
    return why, ""


def _full(path: str, error: str) -> Finding:
    if error == "EFBIG":
        return Finding("wrote", path, "a file larger than it may be", "limits: {file_size: ...}")
    line = "" if _below(path, "/workspace") else "limits: {tmp_size: ...}"
    return Finding("wrote", path, "no space left there", line)


def _connection(
    call: str, address: str, error: str, tool: Tool, on_host: Callable[[str], bool]
) -> Finding | None:
    did = "listened" if call == "bind" else "connected"
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not error:
            return Finding(did, address)
        if any(_below(path, p) for p in _UNIMPORTANT) or not path.startswith("/"):
            return None
        if not on_host(path):
            return None
        return Finding(did, address, "a socket of the host, which no sandbox shows")
    if error in ("", "EINPROGRESS", "EISCONN"):
        return Finding(did, address)
    if error in (*_UNREACHABLE, *_REFUSED) and tool.network == "none":
        return Finding(
            did, address, "it has no network", "egress, if a host is enough, or network: host"
        )
    return Finding(did, address, f"failed with {error}")


def _mount(path: str, writes: bool) -> str:
    source = str(PurePosixPath(path).parent) if writes else path
    mode = ", mode: rw" if writes else ""
    return f"mounts: [{{source: {source}, target: {source}{mode}}}]"


def _usual(path: str, tool: Tool) -> bool:
    usual = (*_USUAL, str(tool.directory), *python_prefixes())
    return path == "/" or any(_below(path, p) for p in usual)


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _without_echoes(found: list[Finding]) -> list[Finding]:
    """A path that was looked at and then written or run is told once, as the latter."""
    more = {f.what for f in found if f.did in ("wrote", "ran") and not f.refused}
    parents = {str(parent) for f in found for parent in PurePosixPath(f.what).parents}
    return [
        f
        for f in found
        if not (f.did == "read" and not f.refused and (f.what in more or f.what in parents))
    ]
