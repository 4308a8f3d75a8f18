"""The house's rules, read off the code: imports run downward, the launcher carries nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandboxd

PACKAGE = Path(sandboxd.__file__).parent
TESTS = Path(__file__).parent

#: Floors from the ground up. A module may import its own floor's folder and what lies below.
FLOORS = (
    ("errors", "secret", "names", "paths", "files", "maskable", "visible", "dotenv", "durations"),
    ("service",),
    ("isolation",),
    ("privileges",),
    ("vault",),
    ("policy",),
    ("audit",),
    ("access",),
    ("redact",),
    ("egress",),
    ("sessions",),
    ("broker",),
    ("running",),
    ("admin",),
    ("http",),
    ("daemon",),
    ("main",),
    ("host",),
    ("doctor",),
    ("trial",),
    ("authoring",),
    ("demo",),
    ("selftest",),
    ("cli",),
)
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms that a module imports when it runs; what only a type checker reads is left out."""
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sandboxd"):
            parts = (node.module or "").split(".")
            names = parts[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("sandboxd.")
            ]
        else:
            continue
        for name in names:
            yield name, node.lineno


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__"}
    assert rooms <= set(LEVEL), f"give these rooms a floor: {sorted(rooms - set(LEVEL))}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    upward = [
        f"line {line}: {name}"
        for name, line in imported_rooms(path)
        if name in LEVEL and name != room and LEVEL[name] >= LEVEL[room] > 0
    ]
    assert not upward, f"{room} (floor {LEVEL[room]}) imports upward: {upward}"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    module = tmp_path / "broken.py"
    module.write_text("from sandboxd.cli import main\nimport sandboxd.daemon\n")
    assert list(imported_rooms(module)) == [("cli", 1), ("daemon", 2)]


def test_no_file_is_much_over_five_hundred_lines() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > 520
    }
    assert not long


def test_the_launcher_loads_the_standard_library_and_its_own_room_only() -> None:
    code = (
        "import sys; import sandboxd.isolation.launcher; "
        "print('\\n'.join(n for n, m in sys.modules.items() if getattr(m, '__file__', None)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name for name in done.stdout.split() if not name.startswith(("_", "sitecustomize"))}
    ours = {name for name in loaded if name.startswith("sandboxd")}
    allowed = {
        "sandboxd",
        "sandboxd.errors",
        "sandboxd.isolation",
        *(
            f"sandboxd.isolation.{name}"
            for name in (
                "cgroup",
                "cgroup_places",
                "cgroup_state",
                "clocks",
                "further",
                "kernel",
                "landlock",
                "lasting",
                "listeners",
                "launcher",
                "meter",
                "overlay",
                "packing",
                "program",
                "root",
                "sandbox",
                "seccomp",
                "spawn",
                "template",
                "wire",
            )
        ),
    }
    assert ours <= allowed, f"the launcher must not load {sorted(ours - allowed)}"
    third_party = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert third_party <= {"sandboxd", "__editable__"}, third_party


def test_every_file_of_tests_has_a_name_of_its_own() -> None:
    """Two of one name in different folders can't be collected or imported together."""
    names = [path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py"]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_nothing_imports_a_conftest() -> None:
    """Each folder has one, so it depends on the command line which of them that would be."""
    found = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        for line in imports_of_conftest(path.read_text())
    }
    assert not found, f"move what they share to a module with a name of its own: {sorted(found)}"


def imports_of_conftest(source: str) -> list[int]:
    """Lines of imports of it, those for type checkers alone included."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        if any("conftest" in name.split(".") for name in names):
            lines.append(node.lineno)
    return lines


def test_the_check_sees_an_import_of_a_conftest() -> None:
    source = (
        "from conftest import Ctl\nimport os, conftest\nfrom tests.cli.conftest import Ctl\n"
        "def later():\n    from . import conftest\nfrom cli_support import conftests\n"
    )
    assert sorted(imports_of_conftest(source)) == [1, 2, 3, 5]
