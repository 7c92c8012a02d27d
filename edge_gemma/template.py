"""Rendering a checkpoint's Jinja template, which is untrusted code.

Owns: the sandbox, what transformers gives templates (tojson, raise_exception, strftime_now, the generation and loop
control tags), and a budget: a template that loops, recurses or builds huge texts ends in a TemplateError, not in a
full memory. Does not know: messages, tokens.
"""

import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from edge_gemma.errors import TemplateError

SOURCE_LIMIT = 1 << 20  # characters of a template
OUTPUT_LIMIT = 8 << 20  # characters of a rendered prompt
_STEPS = 2_000_000  # loop items; a call counts as _CALL
_CALL = 16
_CHARACTERS = 1 << 26  # in all texts made on the way
_LARGEST_NUMBER = 1_000_000  # as an argument: widths, counts
_LARGEST_POWER = 64


class Template:
    """A compiled template. `render` may be called from any thread, one at a time."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError if `source` is not a template."""
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"the chat template has {len(source)} characters, expected at most {SOURCE_LIMIT}")
        self._lock = threading.Lock()
        environment = _Environment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(find_undeclared_variables(tree))  # those it looks at
            tree = _Counted().visit(tree)
            code = environment.compile(tree)
            self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        except (Exception, RecursionError) as error:  # whatever a hostile source does to parser and compiler
            raise TemplateError(f"the chat template cannot be compiled: {_one_line(error)}") from None
        self._environment = environment

    def render(self, **variables: Any) -> str:
        """Raises TemplateError if the template refuses the variables, fails, or exceeds its budget."""
        with self._lock:
            self._environment.budget = _Budget()
            pieces, size = [], 0
            try:
                for piece in self._template.generate(**variables):
                    size += len(piece)
                    if size > OUTPUT_LIMIT:
                        raise _OverBudget(f"it writes more than {OUTPUT_LIMIT} characters")
                    pieces.append(piece)
            except (Exception, RecursionError) as error:  # the template is foreign code: anything may come out of it
                raise TemplateError(f"the chat template cannot be rendered: {_one_line(error)}") from None
        return "".join(pieces)


class _OverBudget(Exception):
    pass


class _Budget:
    """What is left of the steps and characters of one rendering."""

    def __init__(self) -> None:
        self.steps, self.characters = _STEPS, _CHARACTERS

    def step(self, n: int = 1) -> None:
        self.steps -= n
        if self.steps < 0:
            raise _OverBudget(f"it takes more than {_STEPS} steps")

    def text(self, value: Any) -> Any:
        if isinstance(value, str):
            self.characters -= len(value)
            if self.characters < 0:
                raise _OverBudget(f"it builds more than {_CHARACTERS} characters")
        return value

    def operands(self, *values: Any) -> None:
        """Refuse what could make a huge result out of small operands: big numbers, text times text."""
        product = 1.0
        for value in values:
            if isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
                raise _OverBudget(f"it calls something with {value!r:.40}")
            if isinstance(value, str | int | float):
                product *= max(1, len(value) if isinstance(value, str) else abs(value))
        if product > _CHARACTERS:
            raise _OverBudget("it multiplies long texts")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counted(NodeTransformer):
    """Routes every loop's items and every `~` through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_each", [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        items = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(items, "_concatenate", [], [], None, None).set_lineno(node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._output,
        )
        self.budget = _Budget()
        self.filters["tojson"] = _tojson
        self.filters |= {name: self._bounded(function) for name, function in self.filters.items()}
        self.filters |= {"_each": self._each, "_concatenate": self._concatenate}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"], self.filters["format"]

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        receiver = getattr(__obj, "__self__", None)
        self.budget.step(_CALL)
        self.budget.operands(*(receiver,) if isinstance(receiver, str) else (), *args, *kwargs.values())
        return self.budget.text(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise _OverBudget("it uses format, which is not supported")  # widths hide inside its texts
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise _OverBudget("it uses % as format, which is not supported")
        sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator in ("*", "**"):
            self.budget.operands(left, right if operator == "*" else right * _LARGEST_NUMBER // _LARGEST_POWER)
            self.budget.step(sum(sizes) * max([0, *(value for value in (left, right) if isinstance(value, int))]))
        elif operator == "+" and not isinstance(left, str):
            self.budget.step(sum(sizes))
        self.budget.step()
        return self.budget.text(super().call_binop(context, operator, left, right))

    def _output(self, value: Any) -> Any:
        return self.budget.text(value)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps the mark of filters that want the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step(_CALL)
            self.budget.operands(*args, *kwargs.values())
            return self.budget.text(function(*args, **kwargs))

        return bounded

    def _each(self, values: Iterable[Any]) -> list[Any]:
        items = list(itertools.islice(values, _STEPS + 1))
        self.budget.step(len(items))
        return items

    def _concatenate(self, values: list[Any]) -> str:
        return self.budget.text("".join(map(str, values)))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
