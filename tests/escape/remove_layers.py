"""Take away each layer in turn, in a copy of the package, and see what notices.

    python tests/escape/remove_layers.py                  # all layers: some minutes
    python tests/escape/remove_layers.py --only Landlock  # those whose names contain this word
    python tests/escape/remove_layers.py --write          # and write docs/security-model.md; with
                                                          # --only, the rows of those layers

A layer that nobody would miss isn't one. So for each of ``layers.LAYERS`` the selftest of a copy
without it must fail where that of the same copy with it does not. Exits with 1 if nothing fails
for one of them. Root works in namespaces of its own, so that no copy's hole leads to this host;
needs libseccomp (libseccomp.so.2), whose filters are compiled anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from layers import LAYERS, Change, Layer

__all__ = ["DOCUMENT", "Removal", "applied", "main", "problems", "remove", "table_in", "title"]

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENT = PROJECT / "docs" / "security-model.md"
BEGIN = "<!-- layers: written by tests/escape/remove_layers.py -->"
END = "<!-- end of layers -->"

_PARTS = ("sandboxd", "tools", "policies", "systemd", "tests", "pyproject.toml")
_SECONDS = 240
#: How many of the probes that notice are named in the table.
_NAMED = 2


@dataclass(frozen=True)
class Removal:
    """What failed without one layer: probes or tests by name. ``broke``: nothing even started."""

    layer: Layer
    noticed: tuple[str, ...]
    broke: str = ""

    @property
    def proved(self) -> bool:
        return bool(self.noticed)


def main() -> int:
    """0 when something notices the absence of every layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--write", action="store_true", help="write the table into the document")
    args = parser.parse_args()
    chosen = [layer for layer in LAYERS if _chosen(layer, args.only)]
    removals = []
    known: dict[tuple[object, ...], dict[str, str] | None] = {}
    for layer in chosen:
        removal = remove(layer, known)
        removals.append(removal)
        noticed = f"{len(removal.noticed)}: {'; '.join(removal.noticed[:3])}"
        print(f"{layer.name}: {noticed if removal.proved else 'NOTHING ' + removal.broke}")
        sys.stdout.flush()
    if args.write:
        write(removals)
    unproved = [removal.layer.name for removal in removals if not removal.proved]
    for name in unproved:
        print(f"nothing misses {name}", file=sys.stderr)
    return 1 if unproved else 0


def remove(layer: Layer, known: dict[tuple[object, ...], dict[str, str] | None]) -> Removal:
    """Run what is to notice in a copy with the layer and in one without it.

    ``known`` keeps what came of copies with the layer, for others that need the same.
    """
    standing = [c for name in layer.behind for c in _by_name(name).changes] + [*layer.planted]
    filters = any(_by_name(name).filters for name in layer.behind)
    if layer.tests:
        with_it = _run_tests(standing, layer.tests, filters)
        without = _run_tests([*standing, *layer.changes], layer.tests, filters or layer.filters)
        return Removal(layer, tuple(sorted(set(without) - set(with_it))))
    # Of the whole package everything is tried, once.
    key = (tuple(standing), layer.threats if standing else ())
    if key not in known:
        known[key] = _run_selftest(standing, layer.threats if standing else (), filters)[0]
    before = known[key]
    after, complaint = _run_selftest(
        [*standing, *layer.changes], layer.threats, filters or layer.filters
    )
    if before is None:
        return Removal(layer, (), "the copy with the layer does not run either")
    if after is None:
        return Removal(layer, ("no sandbox can be built",), complaint)
    noticed = [
        name
        for name, state in after.items()
        if (state != "ok" and before.get(name) == "ok")
        or (state == "got through" and before.get(name) != state)
    ]
    return Removal(layer, tuple(dict.fromkeys(name.partition(": ")[2] for name in noticed)))


def applied(changes: Iterable[Change], top: Path) -> None:
    """Change the copy at ``top``. Raises ValueError for a change whose text isn't there once."""
    for change in changes:
        path = top / change.file
        text = path.read_text()
        if text.count(change.old) != 1:
            raise ValueError(
                f"{change.file} has {text.count(change.old)} times what layers.py looks for: "
                f"{change.old[:80]!r}"
            )
        path.write_text(text.replace(change.old, change.new))


def problems(layer: Layer, project: Path = PROJECT) -> list[str]:
    """Why a layer could not be taken away as layers.py says; empty when it can."""
    found = []
    changes = [c for name in layer.behind for c in _by_name(name).changes]
    texts: dict[str, str] = {}
    for change in [*changes, *layer.planted, *layer.changes]:
        text = texts.get(change.file) or (project / change.file).read_text()
        if text.count(change.old) != 1:
            found.append(f"{change.file}: {text.count(change.old)} times {change.old[:60]!r}")
        texts[change.file] = text.replace(change.old, change.new)
        if texts[change.file] == text:
            found.append(f"{change.file}: nothing changes")
    for file, text in texts.items():
        try:
            compile(text, file, "exec")
        except SyntaxError as error:
            found.append(f"{file}: {error}")
    return found


