"""``/api/v1``: what the platform's command line speaks."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from sandboxd.http.guard import Caller
from sandboxd.running import Daemon

__all__ = ["router"]


def router(daemon: Daemon) -> APIRouter:
    routes = APIRouter(prefix="/api/v1", tags=["platform"])

    @routes.get("/me", summary="Who this key is")
    async def me(caller: Caller) -> dict[str, Any]:
        team = caller.team or "default"
        return {
            "user": {"displayName": caller.name, "email": None},
            "team": {"slug": team, "name": team},
            "role": caller.role,
        }

    return routes
