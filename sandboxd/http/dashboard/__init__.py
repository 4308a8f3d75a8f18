"""The dashboard: pages for operators, at ``/``. Rendered here, with one small script library.

``asking.py`` is one request of a signed-in page, ``pages.py`` who is signed in, ``render.py``
templates to HTML; each tab is a module.
"""

from __future__ import annotations

from fastapi import APIRouter

from sandboxd.http.dashboard import audit, calls, environment, keys, sessions, signin, tools
from sandboxd.http.dashboard.asking import Tabs
from sandboxd.running import Daemon

__all__ = ["router"]


def router(daemon: Daemon) -> APIRouter:
    """The routes of the dashboard of one daemon, and of the files that its pages load."""
    pages = daemon.pages
    tabs = Tabs(daemon, pages)
    for tab in (environment, keys, sessions, calls, tools, audit):
        tab.add(tabs)
    signin.add(tabs, daemon, pages)
    return tabs.router
