"""Every tab in Debian's Chromium: by clicks, by the keyboard alone, light, dark and narrow."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import LOOKS, Looking, chromium, install_axe
from plain_pages import new_key
from real_daemon import RealDaemon, until

pytestmark = pytest.mark.browser

SECRET = "correct-horse-battery-staple-1729"
OTHER = "another-value-of-some-length-2718"

#: What has the focus, by its label or its words, and how that is seen.
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  const words = /^(A|BUTTON|SUMMARY)$/.test(e.tagName) ? e.innerText : e.tagName;
  const text = e === document.body ? "" : e.labels?.[0]?.innerText ?? e.ariaLabel ?? words;
  return [text.trim().replace(/\\s+/g, " "), style.outlineStyle, parseFloat(style.outlineWidth)];
}"""

Open = Callable[..., Looking]


@pytest.fixture(scope="module")
def axe() -> str:
    return install_axe()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def opened(daemon: RealDaemon, browser: Any, axe: str) -> Iterator[Open]:
    """Opens windows; at the end none of them has complained."""
    windows: list[Looking] = []

    def open_(look: str = "light") -> Looking:
        windows.append(Looking(browser, daemon.url, axe, look))
        return windows[-1]

    yield open_
    for window in windows:
        window.close()


@pytest.fixture
def owner(opened: Open, keys: dict[str, str]) -> Looking:
    window = opened()
    window.sign_in(keys["owner"])
    return window


