"""The command line. Exit status 0: done, 1: failed, with one line on standard error, 2: wrong usage."""

from __future__ import annotations

import importlib
import signal
from typing import Any

import click

from pilotlight import __version__
from pilotlight.errors import PilotlightError

COMMANDS = {
    "serve": "serve",
    "invoke": "invoke",
    "export": "exporter",
    "verify": "exporter",
    "evaluate": "exporter",
    "inspect": "inspect",
    "seal": "seal",
    "keyserver": "keyserver",
    "proxy": "proxy",
    "receipt": "receipt",
    "ps": "operate",
    "swap": "operate",
    "bench": "bench",
    "plan": "plan",
    "usage": "usage",
    "keys": "keys",
}
"""Every command in the order of the help, and the module under ``pilotlight.commands`` which defines it by that name.

A module is loaded for its own command and for the help only; what is heavy it imports inside the command.
"""


class _Commands(click.Group):
    """Loads a command when it is called, and turns our own errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"pilotlight.commands.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PilotlightError as error:
            click.echo(f"pilotlight: {error.message}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pilotlight")
def main() -> None:
    """A function runtime for language models.

    Turn a Hugging Face model into a small verified artifact with `export`, look at it with `inspect`, try it with
    `invoke`, serve it over the OpenAI API with `serve`, and see what was used with `usage`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # files to work in are removed; servers drain instead
