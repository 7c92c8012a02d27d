"""The server as a service of systemd's user manager: it starts with the machine or the login, and starts again.

Owns: the unit's text, systemd's quoting, where the unit and the key's file are, what is asked of systemctl. Does not
know: the server's options, how it works. Imports nothing of the rest of the server.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_gemma.arguments import shown
from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import write_file

NAME = "edge-gemma.service"
MARK = "# Written by `edge-gemma service install`, which replaces it."
_ASKED = "# health: "  # before the address that `status` asks
_CONFIG = "XDG_CONFIG_HOME"
_PATIENCE_S = 60.0  # for systemctl

_TEXT = """\
{mark}
{asked}{health}
[Unit]
Description=edge-gemma: Gemma for other programs

[Service]
Type=exec
ExecStart={command}
WorkingDirectory={folder}
{environment}\
Restart=on-failure
RestartSec=5
# 2: the options are wrong, and will be
RestartPreventExitStatus=2
TimeoutStopSec=20
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
{writable}\
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
# MemoryDenyWriteExecute has to stay off: the kernels are compiled to machine code

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True)
class Unit:
    """What the service runs. folder: where it runs. writable: the folders that it may write to.

    environment: variables beside those of the user manager. health: the URL that says whether it answers. key: of the
    server; it is kept in a file of its own, which only the user may read.
    """

    command: Sequence[str]
    folder: Path
    health: str
    writable: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None

    def text(self, key_file: Path) -> str:
        """The unit. Raises UsageError for what systemd cannot be told."""
        program = self.command[0]
        if set(program) & set("\"'\\"):
            raise UsageError(f"systemd runs no program with a quote or a backslash in its path: {shown(program)}")
        environment = [f"Environment={quoted(f'{name}={value}')}\n" for name, value in self.environment.items()]
        if self.key is not None:
            environment.append(f"EnvironmentFile={_whole_line(key_file)}\n")
        return _TEXT.format(
            mark=MARK, asked=_ASKED, health=self.health, folder=_whole_line(self.folder),
            command=" ".join([quoted(f":{program}"), *map(quoted, self.command[1:])]),  # ":": $ is not special
            environment="".join(environment),
            writable="".join(f"ReadWritePaths={quoted(str(path))}\n" for path in self.writable),
        )  # fmt: skip


def quoted(text: str) -> str:
    """A word of a list in a unit, as it is. Raises UsageError for control characters, and what is no UTF-8."""
    escaped = _told(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def variable(name: str, value: str) -> str:
    """The line of an EnvironmentFile. Raises as `quoted`."""
    escaped = re.sub(r'(["\\`$])', r"\\\1", _told(value))
    return f'{name}="{escaped}"\n'


def _whole_line(path: Path) -> str:
    """A path that is a whole value, where quotes are not special. Raises as `quoted`."""
    text = _told(str(path))
    if text != text.strip() or text.endswith("\\"):
        raise UsageError(f"systemd cannot be told a path that ends in a space or a backslash: {shown(text)}")
    return text.replace("%", "%%")


def _told(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"systemd cannot be told what is not UTF-8: {shown(text)}") from None
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise UsageError(f"systemd cannot be told a line break or another control character: {shown(text)}")
    return text


@dataclass(frozen=True)
class Service:
    """The user's service. key_variable: the variable in the key's file."""

    key_variable: str

    @property
    def path(self) -> Path:
        """Where the unit is."""
        return _config() / "systemd" / "user" / NAME

    @property
    def key_file(self) -> Path:
        """Where the key is."""
        return _config() / "edge-gemma" / "service.env"

    def install(self, unit: Unit) -> None:
        """Write the unit, and start it now and with each start of the user manager.

        Raises UsageError without a user manager, for a unit of this name that somebody else wrote, and if it does not
        start.
        """
        text = unit.text(self.key_file)
        key = None if unit.key is None else variable(self.key_variable, unit.key)
        self._check_own()
        systemctl("show", "--property=Version")  # is there a manager to talk to?
        for folder in (self.path.parent, self.key_file.parent, *unit.writable):
            folder.mkdir(parents=True, exist_ok=True)
        if key is not None:
            write_file(self.key_file, key.encode(), permissions=0o600)
        write_file(self.path, text.encode())
        if key is None:
            self.key_file.unlink(missing_ok=True)
        systemctl("daemon-reload")
        systemctl("enable", NAME)
        systemctl("restart", NAME)

    def remove(self) -> None:
        """Stop the service and remove what `install` wrote. Raises UsageError, also if there is none."""
        if not self.path.is_file():
            raise UsageError(f"there is no service to remove: {self.path} is not there")
        self._check_own()
        systemctl("disable", "--now", NAME)
        self.path.unlink()
        self.key_file.unlink(missing_ok=True)
        systemctl("daemon-reload")

    def health(self) -> str:
        """The URL that says whether it answers. Raises UsageError if it is not installed."""
        if not self.path.is_file():
            raise UsageError("the service is not installed: edge-gemma service install")
        self._check_own()
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return next((line.removeprefix(_ASKED) for line in lines if line.startswith(_ASKED)), "")

    def state(self, question: str) -> str:
        """What systemctl says to "is-active" or "is-enabled"."""
        return _asked(question, NAME).stdout.strip() or "unknown"

    def _check_own(self) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.read_bytes().startswith(MARK.encode())):
            raise UsageError(f"{self.path} was written by somebody else: move it away first")


def lingers() -> bool:
    """Whether this user's services run without a login."""
    import pwd  # not where there is no systemd

    try:
        return Path("/var/lib/systemd/linger", pwd.getpwuid(os.getuid()).pw_name).exists()
    except (KeyError, OSError):
        return False


def systemctl(*arguments: str) -> None:
    """Ask the user manager for something. Raises UsageError if it does not do it."""
    done = _asked(*arguments)
    if done.returncode:
        told = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
        raise UsageError(f"systemctl --user {' '.join(arguments)} failed: {told}{_advice(told)}")


def _advice(told: str) -> str:
    if "bus" in told.lower():
        return "; log in as this user (not with su or sudo), or set XDG_RUNTIME_DIR=/run/user/$(id -u)"
    return f"; journalctl --user -u {NAME} says more"


def _asked(*arguments: str) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("systemctl")
    if program is None:
        raise UsageError("there is no systemd here (no systemctl): start edge-gemma serve in this system's own way")
    try:
        return subprocess.run(
            [program, "--user", *arguments], capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"systemctl --user {' '.join(arguments)} did not answer: {error}") from None


def _config() -> Path:
    """The user's folder of settings. Raises UsageError if there is none."""
    given = os.environ.get(_CONFIG, "")
    path = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.config"))
    if not path.is_absolute():
        raise UsageError(f"there is no home folder for the unit: set {_CONFIG} to a folder")
    return path
