"""An upstream's answer on its way back into a sandbox: searched for credentials as it streams."""

from __future__ import annotations

from collections.abc import Mapping

import h11
import httpcore2

from sandboxd.egress.forward import passed_on
from sandboxd.egress.search import search
from sandboxd.egress.wire import Client, Refused
from sandboxd.redact.stream import Redactor
from sandboxd.secret import Secret

__all__ = ["send_back"]

_NOT_BACK = frozenset((b"set-cookie", b"content-length", b"alt-svc", b"strict-transport-security"))


async def send_back(
    client: Client,
    response: httpcore2.Response,
    redactor: Redactor,
    values: Mapping[str, Secret],
    *,
    cookies: bool = False,
) -> None:
    """Pass an answer on. Raises Refused when it can't be searched, before any of it is sent.

    Raises BrokenResourceError when it breaks off: the client learns by the end of its connection
    that it isn't whole.
    """
    encoding = dict(response.headers).get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b""):
        raise Refused(502, "the upstream's answer is compressed, and can't be searched")
    dropped = _NOT_BACK - {b"set-cookie"} if cookies else _NOT_BACK
    headers = passed_on([(n.lower(), v) for n, v in response.headers])
    kept = [(n, _without(v, values, redactor)) for n, v in headers if n not in dropped]
    bodiless = response.status in (204, 304) or response.status < 200
    if not bodiless and not any(name == b"transfer-encoding" for name, _ in kept):
        kept.append((b"transfer-encoding", b"chunked"))
    await client.send(h11.Response(status_code=response.status, headers=kept))

    async def give(data: bytes) -> None:
        await client.send(h11.Data(data=data))

    await search(response.aiter_stream(), redactor, give)
    await client.send(h11.EndOfMessage())


def _without(value: bytes, secrets: Mapping[str, Secret], body: Redactor) -> bytes:
    for secret in secrets.values():
        value = value.replace(secret.reveal(), b"[redacted]")
    redactor = Redactor(body.matcher)  # in other forms, such as that of user name and password
    return redactor.feed(value) + redactor.flush()
