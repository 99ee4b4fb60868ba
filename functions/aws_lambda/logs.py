"""Log lines as JSON objects, each with the invocation that it belongs to. No prompts and no keys are ever logged."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

import msgspec

aws_request_id: ContextVar[str | None] = ContextVar("aws_request_id", default=None)
"""The invocation that the current task answers."""


class JsonLines(logging.Formatter):
    """One object a line, which CloudWatch can query by field."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if (request_id := aws_request_id.get()) is not None:
            line["aws_request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def log_as_json() -> None:
    """Send every log record to standard output as JSON."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def write_line(fields: dict[str, object]) -> None:
    """Write one object as a line of its own."""
    sys.stdout.buffer.write(msgspec.json.encode(fields) + b"\n")
    sys.stdout.buffer.flush()
