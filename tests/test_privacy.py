"""Nothing leaves the machine, and nothing is written but what docs/PRIVACY.md says: every command and the library's
main paths, in an empty home, each system call seen (tests/watched.py). Whatever tries to go out is refused.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.listening import measure
from edge_gemma import kernels
from edge_gemma.cli.main import cli
from edge_gemma.host.ort import onnxruntime
from tests import ROOT, hub_stand_in, watched
from tests.watched import Record, Watched, why_not

PRIVACY = ROOT / "docs" / "PRIVACY.md"
CACHE = Path(".cache/edge-gemma")  # below the home, where XDG_CACHE_HOME is not set
PULLED = Path(".local/share/edge-gemma")
GOES_OUT = {"pull"}  # the one command that may
SERVES = {"serve", "service"}  # for others to come in
DEMO = ROOT / "edge_gemma" / "demo"

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Run(NamedTuple):
    status: int
    output: str
    record: Record
    left: list[str]  # new files in the home, outside the cache and `out`


class Home:
    """An empty home, but for kernels that are `compiled` already, where programs are watched."""

    def __init__(self, path: Path, compiled: Path | None = None) -> None:
        self.path, self.out, self.temporary = path, path / "out", path / "tmp"
        for folder in (self.out, self.temporary):
            folder.mkdir(parents=True)
        compiled = compiled or kernels.cache_directory()
        if compiled.is_dir():
            shutil.copytree(compiled, path / CACHE / "kernels" / compiled.name)

    def run(self, *command: object, stdin: str = "", **variables: str) -> Run:
        """Run Python with these arguments and environment variables in the folder `out`."""
        environment = {
            "HOME": str(self.path), "TMPDIR": str(self.temporary), "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
            **variables,
        }  # fmt: skip
        before = self._foreign_files()
        program = Watched(
            [sys.executable, *command], env=environment, cwd=self.out, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        )  # fmt: skip
        output, _ = program.process.communicate(stdin, timeout=600)
        return Run(program.wait(10), output, program.record, sorted(self._foreign_files() - before))

    def _foreign_files(self) -> set[str]:
        files = (path.relative_to(self.path) for path in self.path.rglob("*") if not path.is_dir())
        return {str(path) for path in files if not path.is_relative_to(CACHE) and path.parts[0] != "out"}

    def check(self, run: Run, *writes: Path) -> None:
        """Nothing went out, and nothing was written but in the cache, below `out`, and `writes`."""
        assert run.record.went_out == []
        assert run.record.loopback == []
        assert run.record.written_outside(self.path / CACHE, self.out, *writes) == []
        assert run.left == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands are given: find, sound and text."""
    from edge_gemma.export.convert import export_checkpoint
    from edge_gemma.export.onnx_folder import export_onnx
    from tests.tiny import write_checkpoint
    from tests.tiny_gguf import write_gguf

    root = tmp_path_factory.mktemp("material")
    source = write_checkpoint(root / "source", "e2b")
    recordings = root / "recordings"
    recordings.mkdir()
    for name in ("timer.wav", "timer.txt"):
        shutil.copy(ROOT / "examples" / name, recordings)
    (text := root / "text.txt").write_text("The sky is blue and the sea is deep. " * 8)
    model = export_checkpoint(source, root / "model", "q4")
    return {
        "source": source, "model": model, "float": export_checkpoint(source, root / "float", "float"),
        "onnx": export_onnx(model, root / "onnx"), "gguf": write_gguf(root / "tiny.gguf", "e2b"),
        "recordings": recordings, "wav": recordings / "timer.wav", "text": text,
    }  # fmt: skip


# -- every command -----------------------------------------------------------------------------------------------------

# arguments with names of `material`, standard input; without a microphone `listen` ends in an error
COMMANDS = [
    ("run Hi --max-tokens 3", ""),
    ("run -m {gguf} --raw Hi --max-tokens 3", ""),  # is converted into the cache
    ("run -m {onnx} --backend onnx --raw Hi --max-tokens 3", ""),
    ("chat --session kept.json --max-tokens 3", "Hello\n/save also.json\n"),
    ("transcribe {wav} --json", ""),
    ("batch {recordings} kept.jsonl --also srt", ""),
    ("search kept.jsonl timer", ""),
    ("listen --list-devices", ""),
    ("listen", ""),
    ("wer {recordings}", ""),
    ("export {source} exported --recipe q4", ""),
    ("export {model} exported-onnx --onnx", ""),
    ("synth tiny made --audio", ""),
    ("bench --prompt 8 --generate 4 --repeat 1", ""),
    ("perplexity -m {model} {text} --context 16", ""),
    ("score -m {model} --reference {float} {text} --context 16 --windows 1", ""),
    ("info", ""),
    ("verify -m {model}", ""),
    ("models", ""),
]


