"""``sandboxd`` that notes when each stage of a call begins and ends.

``python -m bench.traced`` takes the options of ``sandboxd``; SANDBOXD_BENCH_TRACE names the file
that the notes go to when it ends, below the state directory. With SANDBOXD_BENCH_PROFILE it runs
under cProfile instead, which slows it: only the shares say something then.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
import pstats
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandboxd import main

__all__ = ["HOOKS", "attach"]

#: Stage, and the function whose run it is: module, then the path to it. "=" after the stage: it is
#: told apart by its first argument. Taken off the code as it is; what has moved is told.
HOOKS = (
    ("read", "sandboxd.broker.jsonrpc:LineReader.receive"),
    ("parse", "sandboxd.broker.mcp:parse"),
    ("call", "sandboxd.broker.calls:Calls.call"),
    ("decide", "sandboxd.broker.calls:decide"),
    ("record =", "sandboxd.audit:AuditLog.append"),
    ("record =", "sandboxd.audit:AuditLog.start"),
    ("record =", "sandboxd.audit:AuditLog.note"),
    ("wait for the record", "sandboxd.audit:AuditLog.settle"),
    ("fdatasync", "os:fdatasync"),
    ("check the program", "sandboxd.broker.calls:hold_program"),
    ("unseal", "sandboxd.broker.calls:unseal"),
    ("prepare", "sandboxd.broker.calls:prepare"),
    ("launch", "sandboxd.isolation.client:Launcher.launch"),
    ("launch: encode", "sandboxd.isolation.client:encode_spec"),
    ("launch: seal", "sandboxd.isolation.client:sealed_memfd"),
    ("run", "sandboxd.isolation.client:Process.wait"),
    ("end", "sandboxd.broker.attend:_end"),
    ("redact", "sandboxd.broker.capture:Capture._take"),
    ("note the use", "sandboxd.broker.calls:Calls._touch"),
    ("session", "sandboxd.sessions.manager:Manager.start"),
    ("snapshot", "sandboxd.vault.vault:TeamVault.snapshot"),
    ("keep its record", "sandboxd.vault.vault:Vault.put_session"),
    ("encode", "sandboxd.broker.mcp:_encode"),
    ("write", "sandboxd.broker.mcp:_Connection._write_now"),
    ("write", "trio:SocketStream.send_all"),
)

#: Name of the stage, nanoseconds of the monotonic clock at its begin and end.
Span = tuple[str, int, int]


def attach(spans: list[Span]) -> list[str]:
    """Wrap the functions. Returns those that are not there."""
    missing = []
    for stage, place in HOOKS:
        module, _, path = place.partition(":")
        try:
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            found = getattr(owner, name)
        except (ImportError, AttributeError):
            missing.append(place)
            continue
        setattr(owner, name, _wrapped(stage, found, spans))
    return missing


def _wrapped(stage: str, function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    def name_of(arguments: tuple[Any, ...]) -> str:
        return stage.replace("=", str(arguments[1])) if "=" in stage else stage

    if asyncio.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*arguments: Any, **more: Any) -> Any:
            began = time.monotonic_ns()
            try:
                return await function(*arguments, **more)
            finally:
                spans.append((name_of(arguments), began, time.monotonic_ns()))

        return run_async

    @functools.wraps(function)
    def run(*arguments: Any, **more: Any) -> Any:
        began = time.monotonic_ns()
        try:
            return function(*arguments, **more)
        finally:
            spans.append((name_of(arguments), began, time.monotonic_ns()))

    return run


def _serve() -> int:
    spans: list[Span] = []
    profile: Any = None
    if os.environ.get("SANDBOXD_BENCH_PROFILE"):
        import cProfile

        profile = cProfile.Profile(time.thread_time)
        missing = _profile_from_first(profile)
    else:
        missing = attach(spans)
    try:
        return main.main()
    finally:
        told: dict[str, Any] = {"spans": spans, "missing": missing, "functions": [], "packages": []}
        if profile is not None:
            profile.disable()
            told |= _shares(pstats.Stats(profile))
        with suppress(FileNotFoundError):  # it never got as far as its state directory
            Path(os.environ["SANDBOXD_BENCH_TRACE"]).write_text(json.dumps(told))


def _profile_from_first(profile: Any) -> list[str]:
    """Begin with the first message of an agent: what the start of the daemon costs is not asked."""
    mcp: Any = importlib.import_module("sandboxd.broker.mcp")
    parse = mcp.parse

    def parse_first(line: bytes) -> Any:
        mcp.parse = parse
        profile.enable()
        return parse(line)

    mcp.parse = parse_first
    return []


def _shares(stats: Any) -> dict[str, Any]:
    """CPU seconds of the event loop's thread, by the function and by the package they are spent
    in. Waiting costs none."""
    functions = [
        {"name": f"{_package(file)} {Path(file).name}:{line} {name}", "calls": calls, "cpu": own}
        for (file, line, name), (_, calls, own, _, _) in stats.stats.items()
    ]
    packages: dict[str, dict[str, Any]] = {}
    for (file, _, _), (_, calls, own, _, _) in stats.stats.items():
        of = packages.setdefault(_package(file), {"name": _package(file), "calls": 0, "cpu": 0.0})
        of["calls"] += calls
        of["cpu"] += own
    return {
        "functions": sorted(functions, key=lambda row: -float(row["cpu"]))[:60],
        "packages": sorted(packages.values(), key=lambda row: -float(row["cpu"])),
    }


def _package(file: str) -> str:
    """The package that a file belongs to; of ours, the room."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if "sandboxd" in parts:
        at = len(parts) - 1 - parts[::-1].index("sandboxd")
        return ".".join(parts[at : at + 2]).removesuffix(".py")
    return "built in C" if file == "~" else "standard library"


if __name__ == "__main__":
    sys.exit(_serve())
