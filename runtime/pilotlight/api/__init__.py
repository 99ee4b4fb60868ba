"""HTTP: the wire formats that app backends speak, on top of functions."""
