"""What an operator accepted is what an agent can call; anything else is refused, and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from mcp_support import Servers, text_of

from sandboxd.errors import StoreError
from sandboxd.policy.definitions import digest_of
from sandboxd.policy.mcpserver import with_pins
from sandboxd.policy.pinstore import PinStore
from sandboxd.secret import Secret

pytestmark = pytest.mark.soak


async def test_a_server_has_no_tools_before_they_are_accepted(servers: Servers) -> None:
    servers.server()
    session = servers.session()
    assert servers.broker.calls.tools(session) == []
    assert (await servers.call("echo")).outcome == "denied"
    assert session.config.warnings == (
        "tools/kit/tool.yaml: the tools of kit were never accepted, so it has none; "
        "see: sandboxctl tools accept kit",
    )
    await servers.accept()
    names = [tool.name for tool in servers.broker.calls.tools(servers.session())]
    assert "kit__echo" in names
    assert len(names) == 17
    assert (await servers.call("echo", {"word": "now"})).outcome == "ok"


@pytest.mark.parametrize(
    ("mode", "told", "what"),
    [
        ("changed", "echo changed", "changed since it was accepted"),
        ("fewer", "echo is gone", "is not offered any more"),
        ("hidden", "echo is gone", "is not offered any more"),
        ("twins", "echo is gone", "is not offered any more"),
    ],
)
async def test_a_change_after_approval_is_refused_and_recorded(
    servers: Servers, mode: str, told: str, what: str
) -> None:
    servers.server()
    await servers.accept()
    servers.server(environment={"MODE": mode})
    result = await servers.call("echo", {"word": "x"})
    assert result.outcome == "denied"
    assert f"kit__echo {what}" in result.message
    assert result.hint == "an operator can look at the change: sandboxctl tools accept kit"
    (record,) = servers.broker.records("server.changed")
    assert record["tools"] == [told]
    assert (await servers.call("count")).outcome == "ok"  # what is as it was still works


async def test_a_server_that_changes_while_it_lives_is_seen(servers: Servers) -> None:
    servers.server(lifetime="session")
    await servers.accept()
    async with servers.attached() as session:
        assert (await servers.call("echo", session=session)).outcome == "ok"
        assert (await servers.call("change", session=session)).outcome == "ok"
        refused = await servers.call("echo", session=session)
        assert (refused.outcome, "changed since it was accepted" in refused.message) == (
            "denied",
            True,
        )
        assert (await servers.call("count", session=session)).outcome == "ok"


async def test_accepting_the_change_brings_the_tool_back(servers: Servers) -> None:
    servers.server()
    before = await servers.accept()
    servers.server(environment={"MODE": "changed"})
    after = await servers.accept()
    assert before.digest != after.digest
    result = await servers.call("echo", {"word": "x"})
    assert (result.outcome, text_of(result)) == ("ok", "x")


async def test_only_what_the_manifest_names_is_offered(servers: Servers) -> None:
    servers.server(tools=["echo", "count"])
    await servers.accept()
    names = [tool.name for tool in servers.broker.calls.tools(servers.session())]
    assert names == ["kit__count", "kit__echo"]
    assert (await servers.call("tell")).outcome == "denied"


async def test_a_manifest_can_name_the_definitions(servers: Servers) -> None:
    servers.server()
    pin = await servers.accept()
    servers.server(definitions=pin.digest)
    assert (await servers.call("echo")).outcome == "ok"
    servers.server(definitions="sha256:" + "0" * 64)
    assert (await servers.call("echo")).outcome == "denied"
    assert "isn't what its 'definitions' names" in servers.session().config.warnings[0]


async def test_hidden_text_and_look_alikes_are_not_offered(servers: Servers) -> None:
    servers.server(environment={"MODE": "hidden"})
    definitions, problems = await servers.probe()
    assert "echo" not in {d.name for d in definitions}
    assert problems == ("echo: its definition holds U+E0041, which nobody who reviews it can see",)
    servers.server(environment={"MODE": "twins"})
    definitions, problems = await servers.probe()
    assert not {"echo", "ECHO"} & {d.name for d in definitions}
    assert problems == ("'ECHO': another tool has this name as well",)


async def test_pins_survive_in_a_file_that_nobody_can_forge(
    servers: Servers, tmp_path: Path
) -> None:
    servers.server()
    pin = await servers.accept()
    key, path = Secret(b"k" * 32), tmp_path / "accepted"
    store = PinStore.open(path, key)
    store.put(pin)
    assert path.stat().st_mode & 0o777 == 0o600
    again = PinStore.open(path, key).pins
    assert again["kit"].digest == pin.digest == digest_of(pin.definitions)
    assert with_pins(servers.broker.config, again).tools.keys() >= {"kit__echo", "kit__add"}
    path.write_bytes(path.read_bytes().replace(b"says a word again", b"says a word a9ain"))
    with pytest.raises(StoreError, match="can't be trusted"):
        PinStore.open(path, key)
    store.remove("kit")
    assert not PinStore.open(path, key).pins
    with pytest.raises(StoreError, match="can't be trusted"):
        PinStore.open(path, Secret(b"x" * 32))
