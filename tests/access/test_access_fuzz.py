"""Whatever is shown as a key or a token is let in or refused, and nothing else happens."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sandboxd.access.keys import KeyRing, prefix_of
from sandboxd.access.signing import SigningKeys, new_signing_key
from sandboxd.access.tokens import Claims, issuer_of, read, write
from sandboxd.secret import Secret
from sandboxd.vault.credentials import SigningRow

NOW = 1_800_000_000.0
ISSUER = issuer_of("ab" * 16)
KEYS = SigningKeys([SigningRow(1, NOW - 10, new_signing_key())], overlap=60.0)
CURRENT = KEYS.known(NOW)[0]
TOKEN = (
    write(
        Claims(ISSUER, "key_0", "blue", "ann", None, "tok_" + "0" * 24, int(NOW), int(NOW) + 60),
        CURRENT,
    )
    .token.reveal()
    .decode()
)

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["alg", "typ", "kid", "crit", "b64", "iss", "aud", "sub", "iat", "exp"])


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@given(st.text(max_size=200) | st.text("AZaz09-_.=", max_size=200))
def test_texts(bearer: str) -> None:
    ring = KeyRing([], Secret(bytes(32)))
    assert ring.presented(bearer).id == ""
    assert read(bearer, KEYS, ISSUER, NOW) is None
    assert prefix_of(bearer) == ""


@given(st.dictionaries(NAMES | st.text(max_size=8), JSON), JSON, st.binary(max_size=70))
def test_parts_of_tokens(header: dict[str, Any], payload: Any, signature: bytes) -> None:
    signed = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    for head in (header, {"alg": "EdDSA", "typ": "JWT", "kid": CURRENT.kid}):
        assert read(f"{part(head)}.{part(payload)}.{signed}", KEYS, ISSUER, NOW) is None


@given(st.dictionaries(NAMES | st.sampled_from(["team", "agents", "jti", "key"]), JSON))
def test_claims_that_we_would_have_signed(claims: dict[str, Any]) -> None:
    said = json.loads(base64.urlsafe_b64decode(TOKEN.split(".")[1] + "=="))
    text = f"{TOKEN.split('.')[0]}.{part(said | claims)}"
    signed = base64.urlsafe_b64encode(CURRENT.private.sign(text.encode())).rstrip(b"=").decode()
    found = read(f"{text}.{signed}", KEYS, ISSUER, NOW)
    if found is not None:  # then everything in it has the type that it must have
        assert isinstance(found.team, str)
        assert type(found.expires_at) is int
        assert found.agents is None or all(isinstance(one, str) for one in found.agents)


@given(st.integers(0, len(TOKEN) - 2), st.characters())
def test_a_token_with_one_other_character(place: int, other: str) -> None:
    changed = TOKEN[:place] + other + TOKEN[place + 1 :]
    assert (read(changed, KEYS, ISSUER, NOW) is not None) == (changed == TOKEN)
