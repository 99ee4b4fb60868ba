"""How much stands behind a claim that a function runs in a trusted execution environment: the label.

Everything that leaves the process carries it: response headers, usage records, receipts.
"""

from __future__ import annotations

from enum import StrEnum

TEE_HEADER = "x-pilotlight-tee"


class TeeLabel(StrEnum):
    """Only ``HARDWARE`` is a promise about the machine that answers.

    ``NONE``: there is no evidence, or it was refused. ``SIMULATED``: evidence of the simulator, which anybody can make.
    ``VECTOR_VERIFIED``: genuine evidence of a vendor's hardware that does not hold the verifier's nonce, so it may be
    of another machine and another day, or of a machine that is open to a debugger. ``HARDWARE``: genuine, fresh, and
    accepted by a policy.
    """

    NONE = "none"
    SIMULATED = "simulated"
    VECTOR_VERIFIED = "vector-verified"
    HARDWARE = "hardware"
