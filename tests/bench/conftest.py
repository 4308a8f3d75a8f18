"""Sandboxes with holes: a bench that measures them must say that its figures are invalid."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sandboxd.isolation import launcher


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make launchers that run this code before they serve."""

    def use(code: str) -> None:
        before, _, serve = launcher._BOOT.rpartition("from sandboxd")
        monkeypatch.setattr(
            launcher, "_BOOT", f"{before.rstrip('; ')}\n{code}\nfrom sandboxd{serve}"
        )

    return use
