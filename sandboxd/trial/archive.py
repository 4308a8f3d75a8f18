"""Some of our modules as one file that any Python runs: a sandbox sees nothing else of ours."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["pack"]

_PACKAGE = Path(__file__).parents[1]
_MAIN = "import sys\nfrom {module} import {function}\nsys.exit({function}())\n"


def pack(target: Path, modules: Iterable[str], main: str) -> None:
    """Write ``target``, a zip that runs ``main`` ("module:function") and holds ``modules``.

    A module is named as it is imported; a package brings its own modules along, not those of
    packages below. The packages above are empty in there, so that they import nothing else.
    """
    sources: dict[str, str] = {}
    for name in modules:
        path = _PACKAGE.parent.joinpath(*name.split("."))
        found = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for source in found:
            inside = source.relative_to(_PACKAGE.parent)
            sources[str(inside)] = source.read_text()
            for parent in inside.parents[:-1]:
                sources.setdefault(str(parent / "__init__.py"), "")
    module, _, function = main.partition(":")
    sources["__main__.py"] = _MAIN.format(module=module, function=function)
    with zipfile.ZipFile(target, "w") as archive:
        for name, text in sources.items():
            archive.writestr(name, text)
