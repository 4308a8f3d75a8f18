"""``sandboxd`` that notes when each stage of a call begins and ends.

``python -m bench.traced`` takes the options of ``sandboxd``; SANDBOXD_BENCH_TRACE names the file
that the notes go to when it ends, below the state directory. With SANDBOXD_BENCH_PROFILE it also
runs under cProfile, which slows it: only the shares say something then.
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
from pathlib import Path
from typing import Any

from sandboxd import main

__all__ = ["HOOKS", "attach"]

#: Stage, and the function whose run it is: module, then the path to it. "=" after the stage: it is
#: told apart by its first argument. Taken off the code as it is; what has moved is told, and a test
#: notices.
HOOKS = (
    ("read", "sandboxd.broker.jsonrpc:LineReader.receive"),
    ("parse", "sandboxd.broker.mcp:parse"),
    ("call", "sandboxd.broker.calls:Calls.call"),
    ("decide", "sandboxd.broker.calls:decide"),
    ("record =", "sandboxd.audit:AuditLog.append"),
    ("fdatasync", "os:fdatasync"),
    ("check the program", "sandboxd.broker.calls:check_program"),
    ("unseal", "sandboxd.broker.calls:Calls._unseal"),
    ("prepare", "sandboxd.broker.calls:prepare"),
    ("launch", "sandboxd.isolation.client:Launcher.launch"),
    ("run", "sandboxd.isolation.client:Process.wait"),
    ("end", "sandboxd.broker.calls:_end"),
    ("redact", "sandboxd.broker.capture:Capture._take"),
    ("note the use", "sandboxd.broker.calls:Calls._touch"),
    ("encode", "sandboxd.broker.mcp:_encode"),
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
    missing = attach(spans)
    profile: Any = None
    if os.environ.get("SANDBOXD_BENCH_PROFILE"):
        import cProfile

        profile = cProfile.Profile()
        profile.enable()
    try:
        return main.main()
    finally:
        told: dict[str, Any] = {"spans": spans, "missing": missing, "profile": []}
        if profile is not None:
            profile.disable()
            told["profile"] = _top(pstats.Stats(profile))
        Path(os.environ["SANDBOXD_BENCH_TRACE"]).write_text(json.dumps(told))


def _top(stats: Any) -> list[dict[str, Any]]:
    """Functions by the time in themselves."""
    rows = [
        {"where": f"{Path(file).name}:{line} {name}", "calls": calls, "self": own, "total": total}
        for (file, line, name), (_, calls, own, total, _) in stats.stats.items()
    ]
    return sorted(rows, key=lambda row: -float(row["self"]))[:60]


if __name__ == "__main__":
    sys.exit(_serve())
