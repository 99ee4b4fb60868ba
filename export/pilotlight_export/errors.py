"""Why an export ends without an artifact, or a measurement without a result; each is one line for a person.

StartupError                     (pilotlight.errors)
└── ExportError
    ├── SourceError              the model is missing, incomplete or damaged
    ├── UnsupportedModel         the model is sound but cannot be exported
    ├── UnknownRecipe            the precision has no recipe of that name
    ├── FusionError              the exported graph is not shaped as its family says
    ├── VerificationError        the artifact does not compute what the model computes
    ├── TextError                the text to measure on cannot be read
    ├── EvaluationError          an artifact cannot be compared with others
    └── TargetError              the artifact cannot be written where it was asked for
"""

from __future__ import annotations

from pilotlight.errors import StartupError


def first_line(error: Exception) -> str:
    """Return what another library's error says first, for our own one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ExportError(StartupError):
    """No artifact was written."""

    code = "export_failed"


class SourceError(ExportError):
    """The model is missing, incomplete or damaged."""

    code = "source_invalid"


class UnsupportedModel(ExportError):
    """The model is sound but cannot be exported; the line names what was found and what is supported."""

    code = "model_unsupported"


class UnknownRecipe(ExportError):
    """The precision has no recipe of that name; the line names those it has."""

    code = "recipe_unknown"


class FusionError(ExportError):
    """The exported graph is not shaped as its family says."""

    code = "fusion_failed"


class VerificationError(ExportError):
    """The artifact does not compute what the model computes."""

    code = "verification_failed"


class TextError(ExportError):
    """The text to measure on cannot be read."""

    code = "text_invalid"


class EvaluationError(ExportError):
    """An artifact cannot be compared with others."""

    code = "evaluation_failed"


class TargetError(ExportError):
    """The artifact cannot be written where it was asked for."""

    code = "target_invalid"
