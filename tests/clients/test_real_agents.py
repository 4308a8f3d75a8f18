"""Real coding agents in sessions: they talk to a model without its key, and use a tool's secret.

The model is scripted (no outside network); the agents are unmodified packages. While an agent waits
for the model's last answer, everything of it is searched for both secrets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from model_server import Model, model_server
from real_daemon import RealDaemon

pytestmark = pytest.mark.clients

MODEL_KEY = "sk-model-7d2a90c15be34f68a1c0"
TOKEN = "tool-token-4be5512f09a7d3c8"
TASK = "Ask the tool about the invoice and tell me what it says."


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node_modules with the agents, readable by every session."""
    npm = shutil.which("npm")
    assert npm, "these tests need npm"
    at = tmp_path_factory.mktemp("agents")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(Path(__file__).parent / "agents" / name, at)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=at, check=True, timeout=600)
    for directory in (at, *at.parents[:2]):
        directory.chmod(0o755)
    return at / "node_modules"


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def found_in(session: str, daemon: RealDaemon) -> list[str]:
    """Where in the agent's processes, their environments and their files either secret is."""
    secrets = [MODEL_KEY.encode(), TOKEN.encode()]
    places = []
    pid = daemon.call("session.show", id=session)["pid"]
    processes = psutil.Process(pid).children(recursive=True)
    assert processes, "the agent is not running"
    for process in processes:
        top = Path(f"/proc/{process.pid}")
        for name in ("environ", "cmdline"):
            if any(secret in (top / name).read_bytes() for secret in secrets):
                places.append(f"{process.name()} {name}")
        places += [f"{process.name()} memory" for secret in secrets if in_memory(top, secret)]
        for tree in ("root/workspace", "root/home", "root/tmp"):
            for path in (top / tree).rglob("*"):
                if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
                    places.append(str(path))
    return places


