"""docs/approvals.md: its files load, its commands run and print what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from asking_agent import SOURCE, Asking, answers, text
from real_daemon import RealDaemon

DOCUMENT = (Path(__file__).parents[2] / "docs/approvals.md").read_text()

#: What is another one each time, and how the document and the test write it.
VARYING = [
    (r"c-[0-9a-f]{16}", "c-ID"),
    (r"s-[0-9a-f]{16}", "s-ID"),
    (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "TIME"),
    (r"\b[0-9a-f]{64}\b|\.\.\.", "HASH"),
    (r"/\S*/tools/", "/tools/"),
    (r"[ \t]+", " "),
]


def block(kind: str, name: str, language: str) -> str:
    found = re.search(rf"<!-- {kind}: {name} -->\n```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None, name
    return found[1]


def plain(output: str) -> list[str]:
    for pattern, word in VARYING:
        output = re.sub(pattern, word, output)
    return [line.strip() for line in output.splitlines()]


def play(asking: Asking, name: str, ids: dict[str, str]) -> None:
    """Run the commands of a console block and compare what they print."""
    for part in block("session", name, "console").split("$ ")[1:]:
        command, _, expected = part.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "sandboxctl"
        for documented, real in ids.items():
            arguments = [
                real[: len(word)] if documented.startswith(word) and word[:2] == "c-" else word
                for word in arguments
            ]
        done = asking.daemon.ctl(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert plain(done.stdout) == plain(expected), command


@pytest.mark.soak
def test_the_worked_example_happens_as_written(configured: RealDaemon) -> None:
    asking = Asking(configured)
    configured.write("policies/careful.yaml", block("file", "policies/careful.yaml", "yaml"))
    configured.python_agent("writer", SOURCE, policy="careful", tools="[publish]")
    configured.tool(
        "publish",
        '#!/bin/sh\necho "online: $2"\n',
        """
        argv: ["{to}", "{title}"]
        secrets: [PUBLISH_TOKEN]
        input:
          type: object
          additionalProperties: false
          required: [to, title]
          properties: {to: {enum: [test, production]}, title: {type: string}}
        """,
    )
    manifest = configured.paths.config / "tools/publish/tool.yaml"
    text_of = manifest.read_text()
    manifest.write_text(text_of.replace("tool publish of a test", "puts a page online"))
    (configured.paths.config / "tools/publish/program").rename(manifest.with_name("publish"))
    manifest.write_text(manifest.read_text().replace("program: program", "program: publish"))
    configured.start()
    configured.set("writer", PUBLISH_TOKEN="token-of-the-example")
    calls = [{"to": "production", "title": title} for title in ("Spring \u202eelas", "Spring sale")]
    wanted = [*calls, calls[1], {"to": "test", "title": "draft"}]
    agent = asking.start(*(("call", "publish", one) for one in wanted), agent="writer")
    try:
        (first,) = asking.waiting()
        play(asking, "waiting", {"c-0f3a9be2c1d44e57": first["id"]})
        (second,) = asking.waiting()
        play(asking, "again", {"c-77d0c8a1b6e2f390": second["id"]})
        denied, *allowed = answers(asking.end(agent))
    finally:
        asking.close()
    said = re.search(r"The agent is told `(.*?)`", DOCUMENT, re.DOTALL)
    assert said is not None
    assert text(denied) == " ".join(said[1].split())
    assert [text(one) for one in allowed] == [
        "online: Spring sale\n",
        "online: Spring sale\n",
        "online: draft\n",
    ]
    explained = configured.ctl("policy", "explain", "writer", "publish", json.dumps(calls[1]))
    assert explained.returncode == 5


def test_the_hooks_of_the_document_are_a_configuration(configured: RealDaemon) -> None:
    notify = configured.write("notify", block("program", "notify", "sh"))
    notify.chmod(0o755)
    settings = block("file", "sandboxd.yaml", "yaml")
    configured.write(
        "sandboxd.yaml", settings.replace("/usr/local/lib/sandboxd/notify", str(notify))
    )
    from sandboxd.running import load

    hooks = load(configured.paths).settings.approvals
    assert hooks.webhook is not None
    assert hooks.command is not None
    assert hooks.command.argv == (str(notify),)
    subprocess.run(["/bin/sh", "-n", notify], check=True)


def test_the_notices_of_the_document_have_the_keys_of_real_ones() -> None:
    import time

    from sandboxd.broker import hooks
    from sandboxd.broker.question import Question, Waiting
    from sandboxd.policy.model import Limits

    facts = dict.fromkeys(Question.__dataclass_fields__, "x")
    question = Question(**{**facts, "secrets": (), "limits": Limits(), "arguments": {}})  # type: ignore[arg-type]
    waiting = Waiting(question, 120.0, asked_at=time.time())
    real = json.loads(hooks._notice("approval.asked", waiting, arguments=False))
    found = re.search(r'^\{"type": "approval.asked".*?\}\}$', DOCUMENT, re.M | re.S)
    assert found is not None
    documented = json.loads(found[0])
    assert documented.keys() == real.keys()
    assert documented["data"].keys() == real["data"].keys()


@pytest.mark.parametrize("command", re.findall(r"^\| `(approvals [^`]*)`", DOCUMENT, re.M))
def test_the_commands_of_the_table_parse(command: str) -> None:
    from sandboxd.cli.parser import parse

    words = re.sub(r"[\[\]]", "", command).replace("CALL", "c-1").split()
    assert parse(words).run is not None
