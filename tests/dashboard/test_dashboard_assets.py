"""What the pages are made of: files of the package, nothing inline, nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from sandboxd.http.dashboard.render import STATIC, asset, content, render, sparkline

FOLDER = Path(str(files("sandboxd.http.dashboard")))
TEMPLATES = sorted((FOLDER / "templates").glob("*.html"))


def test_the_vendored_script_is_the_one_that_its_note_names() -> None:
    note = (FOLDER / "static" / "VENDORED.md").read_text()
    found = re.search(r"SHA-256 of `htmx.min.js`: ([0-9a-f]{64})", note)
    assert found is not None
    assert hashlib.sha256(content("htmx.min.js")).hexdigest() == found[1]
    assert (FOLDER / "static" / "htmx.LICENSE.txt").read_text().startswith("Zero-Clause BSD")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_templates_have_nothing_inline(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|hx-on|javascript:|\bjs:", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)", text)
    assert not re.search(r"""(?:src|href|action)=["']?(?:https?:)?//""", text)
    assert "| safe" not in text
    assert "autoescape" not in text


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_every_form_that_acts_has_the_pages_own_mark(path: Path) -> None:
    for form in re.findall(r"<form[^>]*method=\"post\".*?</form>", path.read_text(), re.S):
        entry = 'action="/sign-in' in form
        assert ("parts.csrf(csrf)" in form) is not entry, form


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_elements_are_closed_in_order(path: Path) -> None:
    checked = _Nesting()
    checked.feed(re.sub(r"{%.*?%}|{{.*?}}", "", path.read_text(), flags=re.S))
    assert not checked.wrong


def test_our_own_script_evaluates_nothing() -> None:
    text = content("dashboard.js").decode()
    assert not re.search(
        r"\beval\b|new Function|innerHTML|insertAdjacentHTML|document\.write", text
    )


def test_nothing_that_pages_load_is_from_elsewhere() -> None:
    for name in STATIC:
        if name != "htmx.min.js":
            found = re.findall(rb"(?:https?:)?//[a-z][a-z0-9.-]+", content(name))
            assert set(found) <= {b"http://www.w3.org"}, name


def test_an_assets_address_changes_with_it() -> None:
    digest = hashlib.sha256(content("dashboard.css")).hexdigest()
    assert asset("dashboard.css") == f"/static/dashboard.css?v={digest[:16]}"
    with pytest.raises(KeyError):
        content("../render.py")


def test_what_others_wrote_is_escaped_and_shows_all_of_its_characters() -> None:
    class Problem:
        message, hint = "<img src=x onerror=alert(1)>\u202e\u200b", ""

    page = render("_problem.html", error=Problem())
    assert "&lt;img src=x onerror=alert(1)&gt;\\u202e\\u200b" in page


def test_a_sparkline_stays_in_its_box() -> None:
    for values in ([0.0, 1.0], [5.0] * 60, [1e9, 0.0, 3.0]):
        points = [tuple(map(float, p.split(","))) for p in sparkline(values, least_top=1.0).split()]
        assert len(points) == len(values)
        assert all(0 <= x <= 120 and 0 <= y <= 28 for x, y in points)
    assert sparkline([], least_top=1.0) == ""


_VOID = {"meta", "link", "img", "input", "br", "polyline", "line"}


class _Nesting(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")
