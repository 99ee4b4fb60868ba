"""``python -m pilotlight_export``, which is what ``pilotlight export`` runs."""

from pilotlight_export.cli import main

main()
