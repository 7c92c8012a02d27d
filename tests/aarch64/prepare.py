"""An AArch64 Python with this project's dependencies, for running tests as a Raspberry Pi's code on an x86-64 machine.

    python tests/aarch64/prepare.py [FOLDER]

Owns: fetching the emulator, Debian's arm64 files and AArch64 wheels into one folder of the user's cache (0.5 GB), and
the command line that runs Python there. Does not know: which tests are run (tests/aarch64/inside.py), or the kernels.

Needs Linux on x86-64 with Debian's apt and dpkg, and its package sources and PyPI within reach, but no privileges:
nothing is installed on the machine. Every AArch64 process is `qemu-aarch64-static -L BOARD python`, where BOARD looks
like the root of a board's file system: links to the Debian files, and the board's /proc/cpuinfo, which the kernels
(kernels/targets.py) and onnxruntime read. Emulation opens a file below BOARD where there is one, and else the machine's
own. An emulated process starts no others: the machine does not know how to run AArch64 programs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
QEMU = "qemu-aarch64-static"
DEBIAN = ("python3", "libgomp1", "libstdc++6")
TEST_WHEELS = ("hypothesis", "pytest", "pytest-timeout")
BARE_WHEELS = ("tokenizers",)  # what it depends on is for downloading from a hub
FIRST_GLIBC = 17  # minor version of the oldest manylinux platform tag for AArch64


@dataclass(frozen=True)
class Board:
    """What is emulated."""

    name: str
    cpu: str  # QEMU's name, which is also LLVM's
    variant: str  # the kernels' name of its instruction set
    page_bytes: int  # of its usual kernel

    @property
    def cpuinfo(self) -> Path:
        return HERE / f"{self.name}.cpuinfo"


BOARDS = {
    b.name: b for b in (Board("pi5", "cortex-a76", "neon-dotprod", 16384), Board("pi4", "cortex-a72", "neon", 4096))
}


class Unavailable(Exception):
    """Emulation cannot be set up here; one line that says why."""


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-gemma" / "aarch64-root"


def command(folder: Path, board: Board, *arguments: str | Path, trace: Path | None = None) -> list[str]:
    """Python with `arguments`, emulated, at low priority. trace: a file for its system calls."""
    qemu = shutil.which(QEMU) or str(folder / "qemu" / "usr" / "bin" / QEMU)
    root = folder / board.name
    traced = ["-d", "strace", "-D", str(trace)] if trace else []
    return ["nice", "-n", "10", qemu, "-cpu", board.cpu, "-p", str(board.page_bytes), *traced, "-L", str(root),
            str(root / "usr/bin/python3"), *map(str, arguments)]  # fmt: skip


def environment(folder: Path, board: Board) -> dict[str, str]:
    """Of an emulated process: every cache is below `folder`, nothing is written into the checkout."""
    cache = folder / "cache" / board.name
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return kept | {
        "PYTHONPATH": str(folder / "site"),
        "PYTHONPYCACHEPREFIX": str(folder / "cache" / "pyc"),
        "XDG_CACHE_HOME": str(cache),  # compiled kernels: a second run loads them
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",  # two emulated boards share the machine
    }


def prepare(folder: Path) -> Path:
    """Make `folder` ready, or find it ready; raises Unavailable."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"AArch64 is emulated on Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    if missing := [tool for tool in ("apt-get", "dpkg-deb", "tar", "nice") if not shutil.which(tool)]:
        raise Unavailable(f"AArch64 emulation is set up with Debian's tools, {', '.join(missing)} not found")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)  # held to the end of this process: nobody rebuilds
        fcntl.flock(lock, fcntl.LOCK_SH)
        ready, recipe = folder / "ready", _recipe()
        if not ready.exists() or ready.read_text() != recipe:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not ready.exists() or ready.read_text() != recipe:
                ready.unlink(missing_ok=True)
                _build(folder)
                ready.write_text(recipe)
            fcntl.flock(lock, fcntl.LOCK_SH)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"AArch64 emulation cannot be set up in {folder}: {error}") from error
    return folder


def _requirements() -> list[str]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]


