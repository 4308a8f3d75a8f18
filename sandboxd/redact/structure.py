"""Keeps values out of what is whole when it comes: texts, JSON, the content of an MCP result."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sandboxd.redact.matcher import Matcher
from sandboxd.redact.stream import Redactor, Streams
from sandboxd.secret import Secret

__all__ = ["Mask"]

#: Members of MCP content that are base64 of bytes (MCP 2025-11-25, "Tool Result").
_BASE64 = ("data", "blob")


class Mask:
    """Masks the values of some variables, in every form that the matcher knows.

    ``counts`` tells how often which variable was masked, over all that was given to it.
    """

    __slots__ = ("_matcher", "counts")

    def __init__(self, secrets: Mapping[str, Secret] | Matcher) -> None:
        self._matcher = secrets if isinstance(secrets, Matcher) else Matcher(secrets)
        self.counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Mask, {self.hits} hits>"

    @property
    def hits(self) -> int:
        return self.counts.total()

    def bytes(self, data: bytes) -> bytes:
        if not self._matcher or not data:
            return data
        redactor = Redactor(self._matcher)
        masked = redactor.feed(data) + redactor.flush()
        self.counts += redactor.counts
        return masked

    def text(self, text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        masked = self.bytes(data)
        return text if masked == data else masked.decode("utf-8", "replace")

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Texts that are read one after the other: a value may begin in one and end in the next."""
        if not self._matcher or len(texts) < 2:
            return [self.text(text) for text in texts]
        names = [str(number) for number in range(len(texts))]
        streams = Streams(self._matcher, names)
        masked: dict[str, list[bytes]] = {name: [] for name in names}
        for name, text in zip(names, texts, strict=True):
            for each, data in streams.feed(name, text.encode("utf-8", "surrogatepass")):
                masked[each].append(data)
        for name in names:
            masked[name].append(streams.flush(name)[0])
        self.counts += streams.counts
        return [b"".join(masked[name]).decode("utf-8", "replace") for name in names]

    def value(self, value: Any) -> Any:
        """A JSON value with every text in it masked, names of members included.

        A number that is a value becomes the text that says so. What is nested too deeply for
        Python raises RecursionError, as decoding it would have.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(name)): self.value(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner) for inner in value]
        if value is None or isinstance(value, bool):
            return value
        shown = json.dumps(value)
        masked = self.text(shown)
        return value if masked == shown else masked

    def content(self, blocks: Sequence[Any]) -> list[Any]:
        """Content blocks of an MCP result, as JSON. The texts are also searched across blocks."""
        masked = [self._block(block) for block in blocks]
        texts = [block for block in masked if _is_text(block)]
        for block, text in zip(texts, self.texts([b["text"] for b in texts]), strict=True):
            block["text"] = text
        return masked

    def _block(self, block: Any) -> Any:
        if not isinstance(block, Mapping):
            return self.value(block)
        made: dict[str, Any] = {}
        for name, inner in block.items():
            if name in _BASE64 and isinstance(inner, str):
                made[name] = self._base64(inner)
            elif name == "resource":
                made[name] = self._block(inner)
            elif name == "text" and _is_text(block):
                made[name] = inner  # together with the others
            else:
                made[self.text(str(name))] = self.value(inner)
        return made

    def _base64(self, text: str) -> str:
        """Base64 whose bytes are masked; as a text what is none."""
        try:
            data = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            return self.text(text)
        masked = self.bytes(data)
        return text if masked == data else base64.b64encode(masked).decode("ascii")


def _is_text(block: Any) -> bool:
    return (
        isinstance(block, Mapping)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
    )
