"""Files of a live session's workspace over the admin socket."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from sandboxd.admin.params import bounded, iso, param
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Invalid
from sandboxd.running import Daemon
from sandboxd.sessions.files import MAX_LISTED, Files, NewFile

__all__ = ["FileMethods"]


class FileMethods:
    """``session.files.*``: every method takes the session's ``id``.

    A file's content is ``content`` as text (UTF-8), or as base64 where ``encoding`` says so.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "session.files.read": self.read,
            "session.files.write": self.write,
            "session.files.remove": self.remove,
            "session.files.list": self.list_,
            "session.files.info": self.info,
            "session.files.exists": self.exists,
            "session.files.mkdir": self.mkdir,
            "session.files.rename": self.rename,
        }

    async def read(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{path, encoding?}`` to ``{content, encoding, entry}``."""
        session, files = self._daemon.sessions.get(param(params, "id", str)), self._files
        encoding, path = _encoding(params), param(params, "path", str)
        found = await files.read(session, path, by=caller.name)
        if encoding == "base64":
            content = base64.b64encode(found.data).decode("ascii")
        else:
            try:
                content = found.data.decode()
            except UnicodeDecodeError:
                raise Invalid(
                    "the file is not text in UTF-8", hint="read it with encoding: base64"
                ) from None
        return Reply({"content": content, "encoding": encoding, "entry": _entry(found.entry)})

    async def write(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{files: [{path, content, encoding?, mode?}]}`` to ``{written}``."""
        session = self._daemon.sessions.get(param(params, "id", str))
        written = await self._files.write(
            session, [_new_file(row) for row in param(params, "files", list)], by=caller.name
        )
        return Reply({"written": written})

    async def remove(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{path, recursive?}`` to ``{removed}``, the number of entries."""
        session = self._daemon.sessions.get(param(params, "id", str))
        removed = await self._files.remove(
            session,
            param(params, "path", str),
            recursive=_flag(params, "recursive"),
            by=caller.name,
        )
        return Reply({"removed": removed})

    async def list_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{path?, depth?}`` to ``{entries, truncated}``."""
        session = self._daemon.sessions.get(param(params, "id", str))
        path = param(params, "path", str) if params.get("path") is not None else ""
        depth = bounded(params, "depth", 1, most=MAX_LISTED)
        found = await self._files.list(session, path, depth=depth)
        return Reply({**found, "entries": [_entry(entry) for entry in found["entries"]]})

    async def info(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{path}`` to ``{path, name, type, size, mode, modified, target?}``."""
        session = self._daemon.sessions.get(param(params, "id", str))
        return Reply(_entry(await self._files.info(session, param(params, "path", str))))

    async def exists(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{path}`` to ``{exists}``."""
        session = self._daemon.sessions.get(param(params, "id", str))
        return Reply({"exists": await self._files.exists(session, param(params, "path", str))})

    async def mkdir(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{path}`` to ``{created}``: false where the directory is there already."""
        session = self._daemon.sessions.get(param(params, "id", str))
        path = param(params, "path", str)
        return Reply({"created": await self._files.mkdir(session, path, by=caller.name)})

    async def rename(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{old, new, overwrite?}`` to ``{}``."""
        session = self._daemon.sessions.get(param(params, "id", str))
        old, new = param(params, "old", str), param(params, "new", str)
        overwrite = _flag(params, "overwrite")
        await self._files.rename(session, old, new, overwrite=overwrite, by=caller.name)
        return Reply({})

    @property
    def _files(self) -> Files:
        return self._daemon.sessions.files


def _new_file(row: Any) -> NewFile:
    if not isinstance(row, dict):
        raise Invalid("a file to write is an object", hint="{path, content, encoding?, mode?}")
    if unknown := sorted(set(row) - {"path", "content", "encoding", "mode"}):
        raise Invalid(f"a file to write has no field {unknown[0]!r}")
    content = param(row, "content", str)
    mode = param(row, "mode", int) if row.get("mode") is not None else None
    try:
        if _encoding(row) == "base64":
            data = base64.b64decode(content, validate=True)
        else:
            data = content.encode()
    except (binascii.Error, ValueError):
        raise Invalid("a file's content is not what its encoding says") from None
    return NewFile(param(row, "path", str), data, mode)


def _encoding(params: dict[str, Any]) -> str:
    encoding = params.get("encoding") or "text"
    if encoding not in ("text", "base64"):
        raise Invalid("an encoding is text (UTF-8) or base64")
    return str(encoding)


def _flag(params: dict[str, Any], name: str) -> bool:
    return param(params, name, bool) if params.get(name) is not None else False


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "modified": iso(entry["modified"])}
