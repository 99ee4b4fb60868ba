"""``python -m pilotlight_export``, which is what ``pilotlight export``, ``verify`` and ``evaluate`` run."""

from pilotlight_export.cli import main

main(prog_name="pilotlight")
