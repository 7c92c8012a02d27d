"""What a kernel is: its definition, what it expects, and its operations.

    @kernel("h, a float32 [n, d]; weight float32 [d]", _operations)
    def add_rms_norm(h: Array, a: Array, weight: Array, eps: float) -> None:
        h += ...

A definition says in NumPy what the kernel computes. It is what the rest of the package imports: calling it does the
operations (recording/operation.py), which are compiled code, and writes them down where a program is recorded.
`kernel.definition` is the function itself, slow and plain: the oracle of the tests. Integer results of the two are
equal; where floats are summed, a definition sums in float64 and the compiled code may differ by float32 rounding.

Owns: refusing arguments, calling. Does not know: any kernel. A kernel's file holds everything else about it: the
compiled code, the definition, and how a call becomes operations.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec

import numpy as np

from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import Operation

P = ParamSpec("P")
Array = np.ndarray

registered: "dict[str, Kernel]" = {}
"""Every kernel by its name."""

_ARRAYS = re.compile(r"(?:^|: )(\w+(?:, \w+)*) ([a-z]+\d+) \[(.*?)\]( or None)?")


class Expected:
    """The arrays of "h, a float32 [n, d]; weight float32 [d] or None; out float32 [...]": what their names stand for.

    Lengths of one name are equal. Numbers are what they are, "..." is any shape, other lengths ("groups or 1") and text
    without a dtype mean nothing here.
    """

    def __init__(self, text: str, parameters: list[str]) -> None:
        self._arrays: list[tuple[int, np.dtype, bool, int | None, list[tuple[int, int | str]]]] = []
        for names, dtype, shape, optional in (found for part in text.split("; ") for found in _ARRAYS.findall(part)):
            axes = None if shape == "..." else len(shape.split(", "))
            lengths = [(i, int(d) if d.isdigit() else d) for i, d in enumerate(shape.split(", "))]
            lengths = [(i, d) for i, d in lengths if isinstance(d, int) or d.isidentifier()]
            for name in names.split(", "):
                self._arrays.append((parameters.index(name), np.dtype(dtype), bool(optional), axes, lengths))

    def are(self, arguments: tuple[Any, ...]) -> bool:
        """Whether arguments are so."""
        found: dict[object, int] = {}
        for place, dtype, optional, axes, lengths in self._arrays:
            array = arguments[place]
            if array is None and optional:
                continue
            if array.dtype != dtype or not array.flags.c_contiguous:
                return False
            shape = array.shape
            if axes is not None and len(shape) != axes:
                return False
            for axis, length in lengths:
                if shape[axis] != (length if length.__class__ is int else found.setdefault(length, shape[axis])):
                    return False
        return True


class Kernel(Generic[P]):
    """A kernel. Calling it raises ValueError for arguments that do not fit each other, before anything is touched."""

    def __init__(
        self, definition: Callable[P, None], expected: str, operations: Callable[..., Iterable[Operation] | None]
    ) -> None:
        functools.update_wrapper(self, definition)
        self.definition = definition
        self.expected = expected
        self._signature = inspect.signature(definition)
        self._expected = Expected(expected, list(self._signature.parameters))
        self._operations = operations

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> None:
        if named:
            arguments = self._signature.bind(*arguments, **named).args  # type: ignore[assignment]
        operations = self._operations(program.memory(), *arguments) if self._expected.are(arguments) else None
        if operations is None or not _writeable(operations):
            raise ValueError(f"arguments do not fit each other, expected {self.expected}: got {self._given(arguments)}")
        program.call(operations)

    def _given(self, arguments: tuple[object, ...]) -> str:
        arrays = zip(self._signature.parameters, arguments, strict=False)
        return ", ".join(
            f"{name} {a.dtype}{list(a.shape)}{'' if a.flags.c_contiguous else ' not C-contiguous'}"
            for name, a in arrays
            if isinstance(a, np.ndarray)
        )


def _writeable(operations: Iterable[Operation]) -> bool:
    return all(a.flags.writeable for operation in operations for a in operation.writes + operation.appends)


def kernel(
    expected: str, operations: Callable[..., list[Operation] | None]
) -> Callable[[Callable[P, None]], Kernel[P]]:
    """Decorator of a definition: a Kernel.

    expected: the arrays, their dtypes and shapes, as "x, out float32 [n, d]; weight float32 [d]": what is checked
    (Expected), what an error says, and what tests of all kernels make their arguments from. operations: a function of
    a Memory and the arguments. It gives the operations, each of which reads what the one before wrote, or None for
    arguments that do not fit.
    """

    def decorate(definition: Callable[P, None]) -> Kernel[P]:
        registered[definition.__name__] = made = Kernel(definition, expected, operations)
        return made

    return decorate
