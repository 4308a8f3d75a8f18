"""A run as bars, in one SVG file: written by hand, for a library would be larger than the bench."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["svg"]

_WIDTH, _LEFT, _RIGHT = 860, 290, 110
_BAR, _STEP, _TITLE = 16, 26, 46
_OURS, _OTHERS, _INK, _FAINT = "#2563eb", "#9ca3af", "#1f2937", "#6b7280"

#: Name, value, and the value of a mark behind it (p95), if any.
Bar = tuple[str, float, float | None]


def svg(result: Mapping[str, Any]) -> str:
    """The medians of what was measured, p95 as a thin line; logarithmic, for they lie far apart."""
    panels: list[tuple[str, str, list[Bar]]] = []
    parts = result["parts"]
    if part := parts.get("launch"):
        panels.append((f"Launch only ({part['program']}), ms", "ms", _times(part)))
    if part := parts.get("calls"):
        panels.append((f"Whole tool call ({part['program']}), ms", "ms", _times(part)))
    if part := parts.get("start"):
        panels.append(("Session start to the agent's first word, ms", "ms", _times(part)))
    if part := parts.get("throughput"):
        rates: list[Bar] = [(v["name"], v["calls_per_second"], None) for v in part["variants"]]
        panels.append((f"Calls per second, {part['callers']} callers", "/s", rates))
    height = sum(_TITLE + _STEP * len(bars) for _, _, bars in panels) + 44
    body, top = [], 8
    for title, unit, bars in panels:
        body += _panel(title, unit, bars, top)
        top += _TITLE + _STEP * len(bars)
    foot = "Logarithmic. Bars are medians, thin lines reach to p95. "
    foot += f"{result['machine']['at']}, as {result['machine']['user']}"
    if result["invalid"]:
        foot += ": INVALID, isolated less than shipped"
    body.append(_text(12, height - 14, foot, _FAINT, 12))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" role="img">',
            "<title>Times of sandboxd and of other programs</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _times(part: Mapping[str, Any]) -> list[Bar]:
    return [(v["name"], v["median_ms"], v["p95_ms"]) for v in part["variants"]]


def _panel(title: str, unit: str, bars: Sequence[Bar], top: int) -> list[str]:
    most = max(max(value, mark or 0) for _, value, mark in bars)
    low = min(value for _, value, _ in bars) / 3
    scale = (_WIDTH - _LEFT - _RIGHT) / max(math.log(most / low), 1e-9)

    def place(value: float) -> float:
        return max(0.0, math.log(value / low)) * scale

    found = [_text(12, top + 24, title, _INK, 15, "600")]
    for row, (name, value, mark) in enumerate(bars):
        y = top + _TITLE - 8 + row * _STEP
        ours = name.startswith("sandboxd")
        color = _OURS if ours else _OTHERS
        found.append(_text(_LEFT - 10, y + 13, name, _INK, 13, "600" if ours else "400", "end"))
        found.append(
            f'<rect x="{_LEFT}" y="{y}" width="{place(value):.1f}" height="{_BAR}" rx="2" '
            f'fill="{color}"/>'
        )
        end = place(max(value, mark or 0))
        if mark is not None and mark > value:
            middle = y + _BAR / 2
            found.append(
                f'<line x1="{_LEFT + place(value):.1f}" x2="{_LEFT + end:.1f}" y1="{middle}" '
                f'y2="{middle}" stroke="{color}" stroke-width="2"/>'
            )
        figure = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        shown = f"{figure} ms" if unit == "ms" else figure
        found.append(_text(_LEFT + end + 8, y + 13, shown, _INK, 13, "600" if ours else "400"))
    return found


def _text(
    x: float,
    y: float,
    words: str,
    color: str,
    size: int,
    weight: str = "400",
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )
