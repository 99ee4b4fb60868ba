"""`pilotlight export`, `verify` and `evaluate`, which are another program: the runtime never imports it, nor torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import click

from pilotlight.errors import ConfigError

_handed_over: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(short_help="Turn a Hugging Face model into an artifact.", context_settings=_handed_over)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def export(arguments: tuple[str, ...]) -> None:
    """Turn a Hugging Face model into an artifact (needs the extra `pilotlight[export]`)."""
    _run_exporter("export", arguments)


@click.command(short_help="Compare an artifact with its source again.", context_settings=_handed_over)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(arguments: tuple[str, ...]) -> None:
    """Compare an artifact with the model that it was made of again (needs the extra `pilotlight[export]`)."""
    _run_exporter("verify", arguments)


@click.command(short_help="Find the smallest artifact that is good enough.", context_settings=_handed_over)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def evaluate(arguments: tuple[str, ...]) -> None:
    """Compare artifacts by size, speed, memory and quality (needs the extra `pilotlight[export]`)."""
    _run_exporter("evaluate", arguments)


def _run_exporter(command: str, arguments: tuple[str, ...]) -> None:
    if importlib.util.find_spec("optimum") is None:
        raise ConfigError(
            f"{command} needs more than a runtime does; install it with: pip install 'pilotlight[export]'"
        )
    # With -P, files in the current directory don't stand in for its modules.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "pilotlight_export", command, *arguments])  # noqa: S606