def test_pull_speaks_to_its_hub_alone(tmp_path: Path, material: dict[str, Path]) -> None:
    home = Home(tmp_path / "home")
    with hub_stand_in.running({"owner/tiny": material["source"]}) as hub:
        run = home.run("-m", "edge_gemma", "pull", "owner/tiny", HF_ENDPOINT=hub.endpoint)
        assert run.status == 0, run.output
        assert run.record.went_out == []
        assert run.record.loopback != []
        ports = {str(hub.server_address[1]), str(hub.storage.server_address[1])}
        assert all(any(port in str(seen) for port in ports) for seen in run.record.loopback)
        assert run.record.written_outside(home.path / CACHE, home.path / PULLED) == []
        assert all(Path(name).is_relative_to(PULLED) for name in run.left)


def test_every_command_is_here() -> None:
    assert {command.split()[0] for command, _ in COMMANDS} == set(cli.commands) - GOES_OUT - SERVES


ASKED = """
import json, sys, urllib.request
from tests.server.serving import serving

with serving() as served:
    print(served.port)
    said = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}).encode()
    for path, body in {"/": None, "/page/page.js": None, "/v1/models": None, "/metrics": None,
                       "/v1/chat/completions": said, "/api/chat": said, "/api/pull": said}.items():
        with urllib.request.urlopen(urllib.request.Request(served.url + path, body)) as answer:
            answer.read()
"""


def test_a_server_opens_no_connection(home: Home) -> None:
    run = home.run("-c", ASKED)
    assert run.status == 0, run.output
    port = run.output.split()[0]
    assert run.record.went_out == []
    ours = {"bind 127.0.0.1 port 0", f"connect 127.0.0.1 port {port}"}  # to listen; of whoever asks
    assert set(run.record.loopback) == ours
    assert run.record.written_outside(home.path / CACHE, home.out, home.temporary) == []
    assert run.left == []


@pytest.mark.parametrize(("command", "stdin"), COMMANDS)
@pytest.mark.slow
def test_commands_keep_to_themselves(home: Home, material: dict[str, Path], command: str, stdin: str) -> None:
    run = home.run("-m", "edge_gemma", *(part.format(**material) for part in command.split()), stdin=stdin)
    listening = command.startswith("listen")
    assert run.status == 0 or listening, run.output
    if listening:  # what sound servers' libraries keep; without PortAudio, Python lets a C compiler look for it
        home.check(run, home.temporary, home.path / ".config/pulse", Path("/dev/shm"))
    else:
        home.check(run)
        assert run.record.local == []


@pytest.mark.slow
def test_the_first_start_keeps_to_itself(tmp_path: Path) -> None:
    """And so do the processes that compile."""
    home = Home(tmp_path / "home", compiled=tmp_path / "nothing")
    code = f"from pathlib import Path\nfrom edge_gemma.kernels import kept\nkept.SHIPPED = Path({str(tmp_path)!r})\n"
    run = home.run("-c", code + "from edge_gemma.cli.main import main\nmain()", "run", "Hi", "--max-tokens", "3")
    assert run.status == 0, run.output
    assert "compiling the kernels" in run.output
    assert len(list((home.path / CACHE / "kernels").rglob("*.code"))) > 20
    home.check(run)
    assert run.record.local == []


def test_sound_files_that_name_addresses_are_not_followed(home: Home) -> None:
    """FFmpeg's playlists, and descriptions of streams, under their own names and as another kind."""
    url = "http://sound.example/a.ts"
    texts = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile {url}\n",
        "sdp": "v=0\no=- 0 0 IN IP4 192.0.2.1\ns=x\nc=IN IP4 192.0.2.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
        f'mimeType="audio/mp4"><Representation id="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
    }
    for suffix, text in texts.items():
        for name in (f"list.{suffix}", f"{suffix}.wav"):
            (home.out / name).write_text(text)
    names = sorted(path.name for path in home.out.iterdir() if path.suffix[1:] in {*texts, "wav"})
    run = home.run("-m", "edge_gemma", "transcribe", url, *names)
    assert run.status == 1
    assert run.output.count("error: ") == 9
    home.check(run)


