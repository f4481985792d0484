"""`moestro learn METHOD TRACE OUT`: what a serving method learns from a recorded trace."""

from typing import Any

import typer

from moestro.cli.stages import StageGroup


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the group."""
    text = "What a serving method learns from a trace of `moestro trace`, into a folder that its settings name."
    app.add_typer(typer.Typer(cls=LearnGroup, help=text), name="learn")


class LearnGroup(StageGroup):
    """The serving methods that learn."""

    def _infos(self) -> dict[str, Any]:
        from moestro.core.registry import infos

        return {
            info.id.partition(".")[2]: info
            for info in infos().values()
            if info.stage == "serve" and "learn" in info.entries
        }
