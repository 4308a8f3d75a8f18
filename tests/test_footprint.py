"""What the running daemon has loaded, and what it must not have, as the size it keeps for good."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from real_daemon import RealDaemon, directories

#: Loaded with the first page, token, usage figure, intercepted connection; the rest never.
_LATER = {"jinja2", "jwt", "psutil", "cryptography.x509", "sandboxd.egress.authority"}
_NEVER = {"h2", "uvicorn", "click", "multiprocessing", "pydantic.v1", "hypothesis", "sandboxd.cli"}

#: The daemon as ever, which tells at its end what it had loaded.
_TELLING = """
import atexit, sys
from sandboxd.main import main
def tell():
    print("LOADED", *sorted(n for n, m in sys.modules.items() if m is not None), flush=True)
atexit.register(tell)
sys.exit(main())
"""


def _loaded(
    daemon: RealDaemon, monkeypatch: pytest.MonkeyPatch, use: Callable[[], None]
) -> set[str]:
    """The modules of a daemon that started, was used so, and ended."""
    usual = daemon.command
    at = usual.index("-m")
    telling = [*usual[:at], "-c", _TELLING, *usual[at + 2 :]]
    monkeypatch.setattr(RealDaemon, "command", telling)
    daemon.start()
    use()
    assert daemon.stop() == 0, daemon.log.read_text()
    (line,) = [x for x in daemon.log.read_text().splitlines() if x.startswith("LOADED ")]
    return set(line.split()[1:])


def test_a_daemon_with_http_loads_only_what_it_serves_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with directories() as daemon:
        daemon.http()

        def use() -> None:
            assert httpx2.get(f"{daemon.url}/healthz").status_code == 200

        found = _loaded(daemon, monkeypatch, use)
    assert {"trio", "mcp", "fastapi", "sandboxd.http.app"} <= found
    assert not found & (_LATER | _NEVER)


def test_figures_of_a_session_load_what_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with directories() as daemon:
        daemon.agent("worker", "exec sleep 1000")

        def use() -> None:
            started = daemon.call("session.start", agent="worker", args=[], tty=False)
            assert daemon.call("session.show", id=started["id"])["id"] == started["id"]

        found = _loaded(daemon, monkeypatch, use)
    assert "psutil" in found
    assert not found & (_LATER - {"psutil"} | _NEVER | {"fastapi"})
