"""Figures of weaker isolation are refused: by what the sandbox reports, and by a probe inside."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bench import launching, report
from bench.walls import NAMESPACES, PROBE, holes, own_namespaces, summary, weaker

ELSEWHERE = {name: f"{name}:[1]" for name in NAMESPACES}


@pytest.fixture
async def told() -> dict[str, Any]:
    """What the probe says in a sandbox as shipped."""
    async with launching.open_sandboxes() as sandboxes:
        return await sandboxes.look()


async def test_sandboxes_as_shipped_lack_nothing() -> None:
    async with launching.open_sandboxes() as sandboxes:
        assert await sandboxes.lacking() == []
        for _ in range(3):
            await sandboxes.one()
        assert await sandboxes.lacking() == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (
            "from sandboxd.isolation import landlock; landlock.enforce = lambda abi, rules: None",
            "no Landlock rules: a program runs from /dev/shm: ok",
        ),
        (
            "from sandboxd.isolation import seccomp; seccomp._install = lambda program: None",
            "no system call filter (Seccomp: 0)",
        ),
        (
            "from sandboxd.isolation import seccomp; seccomp.restrict_launcher = lambda: False",
            "seccomp is missing",
        ),
        (
            "from sandboxd.isolation import landlock; landlock.best_abi = lambda: 0",
            "landlock is missing",
        ),
    ],
    ids=["no Landlock behind its back", "no filter behind its back", "no filter", "no Landlock"],
)
async def test_a_sandbox_with_a_hole_makes_the_run_invalid(
    sabotage: Callable[[str], None], code: str, found: str
) -> None:
    sabotage(code)
    figures = await launching.measure(1, peers=())
    refused = report.invalid({"launch": figures})
    assert any(what.startswith(f"launch: {found}") for what in refused), refused
    assert any(what.startswith(f"launch: afterwards: {found}") for what in refused), refused


async def test_each_wall_that_is_missing_is_named(told: dict[str, Any]) -> None:
    def without(change: Callable[[dict[str, Any]], None]) -> list[str]:
        changed = copy.deepcopy(told)
        change(changed)
        return holes(changed, ELSEWHERE)

    assert holes(told, own_namespaces()) == []
    assert without(lambda t: t["status"].update(NoNewPrivs="0")) == ["no_new_privs is not set"]
    assert without(lambda t: t["status"].update(CapBnd="0000000000000400")) == [
        "capabilities are left (CapBnd 0000000000000400)"
    ]
    assert without(lambda t: t.update({"write /usr": "ok"})) == ["/usr is not read-only: ok"]
    assert without(lambda t: t.update({"from /tmp": "EPERM"})) == [
        "the control failed: no program runs from /tmp: EPERM"
    ]
    for name in NAMESPACES:
        outside = {**ELSEWHERE, name: told["namespaces"][name]}
        assert holes(told, outside) == [f"the host's {name} namespace"]
    assert holes(told, ELSEWHERE, told) == [
        f"two calls share one {name} namespace" for name in ("mnt", "pid", "ipc")
    ]


def test_the_probe_finds_no_walls_where_there_are_none() -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROBE], capture_output=True, check=True, timeout=60
    )
    told = json.loads(done.stdout)
    found = holes(told, own_namespaces())
    assert f"the host's {NAMESPACES[0]} namespace" in found
    assert "the filter allows personality(ADDR_NO_RANDOMIZE): ok" in found
    assert "no Landlock rules: a program runs from /dev/shm: ok" in found
    assert summary(told, own_namespaces()).startswith("0 of 7 namespaces (not mnt, pid, ipc,")


def test_a_layer_that_is_lowered_or_missing_is_named() -> None:
    def row(layer: str, state: str) -> dict[str, str]:
        return {"layer": layer, "state": state, "remark": "why"}

    assert weaker([row("seccomp", "on"), row("network namespace", "lowered")]) == [
        "network namespace is lowered: why"
    ]
    assert weaker([row("landlock", "missing")]) == ["landlock is missing: why"]
    assert weaker([row("cgroup", "lowered")]) == ["cgroup is lowered: why"]
    # An ordinary user may have none.
    assert weaker([row("cgroup", "missing"), row("cgroup io", "missing")]) == []
    assert weaker([]) == ["no layer is reported"]
