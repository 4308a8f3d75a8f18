"""The gate of admin methods: who gets through to a method, and which parameters it then sees."""

from __future__ import annotations

from sandboxd.admin.methods import Methods
from sandboxd.admin.permissions import NEEDS


def test_every_method_has_a_line_and_no_line_is_left_over() -> None:
    # The table needs no daemon to be listed.
    table = Methods(None).table()  # type: ignore[arg-type]
    assert sorted(table) == sorted(NEEDS)
