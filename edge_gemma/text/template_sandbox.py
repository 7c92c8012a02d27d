"""Rendering a checkpoint's Jinja template, which is untrusted code.

Owns: the sandbox, what transformers gives templates (tojson, raise_exception, strftime_now, the generation and loop
control tags), and a ledger: a template that loops, recurses or builds huge values ends in a TemplateError, not in a
full memory. Does not know: messages, tokens.

The ledger. Each operation pays for what it reads and for what it makes, so passing a value on costs nothing. The weight
of a value is its length when written out, with everything nested in it. Only the operations of _GROWING make something
heavier than their operands, and their results are estimated before they are made. One rendering may spend a constant,
plus the weight of its variables, plus the square of their longest list: released templates look back from every
message to all earlier ones.
"""

import functools
import itertools
import json
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edge_gemma.errors import TemplateError

SOURCE_LIMIT = 1 << 17  # characters of a template; Gemma's have 19,000
_STEPS = 2_000_000  # a step: one item of a loop, 16 nodes of its body, 16 characters read
_CALL = 16  # steps
_CHARACTERS = 1 << 23  # in all texts made on the way
_CHARACTERS_A_WEIGHT = 32  # more for each unit of the variables' weight: templates copy a text a few times
_CONTAINER, _ITEM = 64, 16  # characters that a list costs, and each of its items: about their bytes
_DEPTH = 200  # lists in lists
_LARGEST_INTEGER = 20_000  # bits: larger ones are slow to divide
_LONGEST_FORM = 200  # characters of a form of date

