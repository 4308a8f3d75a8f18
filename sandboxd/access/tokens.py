"""Tokens: JSON Web Tokens (RFC 7519) that an API key makes for an application's users.

What is accepted is narrower than what the standard allows: the header has exactly the members that
ours have, the algorithm is EdDSA whatever the header says (RFC 8725, 3.1), the key is one of ours
by its ``kid``, and every claim is there with its type. Signature, audience and issuer are PyJWT's
to check; times go by our own clock, which never goes back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sandboxd.access.signing import SigningKey, SigningKeys
from sandboxd.secret import Secret

__all__ = [
    "AUDIENCE",
    "DEFAULT_LIFETIME",
    "LEEWAY",
    "LONGEST_LIFETIME",
    "MAX_BEARER",
    "Claims",
    "Clock",
    "Token",
    "is_jti",
    "issuer_of",
    "new_jti",
    "read",
    "write",
]

#: Seconds since 1970.
Clock = Callable[[], float]

AUDIENCE = "sandboxd"
DEFAULT_LIFETIME = 3600.0
LONGEST_LIFETIME = 86400.0

#: How far the clocks of two hosts may be apart, in seconds.
LEEWAY = 30

#: Longest key or token that is looked at, in characters.
MAX_BEARER = 8192

_HEADER = {"alg", "kid", "typ"}
_JTI = re.compile(r"tok_[0-9a-f]{24}")


@dataclass(frozen=True)
class Token:
    """A token to hand out. ``token`` is shown to who asked for it and nowhere else."""

    token: Secret
    expires_at: float
    jti: str


@dataclass(frozen=True)
class Claims:
    """What a token says. ``agents`` None: all that its key reaches."""

    issuer: str
    key: str
    team: str
    subject: str
    agents: tuple[str, ...] | None
    jti: str
    issued_at: int
    expires_at: int


def issuer_of(store: str) -> str:
    """Who made a token: this installation, by its store's public identity."""
    return f"urn:sandboxd:{store}"


def new_jti() -> str:
    return "tok_" + os.urandom(12).hex()


def is_jti(text: str) -> bool:
    return _JTI.fullmatch(text) is not None


def write(claims: Claims, key: SigningKey) -> Token:
    """The token that says this, signed."""
    import jwt  # 2 MB that a daemon without tokens never needs

    payload = {
        "iss": claims.issuer,
        "aud": AUDIENCE,
        "sub": claims.subject,
        "team": claims.team,
        "agents": None if claims.agents is None else list(claims.agents),
        "jti": claims.jti,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
        "key": claims.key,
    }
    text = Secret(jwt.encode(payload, key.private, algorithm="EdDSA", headers={"kid": key.kid}))
    return Token(text, float(claims.expires_at), claims.jti)


def read(bearer: str, keys: SigningKeys, issuer: str, now: float) -> Claims | None:
    """What a valid token says; None for everything else, for whatever reason."""
    import jwt

    if len(bearer) > MAX_BEARER:
        return None
    try:
        header = jwt.get_unverified_header(bearer)
        if set(header) != _HEADER or (header["alg"], header["typ"]) != ("EdDSA", "JWT"):
            return None
        key = keys.find(header["kid"], now)
        if key is None:
            return None
        payload = jwt.decode(
            bearer,
            key.public,
            algorithms=["EdDSA"],
            audience=AUDIENCE,
            issuer=issuer,
            options={
                "require": ["iss", "aud", "sub", "jti", "iat", "exp"],
                "strict_aud": True,
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        return None
    claims = _claims(payload)
    return claims if claims is not None and _timely(claims, key, now) else None


def _timely(claims: Claims, key: SigningKey, now: float) -> bool:
    """Issued and not expired, no longer lived than any of ours, signed while its key signed."""
    return (
        claims.issued_at <= now + LEEWAY
        and now - LEEWAY < claims.expires_at
        and 0 < claims.expires_at - claims.issued_at <= LONGEST_LIFETIME
        and (key.retired_at is None or claims.issued_at <= key.retired_at + LEEWAY)
    )


def _claims(payload: Mapping[str, Any]) -> Claims | None:
    texts = [payload.get(name) for name in ("iss", "key", "team", "sub", "jti")]
    times = [payload.get("iat"), payload.get("exp")]
    agents = payload.get("agents", ())
    if (
        not all(isinstance(text, str) and text for text in texts)
        or not all(type(at) is int for at in times)
        or not (agents is None or isinstance(agents, list))
        or not all(isinstance(agent, str) for agent in agents or ())
        or not is_jti(str(payload["jti"]))
    ):
        return None
    return Claims(
        issuer=payload["iss"],
        key=payload["key"],
        team=payload["team"],
        subject=payload["sub"],
        agents=None if agents is None else tuple(agents),
        jti=payload["jti"],
        issued_at=payload["iat"],
        expires_at=payload["exp"],
    )