@contextmanager
def calling(daemon: RealDaemon, session: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """A call of the session's agent that waits for an operator; its end when that came."""
    result: dict[str, Any] = {}

    def call() -> None:
        with daemon.client() as client:
            sent = {"tool": "publish", "arguments": arguments, "session": session}
            result.update(list(client.stream("tools.run", **sent))[-1]["ended"])

    thread = threading.Thread(target=call)
    thread.start()
    try:
        until(lambda: bool(daemon.call("approvals.list")["approvals"]))
        yield result
        thread.join(30)
    finally:
        for row in daemon.call("approvals.list")["approvals"]:
            daemon.call("approvals.deny", id=row["id"])
        thread.join(30)


def denied(daemon: RealDaemon, session: str) -> None:
    with daemon.client() as client:
        sent = {"tool": "publish", "arguments": {"to": "moon"}, "session": session}
        list(client.stream("tools.run", **sent))
        sent["arguments"] = {"to": "paper"}
        list(client.stream("tools.run", **sent))


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab_when_there_is_much_to_see(
    daemon: RealDaemon, opened: Open, keys: dict[str, str], session: str, look: str
) -> None:
    daemon.set("writer", TOKEN=OTHER, DATABASE_URL="postgres://reporting:" + SECRET + "@db/sales")
    denied(daemon, session)
    window = opened(look)
    page = window.page
    page.goto("/")
    window.check("sign-in")
    window.sign_in(keys["owner"])
    window.check("agents")
    page.get_by_role("link", name="writer").click()
    window.check("environment")
    page.get_by_role("link", name="Remove TOKEN").click()
    window.check("remove")
    window.go("API keys")
    window.check("keys")
    page.get_by_role("link", name="Deactivate operator of red").click()
    window.check("deactivate")
    text = "Report \u202egnp.exe for \u0430dmin, \u0141ukasz " + "and paying customers " * 40
    with calling(daemon, session, to="production", text=text):
        window.go("Sessions")
        page.wait_for_selector(".spark polyline", state="attached")  # flat, so "hidden"
        window.check("sessions")
        page.get_by_role("link", name=session).click()
        window.check("session")
        window.go("Calls")
        window.check("calls")
        page.get_by_role("link", name="Review call of publish").click()
        window.check("waiting")
        page.get_by_role("button", name="Deny").click()
        page.wait_for_url("**/calls")
    page.locator("tbody a").first.click()
    window.check("call")
    window.go("Tools and policies")
    page.get_by_label("Tool", exact=True).fill("publish")
    page.get_by_label("Arguments (JSON)").fill('{"to": "moon"}')
    page.get_by_role("button", name="Explain").click()
    page.get_by_text("nobody reads it there").wait_for()
    window.check("tools")
    page.get_by_role("link", name="publish").last.click()
    window.check("tool")
    window.go("Audit")
    page.get_by_role("button", name="Verify the log").click()
    page.get_by_text("Every record is as it was written").wait_for()
    window.check("audit")
    page.get_by_role("button", name="Sign out").click()
    page.get_by_text("You are signed out.").wait_for()
    page.go_back()
    page.get_by_label("API key", exact=True).wait_for()  # not the page from before


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab_when_there_is_nothing(daemon: RealDaemon, opened: Open, look: str) -> None:
    window = opened(look)
    code = daemon.call("dashboard.link", team="empty")["path"]
    window.page.goto(code)
    window.page.wait_for_url("**/environment")
    for tab in ("Environment", "API keys", "Sessions", "Calls", "Tools and policies", "Audit"):
        window.go(tab)
        window.check("empty-" + tab.split()[0].lower())


def test_the_link_leaves_no_code_behind(daemon: RealDaemon, opened: Open) -> None:
    link = daemon.ctl("dashboard", "--team", "red").stdout.strip()
    code = link.partition("#code=")[2]
    assert len(code) == 43
    window, seen = opened(), list[str]()
    window.page.on("request", lambda request: seen.append(request.url))
    window.page.on("framenavigated", lambda frame: seen.append(frame.url))
    window.page.goto(link)
    window.page.wait_for_url("**/environment**")
    asked = [url for url in seen if "#" not in url]
    assert not any(code in url for url in asked)
    window.page.go_back()
    assert code not in window.page.url
    again = opened()
    again.page.goto(link)
    again.page.get_by_text("This link is not valid any more.").wait_for()
    assert code not in again.page.url


def test_variables_by_clicks(daemon: RealDaemon, owner: Looking, tmp_path: Path) -> None:
    page = owner.page
    page.goto("/environment/reader")
    value = page.get_by_label("Value", exact=True)
    page.get_by_label("Name", exact=True).fill("CLICKED")
    value.fill(SECRET)
    assert page.evaluate("getComputedStyle(document.activeElement).webkitTextSecurity") == "disc"
    page.get_by_label("Show what I type").check()
    assert value.evaluate("e => getComputedStyle(e).webkitTextSecurity") == "none"
    page.get_by_role("button", name="Set variable").click()
    page.get_by_text("CLICKED is set, version 1.").wait_for()
    file = tmp_path / ".env"
    file.write_bytes(f"CLICKED={OTHER}\nFROM_FILE='{SECRET}'\n".encode())
    page.get_by_label("File", exact=True).set_input_files(file)
    page.get_by_text("replace version 1").wait_for()
    assert SECRET not in page.content()
    owner.check("preview")
    page.get_by_role("button", name="Set 2 variables").click()
    page.get_by_text("2 variables set: CLICKED, FROM_FILE.").wait_for()
    page.get_by_role("link", name="Update FROM_FILE").click()
    assert page.get_by_label("Name", exact=True).input_value() == "FROM_FILE"
    for name in ("CLICKED", "FROM_FILE"):
        page.get_by_role("link", name=f"Remove {name}").click()
        page.get_by_role("button", name=f"Remove {name}").click()
        page.get_by_text(f"{name} is removed.").wait_for()
    assert daemon.call("env.list", agent="reader")["variables"] == []


def test_a_mistake_is_told_where_it_was_made(owner: Looking) -> None:
    page = owner.page
    page.goto("/environment/reader")
    page.get_by_label("or its lines", exact=True).fill("no assignment")
    page.get_by_role("button", name="Preview").click()
    page.get_by_text("Line 1: not an assignment").wait_for()
    page.get_by_label("Name", exact=True).fill("SHORT")
    page.get_by_label("Value", exact=True).fill("abc")
    page.get_by_role("button", name="Set variable").click()
    assert "SHORT" in page.get_by_role("alert").inner_text()
    owner.check("mistake")


def test_a_key_by_clicks_is_shown_once(owner: Looking) -> None:
    page = owner.page
    owner.context.grant_permissions(["clipboard-read", "clipboard-write"])
    owner.go("API keys")
    page.get_by_label("Label", exact=True).fill("clicked")
    page.get_by_role("button", name="Create key").click()
    page.get_by_text("It is shown this once.").wait_for()
    owner.check("key-made")
    shown = page.locator("#new-key-text").inner_text()
    assert re.fullmatch(r"an_sk_[0-9a-f]{64}", shown)
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == shown
    page.reload()
    assert shown not in page.content()
    page.go_back()
    page.go_forward()
    assert shown not in page.content()
    page.get_by_role("link", name="Rotate clicked").click()
    page.get_by_role("button", name="Make the new key").click()
    page.get_by_text("The old one works until").wait_for()
    owner.go("API keys")
    page.get_by_role("link", name="Deactivate clicked").first.click()
    page.get_by_role("button", name="Deactivate").click()
    page.get_by_text("clicked is deactivated.").wait_for()


def test_a_call_appears_by_itself_and_is_approved(
    daemon: RealDaemon, owner: Looking, session: str
) -> None:
    page = owner.page
    owner.go("Calls")
    page.get_by_text("No call waits.").wait_for()
    with calling(daemon, session, to="production") as result:
        page.get_by_role("link", name="Review call of publish").wait_for()
        assert page.title().startswith("(1) ")
        page.get_by_role("link", name="Review call of publish").click()
        assert page.get_by_role("button", name="Approve this call").is_disabled()
        page.get_by_role("button", name="Approve this call").click()
        page.get_by_text("publish of writer is approved.").wait_for()
    assert result["outcome"] == "ok"
    page.locator("tbody .state.succeeded").first.wait_for()


def test_what_has_the_focus_keeps_it_when_the_page_renews_itself(
    owner: Looking, session: str
) -> None:
    page = owner.page
    owner.go("Sessions")
    link = page.get_by_role("link", name=session)
    link.focus()
    for _ in range(2):
        with page.expect_response("**/sessions/live"):
            pass
        page.wait_for_function("id => document.activeElement.id === id", arg=f"s-{session}")


def test_a_page_whose_key_ends_goes_to_the_way_in(daemon: RealDaemon, opened: Open) -> None:
    made, window = new_key(daemon, "red", "viewer"), opened()
    window.sign_in(made["secret"])
    window.go("Calls")
    daemon.call("keys.deactivate", key=made["key"]["id"])
    window.page.get_by_text("You were signed out").wait_for()


def test_a_session_is_stopped_with_the_keyboard_alone(
    daemon: RealDaemon, opened: Open, keys: dict[str, str], session: str
) -> None:
    """From signing in to signing out, with Tab, arrows, Space and Enter."""
    window = opened()
    page, keyboard = window.page, window.page.keyboard
    page.goto("/")
    keyboard.type(keys["owner"])  # the field has the focus
    keyboard.press("Enter")
    page.wait_for_url("**/environment")

    def reach(name: str, presses: int = 60) -> None:
        """Tab until the element of this name has the focus; where it is can be seen."""
        for _ in range(presses):
            keyboard.press("Tab")
            text, outline, width = page.evaluate(FOCUSED)
            if not text:
                continue  # the page itself, between its last element and its first
            assert (outline != "none", width >= 2) == (True, True), f"{text}: no visible focus"
            if text.startswith(name):
                return
        raise AssertionError(f"Tab never reaches {name}")

    reach("Skip to the content", 3)
    keyboard.press("Enter")
    reach("writer")
    keyboard.press("Enter")
    page.wait_for_url("**/environment/writer")
    reach("Name")
    keyboard.type("TYPED")
    reach("Value")
    keyboard.type(SECRET)
    reach("Set variable")
    keyboard.press("Enter")
    page.get_by_text("TYPED is set").wait_for()
    for tab in ("API keys", "Calls", "Tools and policies", "Audit", "Sessions"):
        reach(tab)
        keyboard.press("Enter")
        page.wait_for_function(
            "name => document.querySelector('[aria-current=page]')?.innerText === name", arg=tab
        )
    reach(session)
    keyboard.press("Enter")
    page.wait_for_url(f"**/sessions/{session}")
    reach("Kill it at once")
    keyboard.press("Space")
    reach("Stop session")
    keyboard.press("Enter")
    page.get_by_text(f"Session {session} has ended.").wait_for()
    reach("Sign out")
    keyboard.press("Enter")
    page.get_by_text("You are signed out.").wait_for()
    daemon.call("env.remove", agent="writer", names=["TYPED"])
