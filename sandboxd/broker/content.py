"""What of an MCP server's answer reaches the agent: known blocks, bounded, without secret values.

A block is rebuilt from the fields that its type has (MCP 2025-11-25, "Tool Result"); anything else,
``_meta`` included, stays here. Pure but for what the mask counts.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxd.redact import Mask

__all__ = ["Passed", "passed_on"]

#: Blocks of one answer.
MAX_BLOCKS = 1_000

_TEXT = ("uri", "name", "title", "description", "mimeType")


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
    known = [_block(raw) for raw in (content if isinstance(content, list) else [])[:MAX_BLOCKS]]
    missing += ["a block of an unknown form" for block in known if block is None]
    for block in mask.content([block for block in known if block is not None]):
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
    return f"left out (the limit is {limit:,} bytes): {', '.join(missing[:3])}{more}"


def _block(raw: Any) -> dict[str, Any] | None:
    """The block with its known fields, or None for one that is of no known form."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    made: dict[str, Any] | None = None
    if kind == "text" and isinstance(raw.get("text"), str):
        made = {"type": "text", "text": raw["text"]}
    elif kind in ("image", "audio") and isinstance(raw.get("mimeType"), str):
        if _is_base64(raw.get("data")):
            made = {"type": kind, "data": raw["data"], "mimeType": raw["mimeType"]}
    elif kind == "resource_link" and isinstance(raw.get("uri"), str):
        made = {"type": kind, **_texts(raw)}
        made.setdefault("name", made["uri"])
        if isinstance(raw.get("size"), int) and not isinstance(raw["size"], bool):
            made["size"] = raw["size"]
    elif kind == "resource" and isinstance(raw.get("resource"), dict):
        resource = _resource(raw["resource"])
        made = None if resource is None else {"type": kind, "resource": resource}
    if made is not None and (about := _annotations(raw.get("annotations"))):
        made["annotations"] = about
    return made


def _resource(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    if not isinstance(raw.get("uri"), str):
        return None
    made: dict[str, Any] = {k: v for k, v in _texts(raw).items() if k in ("uri", "mimeType")}
    if isinstance(raw.get("text"), str):
        return {**made, "text": raw["text"]}
    return {**made, "blob": raw["blob"]} if _is_base64(raw.get("blob")) else None


def _texts(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: raw[key] for key in _TEXT if isinstance(raw.get(key), str)}


def _is_base64(raw: Any) -> bool:
    if not isinstance(raw, str):
        return False
    try:
        base64.b64decode(raw, validate=True)
    except (ValueError, binascii.Error):
        return False
    return True


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
