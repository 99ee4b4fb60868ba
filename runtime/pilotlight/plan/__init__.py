"""The planner: what a trace would cost and how long it would wait, on the host's and the engine's own decisions."""