def write(removals: Iterable[Removal], document: Path = DOCUMENT) -> None:
    """Put rows into the document: these, and for other layers those that it has."""
    text = document.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    rows = {cells[0]: cells for cells in table_in(text)}
    rows |= {cells[0]: cells for cells in map(cells_of, removals)}
    lines = ["| layer | source | what fails when it is gone |", "|---|---|---|"]
    known = (rows.get(title(layer)) for layer in LAYERS)
    lines += ["| " + " | ".join(cells) + " |" for cells in known if cells]
    document.write_text(f"{text[:begin]}\n\n" + "\n".join(lines) + f"\n\n{text[end:]}")


def cells_of(removal: Removal) -> list[str]:
    """One row of the table."""
    named = "; ".join(removal.noticed[:_NAMED]) or "nothing"
    more = len(removal.noticed) - _NAMED
    return [
        title(removal.layer),
        removal.layer.source,
        named + (f"; {more} more" if more > 0 else ""),
    ]


def title(layer: Layer) -> str:
    """What the table calls a layer; it tells what must be gone before it is seen."""
    return layer.name + (f" (behind: {', '.join(layer.behind)})" if layer.behind else "")


def table_in(text: str) -> list[list[str]]:
    """The cells of the rows that a document has between the marks."""
    inside = text[text.index(BEGIN) : text.index(END)]
    rows = [line for line in inside.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows[1:]]


def _chosen(layer: Layer, words: Sequence[str]) -> bool:
    return not words or any(word.lower() in layer.name.lower() for word in words)


def _by_name(name: str) -> Layer:
    return next(layer for layer in LAYERS if layer.name == name)


def _copied(changes: Iterable[Change], filters: bool, name: str) -> Path:
    top = Path(name)
    top.chmod(0o755)
    for part in _PARTS:
        source = PROJECT / part
        if source.is_dir():
            shutil.copytree(source, top / part, ignore=shutil.ignore_patterns(".*"))
        else:
            shutil.copy(source, top / part)
    applied(changes, top)
    if filters:
        program = "sandboxd.isolation.filters.build"
        subprocess.run([sys.executable, "-m", program], cwd=top, check=True, capture_output=True)
    return top


def _run_selftest(
    changes: Sequence[Change], threats: Sequence[str], filters: bool
) -> tuple[dict[str, str] | None, str]:
    """The state of every row, or None and the complaint where the selftest could not be run."""
    words = [word for threat in threats for word in ("--threat", threat)]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="layers-") as name:
        top = _copied(changes, filters, name)
        done = _run([sys.executable, "-m", "sandboxd.cli", "selftest", "--json", *words], top)
    if not done.stdout.startswith("{"):
        said = (done.stderr.strip() or "nothing").splitlines()
        return None, next((line for line in said if "hint" not in line), "")
    printed = json.loads(done.stdout)
    states = {f"{row['where']}: {row['name']}": row["state"] for row in printed["rows"]}
    if all(state == "not tried" for state in states.values()):
        return None, "; ".join(printed["problems"])[:200]
    return states, ""


def _run_tests(changes: Sequence[Change], selections: Sequence[str], filters: bool) -> list[str]:
    """The names of the tests that fail. Raises RuntimeError when none can be run."""
    failed = []
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="layers-") as name:
        top = _copied(changes, filters, name)
        for selection in selections:
            command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
            done = _run([*command, *selection.split()], top)
            if done.returncode not in (0, 1):
                raise RuntimeError(f"{selection}: {done.stdout[-800:]}{done.stderr[-400:]}")
            lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
            failed += [line.split()[1].partition("::")[2].partition("[")[0] for line in lines]
    return list(dict.fromkeys(failed))


def _run(command: Sequence[str], top: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    environment |= {"PYTHONPATH": str(top), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"}
    return subprocess.run(
        [*(_APART if os.geteuid() == 0 else ()), *command],
        cwd=top,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )


#: Namespaces that end with the command, so that a copy's holes lead to nothing of this host; and a
#: host name and groups that are easily told from a sandbox's.
_APART = (
    "unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--mount-proc", "--kill-child",
    "--propagation=private", "--", sys.executable, "-I", "-S", "-c",
    "import os, socket, sys; socket.sethostname('host-of-the-copy'); os.setgroups([4, 24]); "
    "os.execvp(sys.argv[1], sys.argv[1:])",
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
