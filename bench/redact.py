"""``python -m bench redact``: how fast output is searched for values, and what comes before that.

Output without a value, as it mostly is, in chunks as the broker reads them; processor time, so that
what else the machine does counts less. With each text a value is put in and must be masked, or the
figure means nothing.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sandboxd.redact import Matcher, Redactor
from sandboxd.redact.matcher import HAS_AUTOMATON
from sandboxd.secret import Secret

__all__ = ["GOAL_MB_S", "GOAL_US", "measure", "table"]

#: The text that the goal is about, and how many values it is searched for.
GOAL_TEXT, GOAL_SECRETS, GOAL_MB_S = "log", 100, 200
#: Microseconds that preparing the search for a call may take, with so many values.
GOAL_CALL, GOAL_US = 3, 200

_CHUNK = 65536
_SIZE = 8 << 20
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def measure(runs: int, *, size: int = _SIZE) -> dict[str, Any]:
    """Megabytes in a second for each text and number of values; the best of some runs."""
    source = random.Random(2611)  # noqa: S311 - the same figures' texts everywhere
    repeat = max(1, min(5, runs // 80))
    texts = {name: make(source, size) for name, make in _TEXTS.items()}
    rates, lacking = [], [] if HAS_AUTOMATON else ["the automaton: pip install ahocorasick-rs"]
    for count in (1, 3, 100):
        secrets = _secrets(source, count)
        matcher = Matcher(secrets)
        for name, text in texts.items():
            if not _masks(matcher, secrets, text):
                lacking.append(f"a value in {name} that was not masked")
            chunks = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
            seconds = min(_seconds(partial(_feed, matcher, chunks)) for _ in range(repeat))
            rate = len(text) / seconds / 1e6
            rates.append({"text": name, "secrets": count, "mb_per_s": round(rate, 1)})
    prepare = []
    for count in (1, 2, 3, 10):
        secrets = _secrets(source, count)
        best = min(_seconds(partial(_use, secrets)) for _ in range(max(20, runs)))
        prepare.append({"secrets": count, "us": round(best * 1e6, 1)})
    return {"rates": rates, "prepare": prepare, "lacking": lacking, "goals": _goals(rates, prepare)}


def table(figures: dict[str, Any]) -> str:
    counts = sorted({row["secrets"] for row in figures["rates"]})
    lines = ["output without a value, MB/s of one processor", ""]
    lines.append(f"{'':14}" + "".join(f"{f'{count} values':>12}" for count in counts))
    for name in _TEXTS:
        row = {r["secrets"]: r["mb_per_s"] for r in figures["rates"] if r["text"] == name}
        lines.append(f"{name:14}" + "".join(f"{row[count]:>12.0f}" for count in counts))
    lines += ["", "before a call's first byte, and its first kilobyte, in µs", ""]
    lines += [f"{row['secrets']:>4} values {row['us']:>10.0f}" for row in figures["prepare"]]
    lines += ["", *(f"{goal['is']:>8}  {goal['goal']}" for goal in figures["goals"])]
    return "\n".join(lines)


def _goals(rates: list[dict[str, Any]], prepare: list[dict[str, Any]]) -> list[dict[str, str]]:
    rate = next(
        r["mb_per_s"] for r in rates if (r["text"], r["secrets"]) == (GOAL_TEXT, GOAL_SECRETS)
    )
    cost = next(r["us"] for r in prepare if r["secrets"] == GOAL_CALL)
    return [
        {
            "goal": f"{GOAL_MB_S} MB/s of {GOAL_TEXT} with {GOAL_SECRETS} values: {rate:.0f}",
            "is": "reached" if rate >= GOAL_MB_S else "missed",
        },
        {
            "goal": f"under {GOAL_US} µs to prepare {GOAL_CALL} values: {cost:.0f}",
            "is": "reached" if cost < GOAL_US else "missed",
        },
    ]


def _seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _feed(matcher: Matcher, chunks: list[bytes]) -> None:
    redactor = Redactor(matcher)
    for chunk in chunks:
        redactor.feed(chunk)
    redactor.flush()
    if redactor.hits:
        raise AssertionError("the text holds a value")


def _use(secrets: dict[str, Secret]) -> None:
    """What a short answer costs: one small chunk."""
    _feed(Matcher(secrets), [b'{"ok": true, "rows": [[1, "tea"]]}\n' * 29])


def _masks(matcher: Matcher, secrets: dict[str, Secret], text: bytes) -> bool:
    redactor = Redactor(matcher)
    value = next(iter(secrets.values())).reveal()
    middle = len(text) // 2
    redactor.feed(text[middle - _CHUNK : middle] + value[:9])
    redactor.feed(value[9:] + text[middle : middle + _CHUNK])
    redactor.flush()
    return redactor.hits == 1


def _secrets(source: random.Random, count: int) -> dict[str, Secret]:
    values = (bytes(source.choice(_LETTERS) for _ in range(40)) for _ in range(count))
    return {f"TOKEN_{number}": Secret(value) for number, value in enumerate(values)}


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(_WORDS) for _ in range(count))


def _log(source: random.Random, size: int) -> bytes:
    lines = (
        f"2026-11-25T{at % 24:02}:{at % 60:02}:{source.randrange(60):02}Z INFO "
        f"worker[{source.randrange(99999)}]: {_words(source, 12)} in {source.random():.3f} s\n"
        for at in range(size // 80)
    )
    return "".join(lines).encode()[:size]


def _json(source: random.Random, size: int) -> bytes:
    rows = (
        json.dumps({"id": at, "ok": True, "text": _words(source, 12), "note": 'a "b"\n'})
        for at in range(size // 100)
    )
    return "\n".join(rows).encode()[:size]


def _code(source: random.Random, size: int) -> bytes:
    own = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
    return (own * (size // len(own) + 1))[:size]


_WORDS = (Path(__file__).parents[1] / "docs" / "security-model.md").read_text().split()
_WORDS = [word for word in _WORDS if word.isalpha()] or ["word"]
_TEXTS: dict[str, Callable[[random.Random, int], bytes]] = {
    "log": _log,
    "JSON": _json,
    "source code": _code,
    "base64": lambda source, size: base64.encodebytes(source.randbytes(size))[:size],
    "bytes": lambda source, size: source.randbytes(size),
}
