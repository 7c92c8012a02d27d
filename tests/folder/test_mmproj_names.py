"""Which file holds a GGUF model's towers, by the names that released repositories have."""

import pytest

from edge_gemma.errors import UsageError
from edge_gemma.folder.hub_name import HubName
from edge_gemma.folder.mmproj import is_mmproj, mmproj_beside, mmproj_of, which_mmproj

UNSLOTH = ["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"]


@pytest.mark.parametrize(("model", "names", "meant"), [
    ("gemma-4-E2B-it-Q4_K_M.gguf", UNSLOTH, ["mmproj-BF16.gguf"]),
    ("gemma-4-E2B-it-Q4_K_M.gguf", ["mmproj-F16.gguf", "mmproj-F32.gguf"], ["mmproj-F32.gguf"]),
    ("gemma-4-E2B-it-Q8_0.gguf", ["mmproj-gemma-4-E2B-it-Q8_0.gguf"], ["mmproj-gemma-4-E2B-it-Q8_0.gguf"]),
    ("gemma-4-E2B-it-Q8_0.gguf", ["mmproj-gemma-4-E2B-it-Q8_0.gguf", "mmproj-gemma-4-E2B-it-bf16.gguf"],
     ["mmproj-gemma-4-E2B-it-bf16.gguf"]),
    ("gemma-4-E2B-it-qat-q4_0.gguf", ["mmproj-gemma-4-E2B-it-qat-q4_0.gguf"], ["mmproj-gemma-4-E2B-it-qat-q4_0.gguf"]),
    ("gemma-4-E4B-it.gguf", ["mmproj-gemma-4-E2B-it-f16.gguf", "mmproj-gemma-4-E4B-it-f16.gguf"],
     ["mmproj-gemma-4-E4B-it-f16.gguf"]),
    ("gemma-4-E4B-it.gguf", ["gemma-4-E4B-it.mmproj-f16.gguf", "mmproj-F32.gguf"], ["gemma-4-E4B-it.mmproj-f16.gguf"]),
    ("gemma-4-E4B-it.gguf", ["mmproj-model-f16.gguf"], ["mmproj-model-f16.gguf"]),
    ("mine.gguf", ["mmproj-a.gguf", "mmproj-b.gguf"], ["mmproj-a.gguf", "mmproj-b.gguf"]),
    ("UD/big.gguf", [*UNSLOTH, "UD/big.gguf"], ["mmproj-BF16.gguf"]),
    ("UD/big.gguf", [*UNSLOTH, "UD/mmproj-F16.gguf"], ["UD/mmproj-F16.gguf"]),
    ("big.gguf", ["UD/mmproj-F16.gguf", "other.gguf", "mmproj.txt"], []),
    ("big.gguf", ["MMPROJ.GGUF"], ["MMPROJ.GGUF"]),
])  # fmt: skip
def test_the_file_that_is_meant(model: str, names: list[str], meant: list[str]) -> None:
    assert mmproj_of(model, [*names, model, "README.md"]) == meant


def test_beside_a_file(tmp_path) -> None:
    (tmp_path / "mmproj-F16.gguf").mkdir()
    assert mmproj_beside(tmp_path / "x.gguf") == []
    (tmp_path / "mmproj-F32.gguf").write_bytes(b"")
    (tmp_path / "mmproj-F16.gguf").rmdir()
    assert mmproj_beside(tmp_path / "x.gguf") == [tmp_path / "mmproj-F32.gguf"]
    assert mmproj_beside(tmp_path / "absent" / "x.gguf") == []


def test_it_is_never_the_model_itself() -> None:
    assert HubName.parse("owner/repo").gguf_of(["a.gguf", *UNSLOTH]) == "a.gguf"
    assert [is_mmproj(name) for name in ("mmproj/a.gguf", "b/MMPROJ-a.gguf", "mmproj-a.txt")] == [False, True, False]
    with pytest.raises(UsageError, match="no GGUF file 'mmproj'"):
        HubName.parse("owner/repo:mmproj").gguf_of(["a.gguf", *UNSLOTH])
    assert "(a, b, c, d and others)" in which_mmproj(["e", "d", "c", "b", "a"])
