"""The part of the tests that runs as AArch64 code: python tests/aarch64/inside.py BOARD [pytest's arguments]

Owns: choosing tests. Emulation costs twelve times the processor time and a kernel compiles in 11 s, so every width and
layout is compiled with the activation scales the decoder uses (tests/aarch64/processor.py), and what else
kernels/test_matmul.py asks of matrix kernels is asked of the best instruction set in a few layouts. Does not know: how
AArch64 code comes to run here (tests/aarch64/prepare.py).
"""

import resource
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

import edge_gemma  # noqa: E402

edge_gemma.__path__.append(str(REPOSITORY))  # edge_gemma.export and edge_gemma.quant, as they are installed

from edge_gemma import kernels  # noqa: E402
from edge_gemma.kernels import thread_count  # noqa: E402
from tests.aarch64.prepare import BOARDS, Board  # noqa: E402

thread_count.MOST = min(2, thread_count.MOST)  # two emulated boards share the machine
BEST = kernels.available_variants()[0]
STANDARD = (4, 32)  # bits and group of the layout that stands for all where one is enough


def _by_token(variant, bits, group, minimum):
    """Tests with one activation scale a token."""
    return variant == BEST and not minimum and (group == 0 or (bits, group) == STANDARD)


def _attention(variant, half, heads, kv, hd, n, position, window, capacity):
    kinds = {(256, True), (512, False), (12, False)}  # more than 4 query heads a KV head, up to 4, plain loops
    return variant == BEST and (hd, half) in kinds and (n, position) != (3, 0)


def _any(**parameters):
    return True


def _model(kind, recipe):
    return (kind, recipe) in (("e2b", "q4"), ("gemma3", "q8"))


CHOICE = {
    "folder/test_layouts": _any,
    "kernels/test_matmul": {
        "test_matmul_is_the_oracle": lambda variant, per_group, **layout: _by_token(variant, **layout),
        "test_matmul_integers_are_exact_at_the_extremes": _by_token,
        "test_a_row_is_the_same_in_every_tile_and_for_every_thread_count": _by_token,
        "test_a_slice_of_panels_is_a_matrix": lambda variant: variant == BEST,
        "test_quantize_activations_is_the_oracle_bit_for_bit": _any,
        "test_quantize_rounds_half_to_even_and_survives_anything": _any,
    },
    "kernels/test_kernels": {
        "test_norms": _any,
        "test_rms_norm_rope_in_place_and_out_of_place": _any,
        "test_gelu_and_softcap": _any,
        "test_store_kv_is_the_oracle": _any,
        "test_float16_rounds_as_numpy_does": _any,
        "test_attention_is_the_oracle": _attention,
        "test_full_attention_is_the_oracle": lambda variant, **sizes: variant == BEST,
    },
    "kernels/test_program": {"test_a_rewind_undoes_a_few_tokens": _any},
    "model/test_goldens": {
        "test_forward_equals_the_golden": _any,
        "test_greedy_continuation_equals_the_golden": _any,
        "test_the_number_of_threads_changes_nothing": _model,
        "test_chunked_prefill_equals_unchunked": _model,
        "test_logits_are_as_close_to_the_reference_as_the_activations_allow": _model,
    },
    "text/test_tokenizer": {
        "test_equal_ids_on_any_text": _any,
        "test_round_trip": _any,
        "test_streaming_gives_the_text_of_decode": _any,
        "test_odd_characters": _any,
    },
    "aarch64/processor": _any,
}
"""File -> test -> which of its parameters; each must choose something."""


class Choice:
    """pytest plugin: the chosen tests of each file, and the board for processor.py."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def pytest_configure(self) -> None:
        from hypothesis import settings

        settings.register_profile("emulated", deadline=None, database=None)
        settings.load_profile("emulated")

    @pytest.fixture
    def board(self) -> Board:
        return self._board

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen, found = [], set()
        for item in items:
            file = item.path.relative_to(REPOSITORY / "tests").with_suffix("").as_posix()
            tests = CHOICE[file]
            rule = tests.get(item.originalname) if isinstance(tests, dict) else tests
            if rule and rule(**(item.callspec.params if hasattr(item, "callspec") else {})):
                chosen.append(item)
                found.add((file, item.originalname))
        wanted = {(file, test) for file, tests in CHOICE.items() if isinstance(tests, dict) for test in tests}
        if missing := sorted(wanted - found):
            raise pytest.UsageError(f"tests/aarch64/inside.py chooses tests that are not there: {missing}")
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an illegal instruction leaves a traceback, not the emulator
    files = [REPOSITORY / "tests" / f"{file}.py" for file in CHOICE]
    options = [
        "-vv",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(REPOSITORY),
        "--durations=10",
        *sys.argv[2:],
    ]
    return pytest.main([*options, *map(str, files)], plugins=[Choice(BOARDS[sys.argv[1]])])


if __name__ == "__main__":
    sys.exit(main())
