"""The environment in which chat templates run: the one of ``transformers``, so that a template renders the same here.

A template comes with a model, and its messages come from clients; neither may hold up or fill up the process. So a
rendering has a time limit, checked in every turn of a loop and every call of a macro, and no value in it may become
larger than a prompt may be.

Importing this module imports jinja2, which takes longer than the rest of ``text`` together: import it where a template
is compiled.

Source: the chat template guide of Hugging Face transformers; jinja2's documentation of its sandbox.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_VALUE_CHARS = 4 * 1024 * 1024
MAX_NUMBER = 10**6
"""The largest number that a template may give to a function, as a width or a count for instance."""
MAX_EXPONENT = 64
_WIDE = re.compile(r"%[-+ #0]*(\*|\d{5})")
_WIDE_FIELD = re.compile(r"\{[^}]*:[^}]*(\{|\d{5})")
_deadline_at: ContextVar[float] = ContextVar("deadline_at", default=float("inf"))  # in the thread's processor time


class GenerationTag(Extension):
    """``{% generation %}`` marks an assistant's words for training; for serving it is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the tag's body as a scope."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def compile_template(source: str) -> Template:
    """Compile a chat template.

    Raises:
        TemplateSyntaxError: the source is not a template.
    """
    environment = _Environment()
    tree = _Limits().visit(environment.parse(source))
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Have the templates that are rendered in this block fail after so many seconds of this thread's processor time.

    On a busy machine, a good template may take any time by the clock.
    """
    token = _deadline_at.set(time.thread_time() + limit_s)
    try:
        yield
    finally:
        _deadline_at.reset(token)


class _Limits(NodeTransformer):
    """Puts a look at the clock into every loop and macro, and a look at the size on every ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno)
        node.body = [tick, *node.body]
        return node


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "+", "%", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension])
        self.filters["tojson"] = _to_json
        self.filters = {name: _limited(function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def tick(self) -> None:
        if time.thread_time() > _deadline_at.get():
            raise TemplateError("it takes too long")

    def concatenate(self, *parts: object) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if isinstance(text := getattr(value, "__self__", None), str) and _WIDE_FIELD.search(text):
            raise TemplateError("a width is too large")
        return super().wrap_str_format(value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        of = getattr(__obj, "__self__", None)
        _check_arguments(getattr(__obj, "__name__", ""), (of, *args) if isinstance(of, str) else args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that looks at its arguments first."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function.__name__.removeprefix("do_").removeprefix("sync_do_"), args, kwargs)
        return function(*args, **kwargs)

    return limited


def _check_operands(operator: str, left: Any, right: Any) -> None:
    sized = (str, list, tuple)
    if operator == "*" and isinstance(left, sized) and isinstance(right, int):
        _check_size(len(left) * right)
    elif operator == "*" and isinstance(right, sized) and isinstance(left, int):
        _check_size(len(right) * left)
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _check_size(left.bit_length() + right.bit_length())
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _check_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
        raise TemplateError("a width is too large")
    elif operator == "**" and isinstance(right, int | float) and abs(right) > MAX_EXPONENT:
        raise TemplateError("an exponent is too large")


def _check_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    texts = [argument for argument in args if isinstance(argument, str)]
    if any(isinstance(number, int) and number > MAX_NUMBER for number in (*args, *kwargs.values())):
        raise TemplateError("a number is too large")
    if name == "replace" and len(texts) > 2:
        _check_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join":
        items = max((len(argument) for argument in args if isinstance(argument, list | tuple)), default=1)
        _check_size(items * max(map(len, texts), default=0))
    elif name == "format" and texts:
        _check_operands("%", texts[0], None)


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_VALUE_CHARS:
        raise TemplateError("a value is too large")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
