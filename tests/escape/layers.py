"""Every layer of a sandbox, in the order of the table in docs/security-model.md."""

from __future__ import annotations

from layer import Change, Layer
from layers_of_bounds import BOUNDS
from layers_of_places import PLACES
from layers_of_rights import RIGHTS

__all__ = ["LAYERS", "Change", "Layer"]

LAYERS: tuple[Layer, ...] = (*PLACES, *RIGHTS, *BOUNDS)
