"""What of an MCP server's answer reaches the agent: known blocks, bounded, without secret values.

A block is rebuilt from the fields that its type has (MCP 2025-11-25, "Tool Result"); anything else,
``_meta`` included, stays here. Pure but for the counting of what was masked.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxd.redact import Matcher, Redactor
from sandboxd.secret import Secret

__all__ = ["Mask", "Passed", "passed_on"]

#: Blocks of one answer.
MAX_BLOCKS = 1_000

_TEXT = ("uri", "name", "title", "description", "mimeType")


class Mask:
    """Takes secret values out of texts and bytes, and counts them."""

    def __init__(self, secrets: Mapping[str, Secret] | Matcher) -> None:
        self._matcher = secrets if isinstance(secrets, Matcher) else Matcher(secrets)
        self.counts: Counter[str] = Counter()

    def bytes(self, data: bytes) -> bytes:
        if not self._matcher or not data:
            return data
        redactor = Redactor(self._matcher)
        masked = redactor.feed(data) + redactor.flush()
        self.counts += redactor.counts
        return masked

    def text(self, text: str) -> str:
        if not self._matcher or not text:
            return text
        return self.bytes(text.encode()).decode("utf-8", "replace")

    def value(self, value: Any) -> Any:
        """A JSON value with every text in it masked, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.value(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        if value is None or isinstance(value, bool):
            return value
        shown = json.dumps(value)  # a number may be a value as well
        return value if self.text(shown) == shown else self.text(shown)


@dataclass(frozen=True)
class Passed:
    """An answer as the agent gets it. ``left_out`` says what is missing, for people."""

    blocks: tuple[dict[str, Any], ...] = field(repr=False)
    structured: dict[str, Any] | None = field(repr=False)
    is_error: bool
    left_out: str = ""


def passed_on(result: Mapping[str, Any], mask: Mask, limit: int) -> Passed:
    """The answer without secrets, its blocks together and its structure each within ``limit``."""
    content = result.get("content")
    room = limit
    blocks: list[dict[str, Any]] = []
    missing: list[str] = []
    for raw in (content if isinstance(content, list) else [])[:MAX_BLOCKS]:
        block = _block(raw, mask)
        if block is None:
            missing.append("a block of an unknown form")
            continue
        size = _size(block)
        if size <= room:
            blocks.append(block)
        elif block["type"] == "text" and room > 0:
            cut = block["text"].encode()[:room].decode("utf-8", "ignore")
            blocks.append({**block, "text": cut})
            size = room
            missing.append("the end of a text")
        else:
            missing.append(f"a block of {size:,} bytes")
            size = 0
        room -= size
    if isinstance(content, list) and len(content) > MAX_BLOCKS:
        missing.append(f"{len(content) - MAX_BLOCKS:,} blocks")
    structured = result.get("structuredContent")
    structured = mask.value(structured) if isinstance(structured, dict) else None
    if structured is not None and _size(structured) > limit:
        structured = None
        missing.append("the structured content")
    return Passed(tuple(blocks), structured, result.get("isError") is True, _told(missing, limit))


def _told(missing: list[str], limit: int) -> str:
    if not missing:
        return ""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"left out for the limit of {limit:,} bytes: {', '.join(missing[:3])}{more}"


def _block(raw: Any, mask: Mask) -> dict[str, Any] | None:
    """The block with its known fields, or None for one that is of no known form."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    made: dict[str, Any] | None = None
    if kind == "text" and isinstance(raw.get("text"), str):
        made = {"type": "text", "text": mask.text(raw["text"])}
    elif kind in ("image", "audio") and isinstance(raw.get("mimeType"), str):
        data = _data(raw.get("data"), mask)
        if data is not None:
            made = {"type": kind, "data": data, "mimeType": mask.text(raw["mimeType"])}
    elif kind == "resource_link" and isinstance(raw.get("uri"), str):
        made = {"type": kind, **_texts(raw, mask)}
        made.setdefault("name", made["uri"])
        if isinstance(raw.get("size"), int) and not isinstance(raw["size"], bool):
            made["size"] = raw["size"]
    elif kind == "resource" and isinstance(raw.get("resource"), dict):
        resource = _resource(raw["resource"], mask)
        made = None if resource is None else {"type": kind, "resource": resource}
    if made is not None and (about := _annotations(raw.get("annotations"))):
        made["annotations"] = about
    return made


def _resource(raw: Mapping[str, Any], mask: Mask) -> dict[str, Any] | None:
    if not isinstance(raw.get("uri"), str):
        return None
    made: dict[str, Any] = {k: v for k, v in _texts(raw, mask).items() if k in ("uri", "mimeType")}
    if isinstance(raw.get("text"), str):
        return {**made, "text": mask.text(raw["text"])}
    blob = _data(raw.get("blob"), mask)
    return None if blob is None else {**made, "blob": blob}


def _texts(raw: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    return {key: mask.text(raw[key]) for key in _TEXT if isinstance(raw.get(key), str)}


def _data(raw: Any, mask: Mask) -> str | None:
    """Base64 whose content was masked; None for what is no base64."""
    if not isinstance(raw, str):
        return None
    try:
        data = base64.b64decode(raw, validate=True)
    except (ValueError, binascii.Error):
        return None
    masked = mask.bytes(data)
    return raw if masked == data else base64.b64encode(masked).decode("ascii")


def _annotations(raw: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if isinstance(raw, dict):
        audience: Any = raw.get("audience")
        priority: Any = raw.get("priority")
        if isinstance(audience, list):
            made["audience"] = [who for who in audience if who in ("user", "assistant")][:2]
        number = isinstance(priority, int | float) and not isinstance(priority, bool)
        if number and 0 <= priority <= 1:
            made["priority"] = priority
    return made


def _size(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
