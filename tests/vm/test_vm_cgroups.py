"""The tests of limits on a real unified hierarchy: memory, processes, processor time of trees."""

from __future__ import annotations

import pytest
from vm_inside import run_inside
from vm_machine import Machine

pytestmark = pytest.mark.vm

#: What these limits are for; each must have run, not been skipped.
NEEDED = {
    "test_a_tree_of_small_processes_ends_when_together_they_take_too_much",
    "test_what_an_out_of_memory_kill_leaves_ends_too",
    "test_swap_is_off_and_the_group_dies_as_one",
    "test_a_fork_bomb_is_bounded_by_the_group_alone",
    "test_processor_time_is_rationed",
    "test_time_and_memory_of_the_whole_tree_are_told",
    "test_a_bomb_leaves_the_launcher_and_other_sandboxes_responsive",
    "test_everything_in_a_sandbox_is_in_its_cgroup",
    "test_the_launchers_own_cgroups_go_with_it",
    "test_without_its_cgroup_nothing_starts",
}


def bare(names: list[str]) -> set[str]:
    """Without their parameters."""
    return {name.partition("[")[0] for name in names}


def test_limits_of_whole_trees_hold_in_a_delegated_cgroup(machine: Machine) -> None:
    outcomes = run_inside(
        machine, "tests/isolation/test_cgroup.py", "-k", "not 200_launches and not user-"
    )
    outcomes.check()
    as_root = [name for name in outcomes.passed if "[user" not in name]
    assert bare(as_root) >= NEEDED
    assert [name for name in outcomes.skipped if "[user" not in name] == []


def test_limits_hold_for_an_ordinary_user_whom_systemd_gave_a_cgroup(machine: Machine) -> None:
    outcomes = run_inside(
        machine, "tests/isolation/test_cgroup.py",
        "-k", "not 200_launches and not responsive and not made", user="alice",
    )  # fmt: skip
    outcomes.check()
    assert NEEDED - bare(outcomes.passed) == {
        "test_a_bomb_leaves_the_launcher_and_other_sandboxes_responsive"
    }


def test_limits_hold_through_the_daemon(machine: Machine) -> None:
    outcomes = run_inside(machine, "tests/daemon/test_daemon_cgroups.py")
    outcomes.check()
    assert not outcomes.skipped
    assert "test_a_fork_bomb_ends_by_its_timeout_while_others_work" in outcomes.passed


def test_a_test_that_fails_inside_fails_out_here(machine: Machine) -> None:
    machine.write("/opt/carried/tests/test_wrong.py", "def test_wrong():\n    assert 1 == 2\n")
    outcomes = run_inside(machine, "tests/test_wrong.py")
    assert list(outcomes.failed) == ["test_wrong"]
    with pytest.raises(AssertionError, match="assert 1 == 2"):
        outcomes.check()
