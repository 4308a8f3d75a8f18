"""No layer is there for show: without it the selftest, or a test, fails."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from layer import Change
from layers import LAYERS, Layer
from remove_layers import (
    DOCUMENT,
    PROJECT,
    Removal,
    cells_of,
    problems,
    remove,
    table_in,
    title,
    write,
)

from sandboxd.selftest.prober.catalogue import PROBES

NAMES = [layer.name for layer in LAYERS]
_KNOWN: dict[tuple[object, ...], dict[str, str] | None] = {}


@pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
def test_each_layer_can_still_be_taken_away(layer: Layer) -> None:
    assert problems(layer) == []
    assert bool(layer.threats) != bool(layer.tests)
    for selection in layer.tests:
        path, _, word = selection.partition("::")
        text = (PROJECT / path.split()[0]).read_text()
        assert re.search(
            rf"def test_\w*{(word or selection.split()[-1]).removeprefix('test_')}", text
        )


def test_what_is_no_longer_in_the_source_is_told(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("one = 1\n")
    gone = Layer("gone", "nowhere", (Change("file.py", "two = 2\n"),))
    broken = Layer("broken", "nowhere", (Change("file.py", "1\n", "(\n"),))
    assert problems(gone, tmp_path)[0] == "file.py: 0 times 'two = 2\\n'"
    assert "never closed" in problems(broken, tmp_path)[0]


def test_the_document_has_every_layer_and_what_misses_it() -> None:
    rows = table_in(DOCUMENT.read_text())
    assert [row[0] for row in rows] == [title(layer) for layer in LAYERS], (
        "run: python tests/escape/remove_layers.py --write"
    )
    assert [row[1] for row in rows] == [layer.source for layer in LAYERS]
    probes = {probe.name for probe in PROBES} | {"no sandbox can be built"}
    tests = {
        name
        for layer in LAYERS
        for selection in layer.tests
        for name in re.findall(
            r"def (test_\w+)", (PROJECT / re.split(" |::", selection)[0]).read_text()
        )
    }
    for name, _, noticed in rows:
        named = [word for word in noticed.split("; ") if not re.fullmatch(r"\d+ more", word)]
        assert named, name
        assert set(named) <= probes | tests, name


def test_rows_are_written_between_the_marks_and_others_stay(tmp_path: Path) -> None:
    document = tmp_path / "model.md"
    text = DOCUMENT.read_text()
    document.write_text(text)
    first, second = LAYERS[:2]
    write([Removal(first, ("one", "two", "three", "four"))], document)
    assert table_in(document.read_text())[0] == [first.name, first.source, "one; two; 2 more"]
    assert table_in(document.read_text())[1:] == table_in(text)[1:]
    assert cells_of(Removal(second, ()))[2] == "nothing"
    assert (document.read_text().partition("<!-- layers")[0]) == text.partition("<!-- layers")[0]


@pytest.mark.layers
@pytest.mark.skipif(os.geteuid() != 0, reason="some layers are only where root runs the launcher")
@pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
def test_something_fails_without_it(layer: Layer) -> None:
    removal = remove(layer, _KNOWN)
    assert removal.proved, removal.broke


@pytest.mark.layers
def test_a_change_that_takes_nothing_away_is_not_noticed() -> None:
    change = Change("sandboxd/isolation/sandbox.py", "INSIDE_ID = 1000\n", "INSIDE_ID = 999 + 1\n")
    harmless = Layer("nothing", "nowhere", (change,), ("facts", "users"))
    removal = remove(harmless, _KNOWN)
    assert (removal.noticed, removal.broke) == ((), "")