def _recipe() -> str:
    """A digest of everything that decides what is fetched."""
    parts = [Path(__file__).read_text(), *(board.cpuinfo.read_text() for board in BOARDS.values()), *_requirements()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _build(folder: Path) -> None:
    for name in ("apt", "root", "site", "qemu", *BOARDS):
        shutil.rmtree(folder / name, ignore_errors=True)
    _debian(folder)
    for board in BOARDS.values():
        (folder / board.name / "proc").mkdir(parents=True)
        shutil.copy(board.cpuinfo, folder / board.name / "proc" / "cpuinfo")
        for top in (folder / "root").iterdir():
            (folder / board.name / top.name).symlink_to(Path("..") / "root" / top.name)
    _wheels(folder)


def _run(arguments: list, **options) -> str:
    """Its output; Unavailable with the last line of it when it fails."""
    done = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        **options,
    )  # fmt: skip
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Unavailable(f"AArch64 emulation cannot be set up: {Path(arguments[0]).name} failed: {last}")
    return done.stdout


@contextlib.contextmanager
def _apt(folder: Path) -> Iterator[list[str]]:
    """apt-get with the machine's sources but a state of its own: an arm64 machine on which nothing is installed."""
    state, cache = folder / "apt" / "state", folder / "apt" / "cache"
    for needed in (state / "lists" / "partial", cache / "archives" / "partial"):
        needed.mkdir(parents=True)
    (folder / "apt" / "status").touch()
    architectures = "arm64" if shutil.which(QEMU) else "arm64,amd64"
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": architectures, "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root", "Acquire::Retries": "2", "Acquire::Languages": "none",
        "Dir::State": state, "Dir::State::status": folder / "apt" / "status", "Dir::Cache": cache,
    }  # fmt: skip
    yield ["apt-get", "-q", "-y", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    shutil.rmtree(folder / "apt")


def _debian(folder: Path) -> None:
    """Debian's Python and libraries for arm64 in root/, unpacked and not configured; QEMU in qemu/ if it is missing."""
    with _apt(folder) as apt:
        _run([*apt, "update"])
        wanted = [*DEBIAN] if shutil.which(QEMU) else [*DEBIAN, "qemu-user-static:amd64"]
        _run([*apt, "--download-only", "install", *wanted])
        for top in ("bin", "lib", "sbin"):  # Debian's packages unpack through these links
            (folder / "root" / "usr" / top).mkdir(parents=True)
            (folder / "root" / top).symlink_to(Path("usr") / top)
        (folder / "qemu").mkdir()
        for package in sorted((folder / "apt" / "cache" / "archives").glob("*.deb")):
            _unpack(package, folder / ("qemu" if package.name.startswith("qemu-") else "root"))


def _unpack(package: Path, into: Path) -> None:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
        flags = [
            "--keep-directory-symlink",
            "--no-same-owner",
            "--exclude=./usr/share/doc",
            "--exclude=./usr/share/man",
        ]
        subprocess.run(["tar", "-x", "-C", into, *flags], stdin=archive.stdout, check=True)
    if archive.returncode:
        raise Unavailable(f"AArch64 emulation cannot be set up: {package.name} cannot be unpacked")


def _wheels(folder: Path) -> None:
    """The dependencies and the test tools as AArch64 wheels in site/, by this machine's pip."""
    ask = "import platform, sys; print('%d.%d' % sys.version_info[:2], platform.libc_ver()[1].split('.')[1])"
    python, glibc = _run(command(folder, BOARDS["pi5"], "-c", ask), env=environment(folder, BOARDS["pi5"])).split()
    tags = [*(f"manylinux_2_{n}_aarch64" for n in range(int(glibc), FIRST_GLIBC - 1, -1)), "manylinux2014_aarch64"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile",
           "--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--target", folder / "site",
           *(word for tag in tags for word in ("--platform", tag))]  # fmt: skip
    _run([*pip, *_requirements(), *TEST_WHEELS])
    _run([*pip, "--no-deps", *BARE_WHEELS])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    try:
        print(f"ready: {prepare(folder.absolute())}")
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
