"""Ways around the methods and paths that rules name."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from egress_support import Names, all_of, connect_to, echo, proxy, rule, server, until
from test_gateway import headers_of, running

HOST = "api.example.com"


@pytest.mark.parametrize("early", [True, False])
async def test_a_tunnel_does_not_get_around_the_methods_of_plain_http(early: bool) -> None:
    request = b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n"
    heard = []
    for methods in (("GET",), ()):
        async with server(echo) as port:
            names = Names(**{HOST: "127.0.0.1"})
            async with proxy([rule(HOST, port, methods=methods)], names=names) as one:
                stream = await one.connect()
                with trio.fail_after(20):
                    await stream.send_all(connect_to(f"{HOST}:{port}") + request * early)
                    head = await until(stream, b"\r\n\r\n")
                    if not early:
                        await stream.send_all(request)
                    await stream.send_eof()
                    heard.append(b"DELETE" in head + await all_of(stream))
    assert heard == [False, True]  # the second is the control: no methods are named


@pytest.mark.parametrize(
    "path", ["/v1/..;/admin", "/v1/..%3bx/admin", "/v1/%252e%252e/a", "/v1/%c0%ae%c0%ae/a"]
)
async def test_a_path_that_some_servers_read_as_another_is_refused(
    authority: Path, path: str
) -> None:
    async with running(authority, paths=("/v1*",)) as one:
        answer = await one.ask("GET", path)
        control = await one.ask("GET", "/v1/a;b=c")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert control.startswith(b"HTTP/1.1 200 ")


async def test_headers_do_not_ask_for_another_method_or_path_or_bring_a_credential(
    authority: Path,
) -> None:
    async with running(authority, methods=("POST", "PATCH"), header="x-api-key") as one:
        refused = await one.ask("POST", "/", "X-HTTP-Method-Override: delete")
        control = await one.ask("POST", "/", "X-HTTP-Method-Override: PATCH",
                                "X-Original-URL: /admin", "X_Api_Key: mine")  # fmt: skip
    assert refused.startswith(b"HTTP/1.1 403 ")
    assert control.startswith(b"HTTP/1.1 200 ")
    assert len(one.upstream.requests) == 1
    assert not {b"x-original-url", b"x_api_key"} & set(headers_of(one.upstream))
