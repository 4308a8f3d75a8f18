"""Values stay out of texts, JSON and the content of MCP results, and the rest stays as it is."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from sandboxd.redact import Mask
from sandboxd.secret import Secret

VALUE = "s3cr3t/value-of+it"


def mask(**more: str) -> Mask:
    return Mask({"TOKEN": Secret(VALUE), **{name: Secret(value) for name, value in more.items()}})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_every_text_of_a_json_value_is_masked_and_names_too() -> None:
    masking = mask()
    got = masking.value({"a": [VALUE, {"b": f"<{VALUE}>"}], VALUE: None, "n": [1, True, 2.5]})
    marker = "[redacted:TOKEN]"
    assert got == {"a": [marker, {"b": f"<{marker}>"}], marker: None, "n": [1, True, 2.5]}
    assert masking.counts == {"TOKEN": 3}


def test_a_number_that_is_a_value_becomes_a_text() -> None:
    masking = mask(PIN="4711081547110815")
    got = masking.value([4711081547110815, 4711081547110816, 47.5])
    assert got == ["[redacted:PIN]", 4711081547110816, 47.5]


def test_text_without_a_value_is_the_same_also_where_it_is_no_unicode_text() -> None:
    text = json.loads('"half a pair: \\ud83d, grüße, \\u0000"')
    masking = mask()
    assert masking.text(text) is text
    assert masking.hits == 0


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": f"it is {VALUE}"},
        {"type": "resource", "resource": {"uri": "x://y", "text": f"it is {VALUE}"}},
        {"type": "resource", "resource": {"uri": f"x://{VALUE}", "text": "no"}},
        {"type": "resource", "resource": {"uri": "x://y", "blob": b64(f"\xff{VALUE}".encode())}},
        {"type": "image", "mimeType": "image/png", "data": b64(b"\x89PNG\xff" + VALUE.encode())},
        {"type": "audio", "mimeType": "audio/wav", "data": b64(VALUE.encode().hex().encode())},
        {"type": "resource_link", "uri": "x://y", "name": VALUE, "description": "d"},
        {"type": "unheard-of", "_meta": {"deep": [{"er": VALUE}]}},
        {"type": "image", "mimeType": "image/png", "data": f"this is no base64: {VALUE}"},
    ],
)
def test_a_value_in_a_content_block_is_masked(block: dict[str, Any]) -> None:
    masking = mask()
    (got,) = masking.content([block])
    assert masking.counts == {"TOKEN": 1}
    assert VALUE not in json.dumps(got)
    for data in _bytes_of(got):
        assert VALUE.encode() not in data
        assert b"[redacted:TOKEN]" in data


def _bytes_of(block: dict[str, Any]) -> list[bytes]:
    found = [block.get("data"), (block.get("resource") or {}).get("blob")]
    return [base64.b64decode(text) for text in found if text and " " not in text]


def test_blocks_without_a_value_are_the_same() -> None:
    blocks = [
        {"type": "text", "text": "s3cr3t", "annotations": {"priority": 0.5}},
        {"type": "image", "mimeType": "image/png", "data": b64(bytes(range(256)))},
        {"type": "resource", "resource": {"uri": "x://y", "blob": b64(b"\xff\xfe")}},
        {"type": "text", "text": ""},
        "not even a block",
    ]
    assert mask().content(blocks) == blocks


def test_a_value_that_goes_on_in_the_next_text_is_masked_in_both() -> None:
    masking = mask()
    blocks = [
        {"type": "text", "text": f"begin {VALUE[:6]}"},
        {"type": "image", "mimeType": "image/png", "data": ""},
        {"type": "text", "text": VALUE[6:13]},
        {"type": "text", "text": f"{VALUE[13:]} end"},
    ]
    texts = [block["text"] for block in masking.content(blocks) if block["type"] == "text"]
    assert texts == ["begin [redacted:TOKEN]", "[redacted:TOKEN]", "[redacted:TOKEN] end"]


def test_its_repr_shows_no_value() -> None:
    assert repr(mask()) == "<Mask, 0 hits>"
