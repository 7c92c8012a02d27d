"""What a kernel is: its definition in NumPy, and the compiled code that runs in its place.

    @kernel(_add_rms_norm, "h, a float32 [n, d]; weight float32 [d]", record=_record_add_rms_norm)
    def add_rms_norm(h, a, weight, eps) -> None:
        h += (a / np.sqrt((a.astype(np.float64) ** 2).mean(1, keepdims=True) + eps) * weight).astype(np.float32)

Calling `add_rms_norm` runs the compiled code; `add_rms_norm.definition` is the function as it is written, slow and
plain: the oracle of the tests. Integer results of the two are equal; where floats are summed, a definition sums in
float64 and the compiled code may differ by float32 rounding.

Owns: running, refusing arguments, writing calls down. Does not know: any kernel. A kernel's file holds everything else
about it: the compiled code, the definition, and how one token's call becomes an operation of a program.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Generic, ParamSpec

import numpy as np

from edge_gemma.kernels import compiler
from edge_gemma.kernels.recording.operation import NotRecordableError, Operation

P = ParamSpec("P")
Array = np.ndarray

registered: "dict[str, Kernel]" = {}
"""Every kernel by its name."""


class Kernel(Generic[P]):
    """A kernel. Calling it raises ValueError for arguments that do not fit each other, before anything is touched."""

    def __init__(
        self,
        definition: Callable[P, None],
        launch: Callable[..., bool],
        expected: str,
        record: Callable[..., Iterable[Operation]] | None,
    ) -> None:
        functools.update_wrapper(self, definition)
        self.definition = definition
        self.expected = expected
        self._launch = launch
        self._record = record

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> None:
        if not self._launch(*arguments, **named):
            raise ValueError(f"arguments do not fit each other, expected {self.expected}: got {self._given(arguments)}")
        if (recorder := getattr(compiler.recording, "recorder", None)) is not None:
            recorder.add(self, arguments, named)

    def operations(self, recorder: object, *arguments: P.args, **named: P.kwargs) -> Iterable[Operation]:
        """A call for one token as operations. Raises NotRecordableError where it cannot be one."""
        if self._record is None:
            raise NotRecordableError(self.definition.__name__)
        return self._record(recorder, *arguments, **named)

    def _given(self, arguments: tuple[object, ...]) -> str:
        arrays = zip(inspect.signature(self.definition).parameters, arguments, strict=False)
        return ", ".join(
            f"{name} {a.dtype}{list(a.shape)}{'' if a.flags.c_contiguous else ' not C-contiguous'}"
            for name, a in arrays
            if isinstance(a, np.ndarray)
        )


def kernel(
    launch: Callable[..., bool], expected: str, record: Callable[..., Iterable[Operation]] | None = None
) -> Callable[[Callable[P, None]], Kernel[P]]:
    """Decorator of a definition: a Kernel.

    launch: compiled code with the same arguments (compiler.compiled), or a function of them that launches some and
    returns whether the arguments fit. expected: the arrays, their dtypes and shapes, as "x, out float32 [n, d]; weight
    float32 [d]": what an error says, and what tests of all kernels make their arguments from. record: a function of a
    recorder and the arguments that yields the operations of a call with one row.
    """

    def decorate(definition: Callable[P, None]) -> Kernel[P]:
        run = functools.partial(compiler.launch, launch) if compiler.is_compiled(launch) else launch
        made = Kernel(definition, run, expected, record)
        registered[definition.__name__] = made
        return made

    return decorate
