"""curl, requests and undici hold a placeholder, and the real host gets the real value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_daemon import RealDaemon
from test_proxy_clients import agent_file
from world import World

pytestmark = pytest.mark.services

KEY = "sk-real-9d3c5a7f20b14e68"
SCRIPT = r"""
echo held $TOKEN
curl -sS -H "X-Key: $TOKEN" https://$API/echo
"$PYTHON" -I -c "import os, sys; sys.path.insert(0, '$SITE'); import requests
print(requests.get('https://$API/echo', headers={'X-Key': os.environ['TOKEN']}).text.strip())"
node -e "const {fetch, EnvHttpProxyAgent} = require('$NODE_MODULES/undici')
const dispatcher = new EnvHttpProxyAgent()
const headers = {'x-key': process.env.TOKEN}
fetch('https://$API/echo', {dispatcher, headers}).then(r => r.text())
    .then(text => console.log(text.trim()))"
curl -sS -o /dev/null -w '%{http_code}\n' -H "X-Key: $TOKEN" http://$API/echo
"""


def test_each_client_sends_the_real_value_and_holds_another(
    daemon: RealDaemon, internet: World, certificate: Path, packages: Path
) -> None:
    placeholder = {"secret": "TOKEN", "hosts": ["api.example.com"],
                   "ca": str(certificate / "ca.pem")}  # fmt: skip
    allow = [{"host": "api.example.com", "ports": [80]}]
    agent_file(
        daemon, SCRIPT, certificate, packages, {"allow": allow, "placeholders": [placeholder]}
    )
    daemon.start()
    daemon.set("clients", TOKEN=KEY)
    done = daemon.ctl("run", "clients", timeout=120)
    held, *seen, plain = done.stdout.splitlines()
    # The server saw the real value and said so; what came back is masked.
    assert seen == ["[redacted:TOKEN]"] * 3, done.stderr + daemon.log.read_text()
    assert held.startswith("held sbxd-")
    assert plain == "403"
    assert KEY not in done.stdout + done.stderr
    asked = [row for row in daemon.audit() if row["event"] == "placeholder.request"]
    assert [row["injected"] for row in asked] == [[{"name": "TOKEN", "version": 1}]] * 3
    assert KEY not in json.dumps(daemon.audit())
    assert set(internet.asked()) == {"api.example.com"}
