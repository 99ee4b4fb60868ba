"""A function: one artifact behind a name. It takes an invocation from the parsed request to its usage record.

template → tokenize → submit and admit → token events → text → commit, and only then the client's last frame. The task
that runs an invocation belongs to the function and not to the client's connection, so a client that leaves can end the
generation but never the metering.
"""

from pilotlight.function.contracts import Backend, Observer, Prices, UsageLedger
from pilotlight.function.function import Function
from pilotlight.function.invocation import Cut, Invocation
from pilotlight.function.request import Request
from pilotlight.function.text_side import Texts

__all__ = ["Backend", "Cut", "Function", "Invocation", "Observer", "Prices", "Request", "Texts", "UsageLedger"]