# -- the library -------------------------------------------------------------------------------------------------------

LIBRARY = """
import sys
import numpy as np
from edge_gemma import Engine
from edge_gemma.audio.files import AudioFile

wav, onnx, saved = sys.argv[1:]
with Engine.load() as engine:
    session = engine.session()
    session.prefill(engine.tokenizer.encode("Hello", bos=True))
    session.save(saved)
    assert engine.generate("Hello", max_tokens=3).text
    assert "timer" in engine.transcribe(wav).text
    with AudioFile(wav) as file:
        samples = np.concatenate(list(file))
    assert "timer" in engine.transcribe(samples).text
    blocks = [*np.array_split(samples, 20), np.zeros(32000, np.float32)]
    for ask in (False, True):
        assert any(event.kind == "segment" for event in engine.listen(blocks, ask=ask))
with Engine.load(onnx, backend="onnx") as engine:
    engine.session().prefill([2, 3, 4])
"""


@pytest.mark.slow
def test_the_library_keeps_to_itself(home: Home, material: dict[str, Path]) -> None:
    run = home.run("-c", LIBRARY, material["wav"], material["onnx"], "session.safetensors")
    assert run.status == 0, run.output
    home.check(run)
    assert run.record.local == []


def test_a_process_that_listens_keeps_to_itself(home: Home) -> None:
    """Three seconds of what benchmarks/listening.py does for an hour."""
    report = measure(3, None, home.path)
    nothing = ("exit", "lookups", "connections", "local_sockets", "written_outside", "foreign_files")
    assert not any(report[name] for name in nothing), report
    assert report["segments"] == 1
    assert report["rss_mb_most"] > 50
    assert report["open_files_settled"] > 2


def test_onnxruntime_is_quiet_after_edge_gemma_was_imported(home: Home) -> None:
    """A program that imports it itself, later."""
    run = home.run("-c", "import edge_gemma\nimport onnxruntime")
    assert (run.status, run.output) == (0, "")
    home.check(run)


def test_a_program_that_imported_onnxruntime_before_is_told(tmp_path: Path) -> None:
    run = Home(tmp_path / "home").run("-c", "import onnxruntime\nimport edge_gemma.host.ort")
    assert "onnxruntime was imported before edge_gemma" in run.output
    assert "ORT_DISABLE_TELEMETRY=1" in run.output


# -- that such things would be seen ------------------------------------------------------------------------------------


def test_telemetry_would_be_seen(tmp_path: Path) -> None:
    library = Path(onnxruntime.__file__).parent / "capi"
    if not any(b"ORT_DISABLE_TELEMETRY" in path.read_bytes() for path in library.glob("onnxruntime_pybind11_state*")):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no telemetry here")
    home = Home(tmp_path / "home")
    run = home.run("-c", "import onnxruntime")
    assert any(".onnxruntime/deviceid" in written for written in run.record.written_outside(home.path / CACHE))
    assert run.left != []
    with pytest.raises(AssertionError):
        home.check(run)


