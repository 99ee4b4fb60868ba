"""Messages to the one text that a model continues, by the ``chat_template.jinja`` of an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pilotlight.artifact import CHAT_TEMPLATE, Artifact
from pilotlight.errors import ArtifactError, InvalidRequest
from pilotlight.text.tool_syntax import described, syntax_of

if TYPE_CHECKING:
    from jinja2 import Template

MAX_RENDERED_CHARS = 4 * 1024 * 1024
MAX_REASON_CHARS = 300
MAX_RENDER_S = 2.0
"""A rendering takes about a millisecond; one that takes longer than this holds up everybody."""

# What Python raises inside a template that meets messages of a shape it was not written for.
_SHAPE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """A compiled template, or the lack of one. Compile it once; rendering keeps no state."""

    def __init__(self, template: Template | None, special_texts: Mapping[str, str], source: str | None = None) -> None:
        self._template = template
        self.tool_syntax = syntax_of(source)
        self._knows_tools = source is None or "tools" in source
        self._special_texts = dict(special_texts)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt that asks for the next answer.

        ``variables`` are a request's own template variables and override the usual ones, ``add_generation_prompt``
        among them.

        Raises:
            InvalidRequest: there is no template, it refuses the messages, or its text is too long.

        Where a template has no words for tools, a system message describes them.
        """
        if self._template is None:
            raise InvalidRequest("messages", "this function's model has no chat template; use /v1/completions")
        if tools and not self._knows_tools:
            messages = _with_tools(messages, tools)
        usual = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        from jinja2 import TemplateError

        from pilotlight.text.sandbox import time_limit

        try:
            with time_limit(MAX_RENDER_S):
                return _join(self._template.generate({**self._special_texts, **usual, **(variables or {})}))
        except (TemplateError, *_SHAPE_ERRORS) as error:
            raise InvalidRequest("messages", f"the chat template refused the messages: {_one_line(error)}") from error


def load_chat_template(artifact: Artifact, special_texts: Mapping[str, str]) -> ChatTemplate:
    """Compile an artifact's template, where it has one.

    It imports jinja2 and compiles (tens of milliseconds): run it beside the loading of the session.

    Raises:
        ArtifactError: the file is not a template.
    """
    path = artifact.path / CHAT_TEMPLATE
    try:
        source = artifact.optional_text(CHAT_TEMPLATE)
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(path, f"cannot be read ({_one_line(error)})") from error
    if source is None:
        return ChatTemplate(None, special_texts)
    from jinja2 import TemplateError

    from pilotlight.text.sandbox import compile_template

    try:
        return ChatTemplate(compile_template(source), special_texts, source)
    except TemplateError as error:
        raise ArtifactError(path, f"is not a chat template ({_one_line(error)})") from error


def _with_tools(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
) -> Sequence[Mapping[str, object]]:
    first = messages[0] if messages and messages[0].get("role") == "system" else None
    told = described(tools)
    if first is None:
        return [{"role": "system", "content": told}, *messages]
    return [{**first, "content": f"{first.get('content') or ''}\n\n{told}"}, *messages[1:]]


def _join(pieces: Iterable[str]) -> str:
    rendered: list[str] = []
    num_chars = 0
    for piece in pieces:
        rendered.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise ValueError(f"the rendered text is longer than {MAX_RENDERED_CHARS:,} characters")
    return "".join(rendered)


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= MAX_REASON_CHARS else f"{line[:MAX_REASON_CHARS]}…"
