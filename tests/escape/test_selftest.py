"""Every probe for real, on this kernel: in an agent's and in a tool's sandbox, in both modes."""

from __future__ import annotations

from collections import Counter

import pytest
from escape_support import Selftest

from sandboxd.selftest.prober.catalogue import PROBES

pytestmark = pytest.mark.soak

#: The families of threats that docs/security-model.md speaks of.
FAMILIES = {
    "Secret": 60,
    "Agent steering a tool": 20,
    "Escape": 200,
    "Exhaustion": 10,
    "Process games": 1,
}


def test_nothing_gets_through_and_every_control_works(selftest: Selftest, mode: str) -> None:
    layers = {row["layer"]: row["state"] for row in selftest.printed["layers"]["agent"]}
    deviating = {
        name: state
        for name, state in selftest.not_ok().items()
        if not state.startswith("no such layer")
        and (not state.startswith("not enforced") or layers.get("seccomp") == "on")
    }
    assert deviating == {}
    assert selftest.printed["problems"] == []
    assert (selftest.printed["mode"], selftest.complaint) == (mode, "")
    assert selftest.status == (0 if selftest.printed["ok"] else 1)


def test_there_are_hundreds_of_probes_in_both_places(selftest: Selftest) -> None:
    where = Counter(row["where"] for row in selftest.rows)
    assert where["agent"] >= 150
    assert where["tool"] >= 150
    assert {row["name"] for row in selftest.rows} == {probe.name for probe in PROBES}
    families = Counter(probe.threat.partition(":")[0] for probe in PROBES)
    assert set(families) == set(FAMILIES)
    assert {name: count for name, count in families.items() if count < FAMILIES[name]} == {}


def test_every_row_tells_what_was_expected_what_came_and_how_it_was_controlled(
    selftest: Selftest,
) -> None:
    for row in selftest.rows:
        assert row["threat"], row
        assert row["got"], row
        assert row["control"], row
        assert row["control_ok"] is True, row
        if row["state"] == "ok":
            assert row["got"] in row["expected"], row


def test_most_controls_are_the_probe_itself_where_it_is_allowed(selftest: Selftest) -> None:
    """A host that refuses a control itself weakens the proof: it must stay the exception."""
    replaced = [row["name"] for row in selftest.rows if "this host itself" in row["control"]]
    assert len(replaced) < len(selftest.rows) / 3, replaced


def test_the_searches_for_the_canary_looked_at_something(selftest: Selftest) -> None:
    for where in ("agent", "tool"):
        for name in ("memory of all processes", "every readable file of /proc"):
            row = selftest.row(name, where)
            assert row["got"] == "nothing"
            kibibytes = int(row["detail"].split()[-2].replace(",", ""))
            assert kibibytes > 500, row
