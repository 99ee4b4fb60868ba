"""Pilotlight: a function runtime for language models."""

import os

# ONNX Runtime's builds tell their maker what they load and run, unless this is set before they are loaded
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
