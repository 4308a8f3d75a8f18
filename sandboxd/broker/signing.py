"""The key that signs what webhooks are told: a private file or a systemd credential."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from sandboxd.errors import Invalid, Unavailable
from sandboxd.files import open_private, read_all
from sandboxd.policy.model import Webhook
from sandboxd.secret import Secret

__all__ = ["signing_key"]

_MIN, _MAX = 16, 4096


def signing_key(webhook: Webhook | None, *, credentials: str | None = None) -> Secret | None:
    """The webhook's key; None where requests are not to be signed.

    A line that begins with ``whsec_`` is base64 (Standard Webhooks 1.0), any other the key as it
    stands. ``credentials`` stands in for $CREDENTIALS_DIRECTORY. Raises Denied when the file isn't
    private, Unavailable when it can't be read and Invalid when what it holds is no key.
    """
    if webhook is None or (webhook.secret_file is None and webhook.credential is None):
        return None
    try:
        if webhook.secret_file is not None:
            fd = open_private(Path(webhook.secret_file), os.O_RDONLY, "the webhook's secret")
        else:  # systemd keeps it private (systemd.exec(5), CREDENTIALS)
            directory = credentials or os.environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent"
            path = Path(directory, str(webhook.credential))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(
            f"can't open the webhook's secret: {error.strerror}",
            hint="approvals: {webhook: {secret_file: PATH}} or {credential: NAME}, "
            "with LoadCredential=NAME:PATH in the unit",
        ) from None
    try:
        return _key(Secret(read_all(fd, _MAX)))
    finally:
        os.close(fd)


def _key(content: Secret) -> Secret:
    line = content.reveal().strip()
    if line.startswith(b"whsec_"):
        try:
            line = base64.b64decode(line.removeprefix(b"whsec_"), validate=True)
        except binascii.Error:
            line = b""
    key = Secret(line)
    del line  # a traceback that shows locals must not show it
    if len(key) < _MIN:
        raise Invalid(
            f"the webhook's secret has fewer than {_MIN} bytes, or no base64 after whsec_",
            hint="make one: echo whsec_$(openssl rand -base64 32)",
        )
    return key
