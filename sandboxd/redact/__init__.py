"""Keeps secret values out of what tools print and answer.

In: bytes of streams, texts, JSON. Out: the same, byte for byte, but for the values of some
variables, in every encoding that encodings.py lists.
"""

from __future__ import annotations

from sandboxd.redact.matcher import Matcher
from sandboxd.redact.stream import Redactor, Streams
from sandboxd.redact.structure import Mask

__all__ = ["Mask", "Matcher", "Redactor", "Streams"]
