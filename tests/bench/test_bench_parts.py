"""Every part of the bench runs, with tiny counts. Nothing here asks how long anything took."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import calls, ends, network, peers, redact, report, stage, stages, starts
from bench.__main__ import PARTS, main

TINY = ("--runs", "2", "--rounds", "1", "--callers", "2", "--sessions", "2", "--no-peers")


def measure(tmp_path: Path, *what: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    assert main([*what, *TINY, "--json", str(file)]) == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["invalid"] == []
    assert set(figures["parts"]) == set(what)
    assert len(figures["goals"]) == len(report.GOALS)
    return figures


def names(part: dict[str, Any]) -> set[str]:
    """Everything that was measured, or is told to be missing, by its name."""
    return {each["name"] for each in part["variants"]} | set(part.get("absent", ()))


@pytest.mark.soak
def test_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = measure(tmp_path, "launch")["parts"]["launch"]
    assert names(part) == {"posix_spawn", "sandboxd"}
    assert [each["runs"] for each in part["variants"]] == [2, 2]
    assert all(each["median_ms"] > 0 for each in part["variants"])
    assert "launch only, full isolation, beside `posix_spawn`" in capsys.readouterr().out


@pytest.mark.soak
def test_whole_calls(tmp_path: Path) -> None:
    part = measure(tmp_path, "calls")["parts"]["calls"]
    assert names(part) == {calls.OURS, calls.PLAIN, calls.BWRAP}
    assert set(part["absent"]) == (set() if shutil.which("bwrap") else {calls.BWRAP})


@pytest.mark.soak
def test_idle_sessions_and_session_start(tmp_path: Path) -> None:
    figures = measure(tmp_path, "idle", "start")
    idle = figures["parts"]["idle"]
    assert idle["sessions"] == 2
    assert idle["daemon_bytes"]["broker"] > 1 << 20
    assert idle["session_rss_bytes"] > 1 << 16
    assert names(figures["parts"]["start"]) == {starts.OURS, starts.BWRAP}


@pytest.mark.soak
def test_downloads_through_the_proxy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SIZE", 1 << 20)
    part = measure(tmp_path, "network")["parts"]["network"]
    for rows in (part["small"], part["large"]):
        assert [each["name"] for each in rows] == [network.DIRECT, network.PROXIED]
        assert all(each["median_ms"] > 0 for each in rows)
    assert part["size"] == 1 << 20
    assert "large download through the proxy, beside direct" in capsys.readouterr().out


@pytest.mark.soak
def test_stages_account_for_a_whole_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stages.json"
    assert main(["stages", "--runs", "3", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert all(f"not traced, for it has moved: {place}" in printed for place in told["missing"])
    assert told["calls"] == told["starts"] == 3
    starting = {line["stage"] for line in told["start_stages"]}
    assert {"snapshot", "record session.started", "keep its record", "launch"} <= starting
    found = {line["stage"] for line in told["stages"]}
    short = stages.shortened(told["stages"])
    assert sum(line["share"] for line in short) == pytest.approx(1)
    assert short[-1]["stage"] == "all others"
    assert {"parse", "decide", "record call.decided", "fdatasync", "launch",
            "record call.ended", "write"} <= found, "see bench/traced.py, HOOKS"  # fmt: skip
    assert sum(line["share"] for line in told["stages"]) == pytest.approx(1)
    assert "socket, and the caller" in printed


@pytest.mark.soak
def test_a_profile_shares_out_the_cpu_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    assert main(["stages", "--profile", "--runs", "3", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert {"trio", "mcp", "sandboxd.broker"} <= {line["name"] for line in told["packages"]}
    assert told["functions"][0]["cpu"] > 0
    assert "times a call" in capsys.readouterr().out


def test_every_moment_belongs_to_one_stage() -> None:
    spans = [("a", 10, 40), ("b", 20, 30), ("late", 55, 90), ("call", 0, 60)]
    assert stages.account(spans, 0, 60) == {
        "between": 10,
        "a": 20,
        "b": 10,
        "between: after a": 15,
        "late": 5,
    }


def test_launches_leave_nothing(tmp_path: Path) -> None:
    file = tmp_path / "leaks.json"
    main(["leaks", "--runs", "5", "--json", str(file)])
    told = json.loads(file.read_text())
    assert told["before"]["processes"] >= 1
    assert told["after"]["zombies"] == 0


def test_every_tree_is_gone_when_its_end_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ends.json"
    assert main(["ends", "--runs", "1", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert (set(told["games"]), told["lacking"]) == (set(ends.GAMES), [])
    assert "never stops forking" in capsys.readouterr().out


def test_a_call_that_goes_wrong_is_no_figure() -> None:
    with stage.open_stage() as on:
        caller = stage.Caller(on)
        with pytest.raises(SystemExit, match="a call went wrong"):
            caller.order(1, tool="no_such_tool")
        with pytest.raises(SystemExit, match="a call went wrong"):
            caller.order(1, holds="what no answer holds")
        assert len(caller.order(7, callers=3)["seconds"]) == 7
        caller.close()


def test_what_is_not_measured_is_told_with_the_reason(tmp_path: Path) -> None:
    with peers.Peers(stage.program("true"), names=("nsjail", "no-such-peer")) as found:
        here = {peer.name for peer in found.here}
    assert here | set(found.absent) == {"nsjail", "no-such-peer"}
    assert found.absent["no-such-peer"] == "not installed: python -m bench install"
    words = {goal["here"] for goal in report.judge({})}
    assert words == {"not measured in this run"}


@pytest.mark.peers
def test_the_whole_bench_with_every_peer(tmp_path: Path) -> None:
    file, drawing, document = (tmp_path / name for name in ("f.json", "f.svg", "performance.md"))
    document.write_text(
        "before\n<!-- results: root --><!-- end of results -->\n"
        "<!-- results: user --><!-- end of results -->\nafter\n"
    )
    tiny = [word for word in TINY if word != "--no-peers"]
    more = ["--json", str(file), "--plot", str(drawing), "--write", str(document)]
    assert main([*tiny, *more]) == 0
    figures = json.loads(file.read_text())
    assert set(figures["parts"]) == set(PARTS)
    launch = figures["parts"]["launch"]
    assert launch["absent"] == {}, "see: python -m bench install"
    assert names(launch) == {"posix_spawn", "sandboxd", *peers.NAMES}
    assert names(figures["parts"]["throughput"]) == {calls.OURS, calls.PLAIN, calls.BWRAP}
    assert all(goal["met"] is not None for goal in figures["goals"])
    ElementTree.fromstring(drawing.read_text())
    written = document.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert written.count("<!-- end of results -->") == 2
    assert f"{launch['variants'][1]['median_ms']:.2f}" in written
    document.write_text(written.replace("before", "again"))
    assert main(["--from", str(file), "--write", str(document)]) == 0
    assert document.read_text() == written.replace("before", "again")


def test_searching_output_for_values() -> None:
    figures = redact.measure(1, size=1 << 18)
    # Each text had a value, which was masked.
    assert not [text for text in figures["lacking"] if not text.startswith("the automaton")]
    assert {row["secrets"] for row in figures["rates"]} == {1, 3, 100}
    assert all(row["mb_per_s"] > 0 for row in figures["rates"])
    assert all(row["us"] > 0 for row in figures["prepare"])
    text = redact.table(figures)
    assert "MB/s of log with 100 values" in text
    assert "source code" in text
