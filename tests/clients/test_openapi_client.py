"""The OpenAPI document against a real daemon: what schemathesis asks is answered as it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from http_daemon import client_of, new_key, served

pytestmark = pytest.mark.clients

#: Left out, because a schema can't say all that a policy decides: of what is valid by the schema a
#: value may be too short to be masked, an agent may not exist, a path may lead out.
_UNFIT = "positive_data_acceptance"

#: MCP's own client suite looks after /mcp, and sandboxctl's after the operator's methods.
_ELSEWHERE = r"^/(mcp|api/v1/operator)"


def test_every_answer_is_one_that_the_document_describes(tmp_path: Path) -> None:
    schemathesis = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert schemathesis, "this test needs schemathesis: pip install -e '.[clients]'"
    with served("listen: 127.0.0.1:0\nlimits: {requests: 100000, failures: 100000}") as daemon:
        key = new_key(daemon)
        with client_of(daemon, key) as client:
            sandbox = client.post("/v1/sandboxes", json={"agent": "worker"}).json()["id"]
        (tmp_path / "schemathesis.toml").write_text(
            f'[parameters]\n"path.id" = "{sandbox}"\n"path.slug" = "worker"\n'
        )
        done = subprocess.run(
            [
                *(schemathesis, "run", f"{daemon.url}/openapi.json", "--no-color"),
                *("--phases=examples,coverage,fuzzing", "--max-examples=20", "--seed=1"),
                *("--continue-on-failure", f"--exclude-checks={_UNFIT}"),
                *(f"--exclude-path-regex={_ELSEWHERE}", "-H", f"Authorization: Bearer {key}"),
                # It would end what the others are about.
                *("--exclude-name", "DELETE /v1/sandboxes/{id}"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        log = daemon.log.read_text()
        assert "failed" not in log
        assert httpx2.get(f"{daemon.url}/healthz").status_code == 200
        assert sandbox in [row["id"] for row in daemon.call("session.list")["sessions"]]