SENDING = {
    "urllib, a name": ("from urllib.request import urlopen\nurlopen('http://sound.example/')", "looks up"),
    "urllib, an address": ("from urllib.request import urlopen\nurlopen('http://192.0.2.1:80/')", "192.0.2.1 port 80"),
    "a name from a file": ("import socket\nsocket.getaddrinfo('localhost', 80)", "/etc/hosts is read"),
    "another program": (
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', "
        "'import socket; socket.create_connection((\"192.0.2.2\", 443))'], check=True)",
        "192.0.2.2 port 443",
    ),
    "a datagram": (
        "import socket\nsocket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('2001:db8::7', 9))",
        "2001:db8::7 port 9",
    ),
    "several buffers": (
        "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendmsg([b'x', b'y'], [], 0, ('192.0.2.3', 99))",
        "192.0.2.3 port 99",
    ),
    "a query of one's own": (
        "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\n"
        "s.sendto(b'\\0\\1' + b'\\0' * 10 + b'\\3own\\7example\\0\\0\\1\\0\\1', ('127.0.0.53', 53))",
        "own.example",
    ),
    "mapped to IPv6": ("import socket\nsocket.socket(socket.AF_INET6).connect(('::ffff:192.0.2.4', 5))", "192.0.2.4"),
    "open to others": ("import socket\nsocket.socket().bind(('0.0.0.0', 0))", "bind 0.0.0.0"),
    "another family": ("import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "family 17"),
}


@pytest.mark.parametrize("case", SENDING)
def test_what_is_sent_would_be_seen(home: Home, case: str) -> None:
    code, seen = SENDING[case]
    run = home.run("-c", code)
    assert any(seen in line for line in run.record.went_out), run
    assert run.status != 0 or case == "a name from a file"  # and was refused
    with pytest.raises(AssertionError):
        home.check(run)


WRITING = {
    "open(sys.argv[1] + '/seen', 'a')": ["openat"],
    "os.mkdir('seen', dir_fd=os.open(sys.argv[1], os.O_RDONLY))": ["mkdirat"],
    "os.chdir(sys.argv[1]); os.symlink('x', '../x/seen')": ["symlink"],
    "open('y', 'w'); os.rename('y', sys.argv[1] + '/seen')": ["rename"],
    "open('y', 'w'); os.link('y', sys.argv[1] + '/seen')": ["link", "linkat"],
    "open(p := sys.argv[1] + '/seen', 'w'); os.remove(p)": ["openat", "unlink"],
}


@pytest.mark.parametrize("code", WRITING)
def test_what_is_written_would_be_seen(home: Home, tmp_path: Path, code: str) -> None:
    (tmp_path / "x").mkdir()
    run = home.run("-c", f"import os, sys\n{code}", tmp_path / "x")
    assert run.status == 0, run.output
    calls = [call.split() for call in run.record.written_outside(home.out)]
    assert {path for _, path in calls} == {str(tmp_path / "x" / "seen")}
    assert {call.removesuffix("at") for call, _ in calls} == {call.removesuffix("at") for call in WRITING[code]}
    assert run.record.went_out == []


def test_io_uring_is_refused(home: Home) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(425, 1, ctypes.create_string_buffer(120)), ctypes.get_errno())
"""
    assert home.run("-c", code).output.split() == ["-1", str(errno.ENOSYS)]


def test_where_sockets_of_others_cannot_be_looked_at(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many containers: look-ups are still seen, and refused."""

    def refused(process: int, number: int) -> int:
        raise PermissionError

    monkeypatch.setattr(watched, "_descriptor", refused)
    run = home.run("-c", SENDING["urllib, a name"][0])
    assert any("by the name server" in line for line in run.record.went_out)
    assert run.status != 0


def test_where_it_cannot_be_watched_it_says_so(home: Home) -> None:
    """Within a watched program: the kernel allows one listener."""
    run = home.run("-c", "from tests.watched import why_not\nprint(why_not())")
    assert "cannot be watched here" in run.output
    assert "no seccomp filter can be installed" in run.output


def test_loopback_is_reached(home: Home) -> None:
    """So that a test of a server, or of `pull` with a stand-in, may be watched."""
    code = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
    client.sendall(b"x")
    print(server.accept()[0].recv(1))
"""
    run = home.run("-c", code)
    assert run.output == "b'x'\n"
    assert run.record.went_out == []
    assert len(run.record.loopback) == 2


def test_sending_where_nothing_is_connected_fails_as_ever(home: Home) -> None:
    """To a pipe, as sound libraries try, to a closed descriptor, to a socket without a peer, from a wrong address."""
    code = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.c_char_p(b"x")
for descriptor in (os.pipe()[1], 999, socket.socket(type=socket.SOCK_DGRAM).detach()):
    libc.send(descriptor, buffer, 1, 0)
    print(errno.errorcode[ctypes.get_errno()])
libc.sendmsg(socket.socket().detach(), ctypes.c_void_p(8), 0)
print(errno.errorcode[ctypes.get_errno()])
"""
    run = home.run("-c", code)
    assert run.output.split() == ["ENOTSOCK", "EBADF", "EDESTADDRREQ", "EFAULT"]
    assert run.record.went_out == []


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_document_names_the_folders_and_the_command() -> None:
    from edge_gemma.folder import find

    text = PRIVACY.read_text()
    cache = kernels.cache_directory().parent
    assert cache.name == "kernels"
    assert cache.parent == find.cache_folder().parent
    for folder in (cache, find.cache_folder()):
        assert f"`~/{CACHE}/{folder.name}`" in text
    for command in GOES_OUT:
        assert f"`edge-gemma {command}" in text
