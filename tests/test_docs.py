"""The documents stay true: their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sandboxd.cli.parser import parse
from sandboxd.paths import shipped
from sandboxd.policy import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("tools/*/*.md")]
)
BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """The ``sandboxctl`` calls in shell blocks, split as a shell does, comments left out."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").removeprefix("sudo ")
            for part in re.split(r"\s(?:\|\|?|&&|&|;|>|<)\s", line):
                part = re.sub(r"^\S*/(?=sandboxctl\b)", "", part.strip())
                part = part.removeprefix("sudo ")
                if part.startswith("sandboxctl "):
                    found.append(shlex.split(part, comments=True)[1:])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_to_files(path: Path) -> None:
    targets = [t for t in LINK.findall(path.read_text()) if "://" not in t]
    missing = [t for t in targets if not (path.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_sandboxctl_commands_parse(path: Path) -> None:

    for arguments in commands(path.read_text()):
        if not {"--help", "-h", "--version"} & set(arguments):
            try:
                parse(arguments)
            except SystemExit as refused:
                pytest.fail(
                    f"{name(path)}: sandboxctl {shlex.join(arguments)}: exit {refused.code}"
                )


def test_commands_are_found_in_blocks() -> None:
    text = (
        "```sh\n$ sudo .venv/bin/sandboxctl env list x | cat\nsandboxctl run y -- 'a b' # c\n```\n"
    )
    assert commands(text) == [["env", "list", "x"], ["run", "y", "--", "a b"]]


def test_an_unknown_command_would_be_noticed() -> None:
    with pytest.raises(SystemExit):
        parse(["no-such-command"])


def test_the_files_that_the_tools_page_shows_load(tmp_path: Path) -> None:
    shown = re.findall(
        r"^```\w+\n# ((?:tools|policies)/\S+)\n(.*?)^```",
        (ROOT / "docs" / "tools.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert {"tools/weather/weather.py", "tools/count/tool.yaml"} <= {path for path, _ in shown}
    for path, text in shown:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    config = load_config(
        tmp_path, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    assert {"weather", "count"} <= set(config.tools)
    assert {"careful", "reporting"} <= set(config.policies)
