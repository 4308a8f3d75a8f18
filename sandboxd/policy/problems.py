"""Every problem of a configuration at once, each with its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sandboxd.errors import ConfigError, SandboxdError

__all__ = ["ConfigErrors", "Position", "Problems"]


@dataclass(frozen=True, order=True)
class Position:
    """Where something stands in a file; lines and columns count from 1."""

    line: int
    column: int


class ConfigErrors(SandboxdError):
    """A configuration that was refused: ``errors`` holds every problem, by file and line."""

    code = "config"
    exit_code = 2

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = sorted(errors, key=lambda e: (e.file, e.line, e.column, e.message))
        lines = [
            error.message + (f"\n  hint: {error.hint}" if error.hint else "")
            for error in self.errors
        ]
        if len(self.errors) == 1:
            super().__init__(self.errors[0].message, hint=self.errors[0].hint)
        else:
            super().__init__(f"{len(lines)} problems in the configuration\n" + "\n".join(lines))


@dataclass
class Problems:
    """Collects problems and warnings while loading goes on."""

    errors: list[ConfigError] = field(default_factory=list)
    warned: list[ConfigError] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What works but an operator should know, each with its place."""
        return [warning.message for warning in self.warned]

    def add(self, file: str, at: Position | None, message: str, hint: str = "") -> None:
        """Note one problem; ``at`` is None where the whole file is the problem."""
        where = at or Position(0, 0)
        self.errors.append(
            ConfigError(message, file=file, line=where.line, column=where.column, hint=hint)
        )

    def warn(self, file: str, at: Position | None, message: str) -> None:
        """Note something that works but that an operator should know."""
        where = at or Position(0, 0)
        self.warned.append(ConfigError(message, file=file, line=where.line, column=where.column))

    def check(self) -> None:
        """Raise :class:`ConfigErrors` if there is any problem."""
        if self.errors:
            raise ConfigErrors(self.errors)
