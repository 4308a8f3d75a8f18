"""What an outcome means: which states there are, and which of them fail a host."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.selftest.judge import Result, Row, judge
from sandboxd.selftest.prober.probe import Layers, Plan, Probe

BARE, FILTERED, LANDLOCKED = Layers(), Layers(seccomp=True), Layers(landlock=4)


def probe(*denials: str, **options: Any) -> Probe:
    options.setdefault("outside", "host")
    return Probe("it", "Escape: this way", lambda plan: None, denials, says="outside", **options)


def row(
    got: str, of: Probe, *, layers: Layers = BARE, outside: str = "ok", **line: str | None
) -> Row:
    seen = {"got": got, "detail": "", "control": None, "fallback": None, **line}
    return judge(of, "agent", {"agent": {"it": seen}, "host": {"it": {"got": outside}}}, layers)


@pytest.mark.parametrize(
    ("judged", "state", "failed"),
    [
        (row("EPERM", probe("EPERM")), "ok", False),
        (row("ok", probe("EPERM")), "got through", True),
        (row("EINVAL", probe("EPERM", allowed=("EINVAL",)), outside="EINVAL"), "got through", True),
        (row("ENOENT", probe("EPERM")), "unexpected", True),
        (row("EPERM", probe("EPERM"), outside="EPERM"), "control failed", True),
        (row("EPERM", probe("EPERM"), outside="EPERM", fallback="ok"), "control failed", True),
        (row("ok", probe(filtered="EPERM")), "not enforced", True),
        (row("ENOSYS", probe(filtered="EPERM")), "not enforced", False),
        (row("EPERM", probe(filtered="EPERM"), layers=FILTERED), "ok", False),
        (row("ENOENT", probe("ENOENT", filtered="EPERM"), layers=FILTERED), "unexpected", True),
        (row("EACCES", probe("EROFS", landlocked=(4, "EACCES")), layers=LANDLOCKED), "ok", False),
        (row("EROFS", probe("EROFS", landlocked=(5, "EACCES")), layers=LANDLOCKED), "ok", False),
        (row("hung", probe("EPERM")), "unexpected", True),
    ],
)
def test_the_state_of_a_row(judged: Row, state: str, failed: bool) -> None:
    assert (judged.state, judged.failed, judged.ok) == (state, failed, state == "ok")
    assert Result([judged]).ok is not failed


def test_a_control_that_the_host_refuses_is_told_and_replaced() -> None:
    of = probe("EPERM", fallback=lambda plan: None)
    replaced = row("EPERM", of, outside="ENOSYS", fallback="ok")
    assert replaced.ok
    assert "this host itself refuses it, ENOSYS" in replaced.control
    assert not row("EPERM", of, outside="ENOSYS", fallback="EPERM").ok


def test_a_control_in_the_sandbox_must_work() -> None:
    of = probe("EROFS", inside=lambda plan: None)
    assert row("EROFS", of, control="ok").ok
    assert row("EROFS", of, control="EROFS").state == "control failed"


def test_a_probe_that_was_not_tried_fails() -> None:
    judged = judge(probe("EPERM"), "agent", {}, BARE)
    assert (judged.state, judged.failed) == ("not tried", True)


def test_a_problem_beyond_the_rows_fails_the_selftest() -> None:
    assert not Result([row("EPERM", probe("EPERM"))], problems=["the canary is in a log"]).ok


def test_a_plan_that_names_threats_leaves_the_others_out() -> None:
    assert Plan(threats=("THIS",)).wants(probe("EPERM"))
    assert not Plan(threats=("network", "shared")).wants(probe("EPERM"))
    assert Plan().wants(probe("EPERM"))
