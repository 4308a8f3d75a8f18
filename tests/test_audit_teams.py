"""Every audit record that names an agent, a session or a key says whose it is, by construction."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sandboxd"

#: Keywords of a record that concerns somebody.
_CONCERNS = {"agent", "session", "key", "visit"}

#: Where a record has no team for a reason.
_EXCUSED: set[str] = set()


def appends(tree: ast.AST) -> list[ast.Call]:
    """Calls of ``...audit.append("event", ...)`` and ``.note``."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("append", "note", "record")
        and ast.unparse(node.func.value).endswith("audit")
    ]


def lacking(source: str) -> list[str]:
    """Events that concern somebody and have no team. What comes by ** is made elsewhere: a real
    daemon's records are looked at for that, in tests/daemon/test_daemon_teams.py.
    """
    found = []
    for call in appends(ast.parse(source)):
        names = {keyword.arg for keyword in call.keywords}
        if names & _CONCERNS and not {"team", None} & names:
            found.append(ast.unparse(call.args[0]))
    return found


def test_no_record_that_names_somebody_lacks_the_team() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {event}"
        for path in PACKAGE.rglob("*.py")
        for event in lacking(path.read_text())
    }
    assert found == _EXCUSED
    assert lacking("self._audit.append('x', agent=a)") == ["'x'"]  # it can fail
