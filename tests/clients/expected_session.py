"""What every MCP client must have seen of the tools in conftest.py, and the broker of it."""

from __future__ import annotations

from typing import Any

from real_daemon import RealDaemon, until

TOKEN = "hunter2-is-the-value"


def assert_seen(saw: dict[str, Any]) -> None:
    assert not {"TOKEN"} & set(saw["environment"])
    assert saw["tools"] == {"use": "Uses the token", "fail": None, "talk": None, "long": None}
    assert saw["used"] == [False, [f"grüße used {len(TOKEN)}\nit is [redacted:TOKEN]\n"]]
    assert saw["failed"] == [True, ["out\n", "err\n", "fail ended with status 3"]]
    assert saw["refused"][0] is True
    assert "arguments.word: expected string" in saw["refused"][1][0]
    assert saw["unknown"][0] == -32602
    assert "unknown tool 'nothing'" in saw["unknown"][1]
    assert saw["progress"] == ["one [redacted:TOKEN]\n", "two\n"]
    assert saw["cancelled"] is True
    assert saw["again"] == [f"again used {len(TOKEN)}\nit is [redacted:TOKEN]\n"]


def assert_recorded(daemon: RealDaemon) -> None:
    """The audit log tells the same story, and no value."""

    def ended() -> dict[str, str]:
        return {r["tool"]: r["outcome"] for r in daemon.audit() if r["event"] == "call.ended"}

    until(lambda: "long" in ended())
    assert ended() == {"use": "ok", "fail": "failed", "talk": "ok", "long": "cancelled"}
    assert daemon.call("audit.verify")["ok"] is True
    assert TOKEN not in str(daemon.audit()) + daemon.log.read_text()
