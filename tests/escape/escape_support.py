"""Running the selftest, and reading what it printed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


@dataclass
class Selftest:
    """One run: its exit status, what it said on standard error, and its JSON."""

    status: int
    complaint: str
    printed: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.printed["rows"]
        return rows

    def row(self, name: str, where: str) -> dict[str, Any]:
        return next(row for row in self.rows if (row["name"], row["where"]) == (name, where))

    def not_ok(self) -> dict[str, str]:
        """Rows that aren't ok: name and place, with what happened."""
        return {
            f"{row['where']}: {row['name']}": f"{row['state']}: {row['got']}; {row['control']}"
            for row in self.rows
            if not row["ok"]
        }


def selftest_of(command: list[str], **options: Any) -> Selftest:
    """Run ``COMMAND selftest --json``."""
    done = subprocess.run(
        [*command, "selftest", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )
    assert done.stdout.startswith("{"), (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    return Selftest(done.returncode, done.stderr, json.loads(done.stdout))