def in_memory(top: Path, needle: bytes) -> bool:
    """Whether a process holds ``needle``; a few bytes more than a page are kept between pieces."""
    with (top / "mem").open("rb", 0) as memory:
        for line in (top / "maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if "r" not in rights or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            kept = b""
            try:
                memory.seek(start)
                while start < end:
                    piece = memory.read(min(end - start, 16 << 20))
                    if not piece:
                        break
                    if needle in kept + piece:
                        return True
                    kept, start = piece[-len(needle) :], start + len(piece)
            except OSError:  # reserved address space that holds nothing
                continue
    return False


@pytest.fixture(params=["anthropic", "openai"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with model_server(request.param) as found:
        yield found


def claude(daemon: RealDaemon, agents: Path, model: Model) -> None:
    program = only(agents, "@anthropic-ai/claude-code-linux-*/claude")
    servers = {"mcpServers": {"box": {"command": "sandboxd-mcp"}}}
    write(
        daemon, "claude", program.parent, "anthropic", model,
        [
            program, "-p", TASK, "--output-format", "json", "--mcp-config", json.dumps(servers),
            "--strict-mcp-config", "--allowedTools", "mcp__box__use", "--tools", "",
            "--no-session-persistence",
        ],
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", CLAUDE_CODE_MAX_RETRIES="1",
        MCP_CONNECTION_NONBLOCKING="0",
    )  # fmt: skip


def codex(daemon: RealDaemon, agents: Path, model: Model) -> None:
    program = only(agents, "@openai/codex-linux-*/vendor/*/bin/codex")
    settings = {
        "model": '"scripted"', "model_provider": '"box"',
        "model_providers.box.name": '"box"',
        "model_providers.box.base_url": '"http://127.0.0.1:4000/v1"',
        "model_providers.box.wire_api": '"responses"',
        "model_providers.box.request_max_retries": "0",
        "model_providers.box.stream_max_retries": "0",
        "approval_policy": '"never"', "sandbox_mode": '"danger-full-access"',
        "check_for_update_on_startup": "false", "web_search": '"disabled"',
        "analytics.enabled": "false", "features.plugins": "false", "features.apps": "false",
        "features.unbounded_connection_retries": "false", "features.shell_snapshot": "false",
        "mcp_servers.box.command": '"sandboxd-mcp"', "mcp_servers.box.required": "true",
        "mcp_servers.box.default_tools_approval_mode": '"approve"',
        "mcp_servers.box.env_vars": '["SANDBOXD_SOCKET"]',
    }  # fmt: skip
    overrides = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    write(
        daemon, "codex", program.parents[1], "openai", model,
        [program, "exec", "--strict-config", "--skip-git-repo-check", "--ephemeral", "--json",
         *overrides, TASK],
        CODEX_HOME="/home/agent",
    )  # fmt: skip


def write(
    daemon: RealDaemon,
    slug: str,
    folder: Path,
    preset: str,
    model: Model,
    command: list[object],
    **environment: str,
) -> None:
    gateway = (
        f"{{port: 4000, preset: {preset}, upstream: 'http://127.0.0.1:{model.port}', "
        "secret: MODEL_KEY}"
    )
    daemon.write(
        f"agents/{slug}.yaml",
        "version: 1\n"
        f"description: {slug} in a sandbox\n"
        f"command: {json.dumps([str(word) for word in command])}\n"
        "policy: models\n"
        "tools: [use]\n"
        f"mounts: [{{source: {folder}, target: {folder}}}]\n"
        f"environment: {json.dumps(environment)}\n"
        "limits: {memory: 8G, processes: 256, files: 4096}\n"
        f"egress: {{gateways: [{gateway}]}}\n",
    )
    daemon.write(
        "policies/models.yaml",
        "version: 1\ndescription: a model's API and nothing else\nextends: agent\n"
        f"network: none\negress: [{{host: 127.0.0.1, ports: [{model.port}]}}]\n",
    )


START = {"anthropic": claude, "openai": codex}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the memory of a session's processes")
def test_a_real_agent_finishes_its_task_and_holds_no_key(
    daemon: RealDaemon, agents: Path, model: Model, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["model"]
    START[kind](daemon, agents, model)
    daemon.start()
    slug = {"anthropic": "claude", "openai": "codex"}[kind]
    daemon.set(slug, MODEL_KEY=MODEL_KEY, TOKEN=TOKEN)
    seen: list[str] = []

    def search() -> None:
        (session,) = daemon.call("session.list")["sessions"]
        seen.append(session["id"])
        seen.extend(found_in(session["id"], daemon))

    model.between = search
    done = daemon.ctl("run", slug, stdin=subprocess.DEVNULL, timeout=180)
    assert model.problems == [], done.stdout + done.stderr
    # The tool got its token, and what it printed of it is masked in the agent's transcript.
    assert "the tool said" in done.stdout, done.stdout + done.stderr
    assert f"invoice used {len(TOKEN)}" in done.stdout
    assert "[redacted:TOKEN]" in done.stdout
    assert MODEL_KEY not in done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    # The model was asked with its key, by an agent that has none.
    key = MODEL_KEY if kind == "anthropic" else f"Bearer {MODEL_KEY}"
    assert set(model.credentials) == {key}
    assert len(seen) == 1, seen
    rows = daemon.audit()
    injected = [row["injected"] for row in rows if row["event"] == "gateway.request"]
    assert injected
    assert all(item == [{"name": "MODEL_KEY", "version": 1}] for item in injected)
    assert MODEL_KEY not in json.dumps(rows)


def test_the_search_finds_what_an_agent_does_hold(daemon: RealDaemon) -> None:
    """The control: the same search, of an agent that was given both by mistake."""
    if os.geteuid() != 0:
        pytest.skip("only root reads the memory of a session's processes")
    daemon.python_agent(
        "leaky",
        f"""
        import sys, time
        open("/workspace/left", "w").write("{TOKEN}")
        print("ready", flush=True)
        time.sleep(1000)
        """,
        environment=f"{{MISTAKE: {MODEL_KEY}}}",
    )
    daemon.start()
    id = daemon.call("session.start", agent="leaky", args=[], tty=False, attach=False)["id"]
    with daemon.client() as client:
        next(iter(client.stream("session.logs", id=id, follow=True)))
    places = found_in(id, daemon)
    assert any(place.endswith("environ") for place in places)
    assert any(place.endswith("memory") for place in places)
    assert any(place.endswith("root/workspace/left") for place in places)
