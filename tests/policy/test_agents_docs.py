"""docs/agents.md: its files load, and say what the text says."""

from __future__ import annotations

import re
from pathlib import Path

from sandboxd.paths import shipped
from sandboxd.policy import load_config
from sandboxd.policy.decide import session_terms
from sandboxd.policy.destinations import destination
from sandboxd.policy.egress import decide_egress, egress_lines

DOCUMENT = Path(__file__).parents[2] / "docs/agents.md"


def test_the_recipes_load_and_reach_their_model_alone(tmp_path: Path) -> None:
    files = re.findall(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert [name for name, _ in files] == [
        "policies/models.yaml",
        "agents/claude.yaml",
        "agents/codex.yaml",
    ]
    installed, directory = tmp_path / "opt", tmp_path / "config"
    installed.mkdir()
    for name, text in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        # Where the packages are installed differs; the mounts have to be there.
        (directory / name).write_text(re.sub(r"/opt/(claude|codex)\b", str(installed), text))
    config = load_config(
        directory, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    for slug, upstream in (("claude", "api.anthropic.com"), ("codex", "api.openai.com")):
        terms = session_terms(config, config.agents[slug])
        assert terms.network == "none"
        assert any(upstream in line for line in egress_lines(terms.egress))
        (gateway,) = terms.egress.egress.gateways
        assert gateway.destination == destination(upstream, 443)
        # The proxy reaches nothing: the gateway is all there is.
        assert decide_egress(terms.egress, destination(upstream, 443)).admission is None
