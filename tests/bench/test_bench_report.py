"""What is made of times, and how it is told."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import plot, report
from bench.__main__ import _parser
from bench.measure import Variant, interleave, quantile, ratio, row

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


async def test_runs_are_interleaved_and_slow_variants_run_less_often() -> None:
    order: list[str] = []

    def variant(name: str, every: int = 1) -> Variant:
        async def run() -> float:
            order.append(name)
            return float(len(order))

        return Variant(name, run, every=every)

    variants = [variant("a"), variant("b"), variant("slow", every=2)]
    await interleave(variants, 4)
    warm, measured = order[:9], "".join(name[0] for name in order[9:])
    assert sorted(warm) == ["a"] * 3 + ["b"] * 3 + ["slow"] * 3
    assert measured == "abs" + "ab" + "abs" + "ab"
    assert [len(each.times) for each in variants] == [4, 4, 2]


def test_cpu_time_is_that_of_a_run_with_its_children_and_of_others() -> None:
    import trio

    spent = iter([5.0, 7.0])

    async def burn() -> float:
        sum(range(200_000))
        return 1.0

    ours = Variant("ours", burn)
    others = Variant("others", burn, elsewhere=lambda: next(spent), ours=False)
    unknown = Variant("unknown", burn, ours=False)
    trio.run(interleave, [ours, others, unknown], 2)
    assert row(ours)["cpu_ms"] > 0
    assert row(others)["cpu_ms"] == 1000.0  # 2 seconds for 2 runs
    assert row(unknown)["cpu_ms"] is None


def test_quantiles_and_ratios() -> None:
    times = [float(number) for number in range(1, 101)]
    assert quantile(times, 0.95) == 95.0
    assert quantile(times, 0.99) == 99.0
    assert quantile([3.0], 0.99) == 3.0
    found = ratio([4.0] * 9, [2.0] * 9)
    assert found == {"value": 2.0, "low": 2.0, "high": 2.0}
    spread = ratio(times, [2 * time for time in times])
    assert spread["low"] < spread["value"] == 0.5 < spread["high"]


@pytest.fixture
def result() -> dict[str, Any]:
    each = {"runs": 4, "median_ms": 2.5, "p95_ms": 3.0, "p99_ms": 3.5, "min_ms": 2, "cpu_ms": None}
    launch = {
        "program": "/usr/bin/true",
        "variants": [{"name": "posix_spawn", **each}, {"name": "sandboxd", **each}],
        "absent": {"crun": "not installed | here"},
        "ratios": {"posix_spawn": {"value": 1.9, "low": 1.8, "high": 2.1}},
        "lacking": [],
    }
    about = {
        "at": "2026-01-01 00:00 UTC", "user": "root", "sandboxd": "0.1.0", "commit": "",
        "processors": 2, "model": "a processor", "memory_gib": 4, "kernel": "Linux 6",
        "system": "Debian", "python": "3.11", "file_system": "ext4", "load": [0.1, 0.1, 0.1],
    }  # fmt: skip
    parts = {"launch": launch}
    goals = report.judge(parts)
    return {"machine": about, "parts": parts, "goals": goals, "invalid": report.invalid(parts)}


def test_a_goal_is_met_missed_or_not_measured(result: dict[str, Any]) -> None:
    by_figure = {goal["figure"]: goal for goal in result["goals"]}
    launch = by_figure["launch only, full isolation, beside `posix_spawn`"]
    assert launch["met"] is True
    assert launch["here"] == "1.90x (1.80 to 2.10)"
    others = by_figure["launch only, faster than each other program"]
    assert others["met"] is None
    assert others["here"] == "crun: not installed | here"
    result["parts"]["launch"]["ratios"]["posix_spawn"]["value"] = 2.01
    assert report.judge(result["parts"])[0]["met"] is False


def test_tables_name_what_is_absent_and_what_is_invalid(result: dict[str, Any]) -> None:
    assert "INVALID" not in report.text(result)
    assert "| crun | - | - | - | - | - | not installed \\| here |" in report.markdown(result)
    result["invalid"] = ["launch: no system call filter"]
    assert "INVALID: launch: no system call filter" in report.text(result)
    assert "**These figures are invalid**" in report.markdown(result)
    assert "INVALID" in plot.svg(result)


def test_a_busy_machine_is_told(result: dict[str, Any]) -> None:
    words = "did other work meanwhile"
    assert words not in report.markdown(result) + report.text(result)
    result["machine"]["load"] = [1.6, 1.0, 1.0]  # of 2 processors
    assert words in report.markdown(result)
    assert words in report.text(result)


def test_the_drawing_is_well_formed_and_names_everything(result: dict[str, Any]) -> None:
    result["parts"]["launch"]["variants"][0]["name"] = "<&>"
    drawing = ElementTree.fromstring(plot.svg(result))
    words = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<&>", "sandboxd", "2.50 ms"} <= set(words)


def test_results_go_where_the_document_has_a_place_for_them(tmp_path: Path) -> None:
    document = tmp_path / "d.md"
    document.write_text("x\n<!-- results: root -->\nold\n<!-- end of results -->\ny\n")
    report.write(document, "root", "new \\1")
    assert document.read_text() == (
        "x\n<!-- results: root -->\n\nnew \\1\n<!-- end of results -->\ny\n"
    )
    with pytest.raises(SystemExit, match="no place for the results"):
        report.write(document, "user", "new")


def test_the_documents_places_and_commands_are_real() -> None:
    text = DOCUMENT.read_text()
    for user in ("root", "user"):
        assert re.search(f"<!-- results: {user} -->.*?<!-- end of results -->", text, re.DOTALL)
    found = re.findall(r"^\.venv/bin/python -m bench\b(.*)$", text, re.MULTILINE)
    assert len(found) >= 5
    for words in found:
        _parser().parse_args(shlex.split(words, comments=True))
