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


def test_a_lease_ends_with_an_error_too() -> None:
    pool = UidPool(privileged=True, first=5000, count=1)
    with pytest.raises(RuntimeError), pool.lease():
        raise RuntimeError
    assert pool.acquire() == 5000


def test_without_privileges_everything_is_the_callers_uid() -> None:
    pool = UidPool(privileged=False, count=1)
    assert [pool.acquire(), pool.acquire()] == [os.geteuid()] * 2
