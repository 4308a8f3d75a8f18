"""``sandboxctl session cp``: into a session, out of one, and nothing that leads elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli_support import Ctl

AGENT = """
rm -rf /workspace/* && mkdir -p tree/empty && echo one > tree/one && printf '\\0' > tree/bytes
chmod 755 tree/bytes; ln -s /etc/passwd tree/link; echo ready; exec sleep 1000
"""


@pytest.fixture
def session(daemon: Ctl) -> str:
    id = daemon("session", "start", "sh", "--", "-c", AGENT).stdout.strip()
    for _ in range(200):
        if "ready" in daemon("session", "logs", id).stdout:
            return id
    raise AssertionError("the agent never began")


def test_a_file_goes_in_and_comes_out(daemon: Ctl, session: str, tmp_path: Path) -> None:
    here = tmp_path / "data"
    here.write_bytes(b"a\0\xff")
    here.chmod(0o755)
    done = daemon("session", "cp", str(here), f"{session}:in/")
    assert "copied 1 file" in done.stderr
    daemon("session", "cp", f"{session}:/workspace/in/data", f"{tmp_path}/back")
    assert (tmp_path / "back").read_bytes() == b"a\0\xff"
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o755
    daemon("session", "cp", f"{session[:12]}:tree/one", str(tmp_path))
    assert (tmp_path / "one").read_text() == "one\n"
    assert daemon("session", "cp", f"{session}:tree/one", "-").stdout == "one\n"
    daemon("session", "cp", "-", f"{session}:piped", stdin=b"by a pipe")
    assert daemon("session", "cp", f"{session}:piped", "-").stdout == "by a pipe"
    daemon("session", "stop", "--grace", "0", session)


def test_a_directory_goes_in_and_comes_out(daemon: Ctl, session: str, tmp_path: Path) -> None:
    told = daemon.json("session", "cp", "-r", f"{session}:tree", str(tmp_path / "out"))
    assert told == {"files": 2, "bytes": 5, "left_out": ["tree/link"]}
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*"))
    assert found == ["bytes", "empty", "one"]
    assert (tmp_path / "out/bytes").stat().st_mode & 0o111
    for n in range(300):
        (tmp_path / "out" / f"n{n}").write_text(str(n))
    (tmp_path / "out/link").symlink_to("/etc/passwd")
    told = daemon.json("session", "cp", "-r", str(tmp_path / "out"), f"{session}:copy")
    assert (told["files"], told["left_out"]) == (302, [str(tmp_path / "out/link")])
    listed = daemon(
        "session", "exec", session, "--", "/bin/sh", "-c", "ls copy | wc -l; cat copy/n299"
    )
    assert listed.stdout.split() == ["303", "299"]
    daemon("session", "stop", "--grace", "0", session)


def test_what_can_not_be_copied_says_why(daemon: Ctl, session: str, tmp_path: Path) -> None:
    for words, said in (
        ((f"{session}:tree", str(tmp_path)), "copy all of it with -r"),
        ((f"{session}:tree/link", str(tmp_path)), "symbolic link"),
        ((f"{session}:../etc/passwd", str(tmp_path)), "'..'"),
        ((str(tmp_path / "absent"), f"{session}:x"), "no such file"),
        (("a", "b"), "one of SOURCE and TARGET is in a session"),
        ((f"{session}:a", f"{session}:b"), "one of SOURCE and TARGET is in a session"),
    ):
        refused = daemon("session", "cp", *words, status=None)
        assert refused.returncode in (2, 4), words
        assert said in refused.stderr
    absent = daemon("session", "cp", f"{session}:absent", str(tmp_path), status=3)
    assert "does not exist" in absent.stderr
    assert list(tmp_path.iterdir()) == []  # and nothing is left of it
    # A link that stands here in the way is not written through.
    (tmp_path / "one").symlink_to(tmp_path / "elsewhere")
    daemon("session", "cp", f"{session}:tree/one", str(tmp_path / "one"), status=2)
    assert not (tmp_path / "elsewhere").exists()
    daemon("session", "stop", "--grace", "0", session)
