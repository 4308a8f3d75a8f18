"""A token is accepted when every part of it is as ours are, and else not: RFC 8725's list."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sandboxd.access.signing import SigningKey, SigningKeys, new_signing_key
from sandboxd.access.tokens import AUDIENCE, LEEWAY, Claims, issuer_of, new_jti, read, write
from sandboxd.vault.credentials import SigningRow

NOW = 1_800_000_000.0
ISSUER = issuer_of("ab" * 16)
OVERLAP = 86400 + LEEWAY


def keys(*created: float) -> SigningKeys:
    rows = [SigningRow(n, at, new_signing_key()) for n, at in enumerate(created, 1)]
    return SigningKeys(rows, overlap=OVERLAP)


@pytest.fixture
def signing() -> SigningKeys:
    return keys(NOW - 1000)


def current(signing: SigningKeys) -> SigningKey:
    assert signing.current is not None
    return signing.current


def claims(**changed: Any) -> Claims:
    fields: dict[str, Any] = {
        "issuer": ISSUER,
        "key": "key_0123456789ab",
        "team": "blue",
        "subject": "ann@example.org",
        "agents": ("crawler",),
        "jti": "tok_" + "0" * 24,
        "issued_at": int(NOW),
        "expires_at": int(NOW) + 3600,
    }
    return Claims(**fields | changed)


def payload(**changed: Any) -> dict[str, Any]:
    said = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ann@example.org",
        "team": "blue",
        "agents": ["crawler"],
        "jti": "tok_" + "0" * 24,
        "iat": int(NOW),
        "exp": int(NOW) + 3600,
        "key": "key_0123456789ab",
    }
    return {name: value for name, value in (said | changed).items() if value != "left out"}


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(key: SigningKey, header: Mapping[str, Any], said: Any) -> str:
    """A token with our own signature, whatever it says."""
    text = f"{part(dict(header))}.{part(said)}"
    return f"{text}.{part(key.private.sign(text.encode()))}"


def header(key: SigningKey, **changed: Any) -> dict[str, Any]:
    said = {"alg": "EdDSA", "kid": key.kid, "typ": "JWT"} | changed
    return {name: value for name, value in said.items() if value != "left out"}


def test_a_token_says_what_it_was_made_with(signing: SigningKeys) -> None:
    for agents in (("crawler", "mailer"), None):
        made = claims(agents=agents, jti=new_jti())
        token = write(made, current(signing))
        assert read(token.token.reveal().decode(), signing, ISSUER, NOW) == made
        assert (token.jti, token.expires_at) == (made.jti, made.expires_at)
        assert "eyJ" not in repr(token)


def test_the_tests_own_tokens_are_accepted(signing: SigningKeys) -> None:
    """The positive control of every refusal below."""
    key = current(signing)
    assert read(signed(key, header(key), payload()), signing, ISSUER, NOW) == claims()


def test_any_verifier_of_the_published_keys_accepts_it(signing: SigningKeys) -> None:
    text = write(claims(), current(signing)).token.reveal().decode()
    found = jwt.PyJWKSet.from_dict(signing.jwks(NOW))[jwt.get_unverified_header(text)["kid"]]
    options: Any = {"verify_exp": False, "verify_iat": False}
    said = jwt.decode(text, found, audience=AUDIENCE, issuer=ISSUER, options=options)
    assert set(said) == {"iss", "aud", "sub", "team", "agents", "jti", "iat", "exp", "key"}


def test_the_published_keys_are_public(signing: SigningKeys) -> None:
    (published,) = signing.jwks(NOW)["keys"]
    assert set(published) == {"kty", "crv", "x", "kid", "use", "alg"}  # and no "d"
    members = '{"crv":"Ed25519","kty":"OKP","x":"' + published["x"] + '"}'  # RFC 7638
    assert published["kid"] == part(hashlib.sha256(members.encode()).digest())


@pytest.mark.parametrize(
    "changed",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "HS256"},
        {"alg": "eddsa"},
        {"alg": "Ed25519"},
        {"alg": "left out"},
        {"alg": ["EdDSA"]},
        {"typ": "left out"},
        {"typ": "at+jwt"},
        {"kid": "left out"},
        {"kid": ""},
        {"kid": None},
        {"kid": 1},
        {"kid": ["x"]},
        {"kid": "../../../dev/null"},
        {"kid": "' OR 1=1 --"},
        {"kid": "A" * 43},
        {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}},
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/cert"},
        {"crit": ["exp"]},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
        {"cty": "JWT"},
        {"zip": "DEF"},
    ],
)
def test_a_header_unlike_ours_is_refused(signing: SigningKeys, changed: dict[str, Any]) -> None:
    key = current(signing)
    assert read(signed(key, header(key, **changed), payload()), signing, ISSUER, NOW) is None


def test_no_signature_is_refused(signing: SigningKeys) -> None:
    key = current(signing)
    for alg in ("none", "EdDSA"):
        text = f"{part(header(key, alg=alg))}.{part(payload())}."
        assert read(text, signing, ISSUER, NOW) is None


def test_the_public_key_is_no_hmac_key(signing: SigningKeys) -> None:
    """RFC 8725, 2.1: HS256 keyed with what the JWKS publishes, in each spelling."""
    key = current(signing)
    spellings = [
        key.public.public_bytes_raw(),
        key.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        key.x.encode(),
        json.dumps(key.jwk()).encode(),
    ]
    for secret in spellings:
        for alg in ("HS256", "EdDSA"):
            text = f"{part(header(key, alg=alg))}.{part(payload())}"
            mac = hmac.digest(secret, text.encode(), "sha256")
            assert read(f"{text}.{part(mac)}", signing, ISSUER, NOW) is None


def test_somebody_elses_keys_are_refused(signing: SigningKeys) -> None:
    kid = current(signing).kid
    text = f"{part(header(current(signing)))}.{part(payload())}".encode()
    signatures = [
        Ed25519PrivateKey.generate().sign(text),
        ed448.Ed448PrivateKey.generate().sign(text),
        bytes(64),
        b"",
    ]
    for signature in signatures:
        assert read(f"{text.decode()}.{part(signature)}", signing, ISSUER, NOW) is None
    others = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for alg in ("RS256", "PS256"):
        forged = jwt.encode(payload(), others, algorithm=alg, headers={"kid": kid})
        assert read(forged, signing, ISSUER, NOW) is None


def test_every_changed_byte_is_noticed(signing: SigningKeys) -> None:
    text = write(claims(), current(signing)).token.reveal().decode()
    for place in range(len(text) - 1):  # the last character has bits that mean nothing
        if text[place] == ".":
            continue
        other = "A" if text[place] != "A" else "B"
        changed = text[:place] + other + text[place + 1 :]
        assert read(changed, signing, ISSUER, NOW) is None, place


@pytest.mark.parametrize(
    "changed",
    [
        *({name: "left out"} for name in payload()),
        {"iss": "urn:sandboxd:" + "cd" * 16},
        {"iss": [ISSUER]},
        {"aud": "somebody-else"},
        {"aud": [AUDIENCE, "somebody-else"]},
        {"aud": None},
        {"sub": 7},
        {"sub": ""},
        {"team": ""},
        {"team": None},
        {"team": ["blue"]},
        {"agents": "crawler"},
        {"agents": {"crawler": 1}},
        {"agents": ["crawler", 1]},
        {"agents": [["crawler"]]},
        {"jti": "tok_1"},
        {"jti": 5},
        {"key": None},
        {"iat": str(int(NOW))},
        {"iat": True},
        {"iat": NOW + 0.5},
        {"iat": None},
        {"exp": None},
        {"exp": float("inf")},
        {"exp": 1e400},
        {"exp": str(int(NOW) + 3600)},
        {"exp": True},
    ],
    ids=str,
)
def test_a_claim_unlike_ours_is_refused(signing: SigningKeys, changed: dict[str, Any]) -> None:
    key = current(signing)
    assert read(signed(key, header(key), payload(**changed)), signing, ISSUER, NOW) is None


@pytest.mark.parametrize("said", [[], "text", 5, None, b"\xff\xfe", b"{", b"", b'{"a":' * 1000])
def test_what_is_no_object_is_refused(signing: SigningKeys, said: Any) -> None:
    key = current(signing)
    assert read(signed(key, header(key), said), signing, ISSUER, NOW) is None


@pytest.mark.parametrize(
    ("issued", "expires", "accepted"),
    [
        (0, 3600, True),
        (LEEWAY, 3600, True),
        (LEEWAY + 1, 3600, False),  # from the future
        (-3600, -LEEWAY + 1, True),
        (-3600, -LEEWAY, False),  # expired
        (-3600, -100_000, False),  # ended before it began
        (0, 0, False),
        (-10, 86390, True),
        (-10, 86391, False),  # longer than any of ours
    ],
)
def test_times(signing: SigningKeys, issued: int, expires: int, accepted: bool) -> None:
    key = current(signing)
    said = payload(iat=int(NOW) + issued, exp=int(NOW) + expires)
    assert (read(signed(key, header(key), said), signing, ISSUER, NOW) is not None) is accepted


@pytest.mark.parametrize("text", ["", ".", "..", "...", "a.b.c", "é.é.é", "\0.\0.\0", "." * 9000])
def test_what_is_no_token_is_refused(signing: SigningKeys, text: str) -> None:
    assert read(text, signing, ISSUER, NOW) is None


def test_a_long_token_is_not_looked_at(signing: SigningKeys) -> None:
    key = current(signing)
    fits = signed(key, header(key), payload(sub="x" * 5000))
    assert read(fits, signing, ISSUER, NOW) is not None
    too_long = signed(key, header(key), payload(sub="x" * 9000))
    assert read(too_long, signing, ISSUER, NOW) is None


class TestRotation:
    def test_a_replaced_key_is_known_until_its_last_token_expires(self) -> None:
        both = keys(NOW - 1000, NOW)
        old, new = both.known(NOW)[1], both.known(NOW)[0]
        assert current(both) is new
        text = write(claims(issued_at=int(NOW), expires_at=int(NOW) + 86400), old)
        bearer = text.token.reveal().decode()
        for later, accepted in ((0, True), (86400 + LEEWAY - 1, True), (86400 + LEEWAY, False)):
            assert (read(bearer, both, ISSUER, NOW + later) is not None) is accepted
            published = [jwk["kid"] for jwk in both.jwks(NOW + later)["keys"]]
            assert (old.kid in published) is accepted
            assert published[0] == new.kid
        assert both.over(NOW) == []
        assert both.over(NOW + OVERLAP) == [1]

    def test_a_replaced_key_signs_nothing_new(self) -> None:
        both = keys(NOW - 1000, NOW)
        old = both.known(NOW)[1]
        later = int(NOW) + LEEWAY + 1
        token = write(claims(issued_at=later, expires_at=later + 60), old)
        assert read(token.token.reveal().decode(), both, ISSUER, later) is None

    def test_a_key_that_is_gone_is_unknown(self) -> None:
        old, new = keys(NOW - 1000), keys(NOW)
        token = write(claims(), current(old)).token.reveal().decode()
        assert read(token, old, ISSUER, NOW) is not None
        assert read(token, new, ISSUER, NOW) is None
