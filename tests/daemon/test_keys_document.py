"""docs/api-keys.md: its commands run and print what it says."""

from __future__ import annotations

import os
import pwd
import re
import shlex
from pathlib import Path

import httpx2
import jwt
from real_daemon import RealDaemon

from sandboxd.access.roles import KEY_ROLES

DOCUMENT = (Path(__file__).parents[2] / "docs/api-keys.md").read_text()

#: What is another one each time, and how the document and the test write it.
VARYING = [
    (r"key_[0-9a-f]{12}", "key_ID"),
    (r"tok_[0-9a-f]{24}", "tok_ID"),
    (r"an_sk_[0-9a-f]{6}…", "an_sk_…"),
    (r"s-[0-9a-f]{16}", "s-ID"),
    (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "TIME"),
    (rf"\b(root|{re.escape(pwd.getpwuid(os.getuid()).pw_name)})\b", "ROOT"),
    (r"[ \t]+", " "),
]


def plain(output: str) -> list[str]:
    for pattern, word in VARYING:
        output = re.sub(pattern, word, output)
    return [line.strip() for line in output.splitlines()]


class Reader:
    """Somebody who types what the document shows, with the ids that their daemon gave."""

    def __init__(self, daemon: RealDaemon, directory: Path) -> None:
        self.daemon, self.directory = daemon, directory
        self.ids: dict[str, str] = {}

    def play(self, name: str) -> None:
        found = re.search(rf"<!-- session: {name} -->\n```console\n(.*?)```", DOCUMENT, re.DOTALL)
        assert found is not None, name
        for part in found[1].split("$ ")[1:]:
            command, _, expected = part.partition("\n")
            said = self.run(command)
            assert plain(said) == plain(expected), command
            ids = r"(?:key|tok)_[0-9a-f]{12,24}"
            self.ids |= zip(re.findall(ids, expected), re.findall(ids, said), strict=True)

    def run(self, command: str) -> str:
        """What it prints; standard output goes where the command says."""
        words = shlex.split(command)
        assert words.pop(0) == "sandboxctl"
        given, target = "", None
        if words[-2] in ("<", ">"):
            arrow, file = words[-2:]
            del words[-2:]
            if arrow == "<":
                given = (self.directory / file).read_text()
            else:
                target = self.directory / file
        done = self.daemon.ctl(*(self.ids.get(word, word) for word in words), input=given)
        assert done.returncode == 0, (command, done.stderr)
        if target is not None:
            target.write_text(done.stdout)
            return done.stderr
        return done.stdout


def test_it_happens_as_written(configured: RealDaemon, tmp_path: Path) -> None:
    configured.http()
    configured.agent("reporter", "sleep 300")
    configured.start()
    reader = Reader(configured, tmp_path)
    reader.play("keys")
    key = (tmp_path / "shop.key").read_text()
    assert re.fullmatch(r"an_sk_[0-9a-f]{64}\n", key)  # the key alone
    reader.play("rotate")
    got = httpx2.post(
        f"{configured.url}/api/v1/operator/session.start",
        json={"agent": "reporter"},
        headers={"authorization": f"Bearer {key.strip()}"},
        timeout=30,
    )
    assert got.status_code == 200, got.text
    reader.play("tokens")
    reader.play("deactivate")
    events = {record["event"] for record in configured.audit()}
    told = DOCUMENT.partition("## What is recorded")[2].partition(";")[0]
    assert events & set(re.findall(r"`([a-z_.]+)`", told)) == {
        "key.created",
        "key.rotated",
        "key.deactivated",
        "token.created",
        "token.revoked",
    }

    claims = jwt.decode(
        (tmp_path / "ann.token").read_text().strip(), options={"verify_signature": False}
    )
    assert not [name for name in claims if f"`{name}`" not in DOCUMENT]
    assert not [role for role in KEY_ROLES if f"| `{role}` |" not in DOCUMENT]
