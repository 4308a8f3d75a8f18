"""Host uids: one for each living sandbox, not soon the same again."""

from __future__ import annotations

import os

import pytest

from sandboxd.errors import Unavailable
from sandboxd.isolation.uids import UidPool


def test_no_two_living_sandboxes_share_a_uid() -> None:
    pool = UidPool(privileged=True, first=5000, count=3)
    assert [pool.acquire() for _ in range(3)] == [5000, 5001, 5002]
    with pytest.raises(Unavailable, match="all 3 sandbox uids are in use") as refusal:
        pool.acquire()
    assert "uid_range" in refusal.value.hint
    pool.release(5001)
    assert pool.acquire() == 5001


def test_a_uid_given_back_is_the_last_to_be_used_again() -> None:
    pool = UidPool(privileged=True, first=5000, count=3)
    with pool.lease() as first:
        assert first == 5000
    assert [pool.acquire() for _ in range(3)] == [5001, 5002, 5000]


def test_a_group_gets_back_what_the_same_use_had() -> None:
    pool = UidPool(privileged=True, first=5000, count=4)
    first, second = pool.acquire("s", "git"), pool.acquire("s", "git")
    pool.release(first, "s", "git")
    assert pool.acquire("s", "curl") == 5002
    assert pool.acquire("s", "git") == first
    pool.release(second, "s", "git")
    assert pool.acquire("other", "git") == 5003
    # Nothing else is left; it is then kept for nobody.
    assert pool.acquire() == second
    with pytest.raises(Unavailable):
        pool.acquire("s", "git")


def test_what_was_kept_for_a_group_is_anybodys_once_it_is_forgotten() -> None:
    pool = UidPool(privileged=True, first=5000, count=2)
    pool.release(pool.acquire("s", "git"), "s", "git")
    assert pool.acquire() == 5001
    pool.release(5001)
    pool.forget("s")
    assert [pool.acquire(), pool.acquire()] == [5000, 5001]
    pool.forget("unknown")


def test_a_lease_ends_with_an_error_too() -> None:
    pool = UidPool(privileged=True, first=5000, count=1)
    with pytest.raises(RuntimeError), pool.lease():
        raise RuntimeError
    assert pool.acquire() == 5000


def test_without_privileges_everything_is_the_callers_uid() -> None:
    pool = UidPool(privileged=False, count=1)
    assert [pool.acquire(), pool.acquire()] == [os.geteuid()] * 2