# Filters, and methods of texts and numbers, whose result may be heavier than all they are given.
_GROWING = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "translate", "to_bytes", "indent", "batch",
     "slice", "round", "tojson")
)  # fmt: skip
# Filters that read no item, or one at a time as it is asked for.
_SHALLOW = frozenset(
    ("length", "count", "first", "last", "default", "d", "list", "items", "map", "select", "reject", "selectattr",
     "rejectattr", "reverse", "random")
)  # fmt: skip
_LEFT_OUT = ("format", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # widths in texts, nested indents, slow


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
            tree = _Metered().visit(tree)
            code = environment.compile(tree)
            self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        except (Exception, RecursionError) as error:  # whatever a hostile source does to parser and compiler
            raise TemplateError(f"the chat template cannot be compiled: {_one_line(error)}") from None
        self._environment = environment

    def render(self, **variables: Any) -> str:
        """Returns the text. Raises TemplateError if the template refuses the variables, fails, or spends too much."""
        with self._lock:
            try:
                self._environment.ledger = ledger = _Ledger(variables)
                return "".join(ledger.makes(piece) for piece in self._template.generate(**variables))
            except (Exception, RecursionError) as error:  # the template is foreign code: anything may come out of it
                raise TemplateError(f"the chat template cannot be rendered: {_one_line(error)}") from None
            finally:
                self._environment.ledger = _Ledger({})  # lets go of the values


class _OverBudget(Exception):
    pass


class _Ledger:
    """The budget of one rendering: the `steps` of time and the `characters` of memory that are left."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._known: dict[int, tuple[Collection[Any], int, int]] = {}  # by id, which holds while the value is kept
        self.steps = self.characters = self.heaviest = 1 << 60
        weight = sum(self.weight(value) for value in variables.values())
        longest = max((len(value) for value in variables.values() if isinstance(value, list)), default=0)
        self.steps = self._steps = _STEPS + weight + 4 * longest**2
        self.characters = self.heaviest = _CHARACTERS + _CHARACTERS_A_WEIGHT * weight

    def pay(self, steps: int) -> None:
        self.steps -= max(0, steps)
        if self.steps < 0:
            raise _OverBudget(f"it takes more than {self._steps} steps")

    def write(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise _OverBudget(f"it builds more than {self.heaviest} characters")

    def reads(self, *values: Any) -> None:
        self.pay(sum(map(self.weight, values)) >> 4)

    def makes(self, value: Any) -> Any:
        """Pay for `value` and return it. A generator pays while it is used."""
        if isinstance(value, str | bytes):
            self.write(len(value))
        elif isinstance(value, int):
            if value.bit_length() > _LARGEST_INTEGER:
                raise _OverBudget(f"it makes a number of {value.bit_length()} bits")
        elif isinstance(value, Iterator):
            return map(self._item, value)
        else:
            self.weight(value)
        return value

    def _item(self, value: Any) -> Any:
        self.pay(1)
        return self.makes(value)

    def weight(self, value: Any) -> int:
        return self._measured(value)[0]

    def depth(self, value: Any) -> int:
        return self._measured(value)[1]

    def _measured(self, value: Any) -> tuple[int, int]:
        """Returns (weight, depth). A list, tuple, set or mapping seen for the first time is paid for."""
        if isinstance(value, str | bytes):
            return len(value), 0
        if isinstance(value, int):
            return 1 + value.bit_length() // 3, 0
        if isinstance(value, range):
            return 1 + len(value), 1
        if not isinstance(value, Collection):
            return 1, 0
        if (known := self._known.get(id(value))) is None:
            items = [*value, *value.values()] if isinstance(value, Mapping) else [*value]
            self.pay(len(items))
            measured = [self._measured(item) for item in items]
            self.write(_CONTAINER + sum(_ITEM + (len(item) if isinstance(item, str) else 0) for item in items))
            weight, depth = 2 + sum(2 + w for w, _ in measured), 1 + max((d for _, d in measured), default=0)
            if weight > self.heaviest:
                raise _OverBudget(f"it builds more than {self.heaviest} characters")
            if depth > _DEPTH:
                raise _OverBudget(f"there are lists in lists, {depth} deep")
            self._known[id(value)] = known = value, weight, depth
        return known[1:]

    def product(self, first: Any, *rest: Any) -> float:
        """The most that `first` may weigh: numbers multiply by their value, other things by their weight."""
        factors = (abs(value) if isinstance(value, int | float) else self.weight(value) for value in rest)
        return self.weight(first) * math.prod(max(1, factor) for factor in factors)

    def fits(self, weight: float) -> None:
        """Raises _OverBudget for a value that would be too heavy, before it is made."""
        if not weight <= self.heaviest:
            raise _OverBudget(f"it would build more than {self.heaviest} characters")

    def grows(self, name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Estimate the result of an operation of _GROWING, which is applied to the first argument."""
        weight = self.product(*arguments, *options.values())
        if name == "replace" and not options and all(isinstance(value, str) for value in arguments[:3]):
            text, old, new, *_ = arguments
            weight = len(text) + text.count(old) * len(new)
        elif name == "round":
            weight = 2.0 ** min(1000, self.product("1", *arguments[1:], *options.values()))
        elif name == "tojson":
            weight *= self.depth(arguments[0]) + 1  # each level of nesting is indented
        self.fits(weight)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Routes loops, comparisons, `~`, slices and literals, which no method of the environment sees, through filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        size = sum(1 + len(getattr(inner, "data", "")) // 64 for inner in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.iter = _through(" each", node.iter, nodes.Const(1 + size // 16))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(" joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        holders: tuple[nodes.Compare | nodes.Operand, ...] = (node, *node.ops)
        for holder in holders:
            if not isinstance(holder.expr, nodes.Const):
                holder.expr = _through(" read", holder.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(" made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node  # `for key, value in`
        try:
            node.as_const()
        except nodes.Impossible:
            return _through(" made", node)
        return node

    visit_Tuple = visit_Dict = visit_List


def _through(name: str, node: nodes.Node, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    """A namespace that is written out as its name only. Namespaces can hold each other, so their contents have no
    bound.
    """

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._output,
        )
        self.ledger = _Ledger({})  # for constants, which are worked out while compiling
        self.filters["tojson"] = _tojson
        filters: dict[str, Any] = self.filters
        tests: dict[str, Any] = self.tests
        self.filters = {n: self._metered(n, f) for n, f in filters.items() if n not in _LEFT_OUT}
        self.tests = {n: self._metered(n, f) for n, f in tests.items()}
        # names that no template can write; `map` could still call them, which does no harm
        self.filters |= {" each": self._each, " joined": self._joined, " read": self._read, " made": self._made}
        self.globals |= {
            "namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        }  # fmt: skip
        del self.globals["lipsum"]

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox's own, but without its checks for namespaces, where they take 8 microseconds."""
        if type(obj) is not _Namespace or attribute.startswith("_"):
            return super().getattr(obj, attribute)
        try:
            return getattr(obj, attribute)
        except AttributeError:
            return self.undefined(obj=obj, name=attribute)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.ledger.pay(_CALL)
        if isinstance(__obj, LoopContext):
            args = tuple(map(self._each, args))
        elif not isinstance(__obj, Macro):
            receiver = getattr(__obj, "__self__", None)
            self.ledger.reads(*args, *kwargs.values(), *(() if isinstance(receiver, Mapping) else (receiver,)))
            if (name := getattr(__obj, "__name__", "")) in _GROWING:
                self.ledger.grows(name, (receiver, *args), kwargs)
        return self.ledger.makes(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise _OverBudget("it uses format, which is not supported")  # widths hide inside its texts
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.ledger.pay(1)
        if operator == "%" and isinstance(left, str | bytes):
            raise _OverBudget("it uses % as format, which is not supported")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _LARGEST_INTEGER:
                raise _OverBudget(f"it makes a number of more than {_LARGEST_INTEGER} bits")
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            self.ledger.fits(self.ledger.product("1", left, right))
        return self.ledger.makes(super().call_binop(context, operator, left, right))

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        start = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # keeps the mark of filters that want the context
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = (*args[start:], *kwargs.values())
            self.ledger.pay(_CALL)
            if name not in _SHALLOW:
                self.ledger.reads(*values)
            if name in _GROWING:
                self.ledger.grows(name, args[start:], kwargs)
            if name == "sum" and not all(isinstance(value, int | float | str) for value in values[1:]):
                raise _OverBudget("it adds up lists, which is not supported")
            return self.ledger.makes(function(*args, **kwargs))

        return metered

    def _output(self, value: Any) -> Any:
        self.ledger.write(self.ledger.weight(value))
        return value

    def _each(self, values: Iterable[Any], steps: int = _CALL) -> list[Any]:
        """Pay for a loop whose body costs `steps`. Returns its items."""
        steps = max(1, steps)
        items = list(itertools.islice(values, self.ledger.steps // steps + 1))
        self.ledger.pay(len(items) * steps)
        return items

    def _joined(self, values: list[Any]) -> str:
        self.ledger.write(sum(map(self.ledger.weight, values)))
        return "".join(map(str, values))

    def _read(self, value: Any) -> Any:
        self.ledger.reads(value)
        return value

    def _made(self, value: Any) -> Any:
        return self.ledger.makes(value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without escapes. Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > _LONGEST_FORM:
        raise _OverBudget(f"it writes the date in a form of {len(form)} characters")
    return datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
