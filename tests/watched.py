"""What a program asks of the network and writes to files: every system call, by whatever library it is made.

Owns: starting a program under watch (a seccomp filter that it and all its children inherit and cannot leave), what each
call means, and refusing what would go out: nothing but loopback can be reached. Does not know: which files are allowed.

Needs Linux 5.6 on x86-64 or AArch64, and no privilege, compiler or package. The kernel stops a call of `_CALLS` and
hands it over (seccomp_unotify(2)); all others run at full speed. io_uring, which goes past such filters, is refused.
"""

import ctypes
import errno
import fcntl
import functools
import ipaddress
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# name: (number on x86-64, on AArch64 (-1: none), places of its arguments: a folder's descriptor and a path below it)
_HERE = -1  # in place of a folder's descriptor: the working folder
_CALLS = {
    "open": (2, -1, [(_HERE, 0)]), "creat": (85, -1, [(_HERE, 0)]), "openat": (257, 56, [(0, 1)]),
    "openat2": (437, 437, [(0, 1)]), "truncate": (76, 45, [(_HERE, 0)]), "mkdir": (83, -1, [(_HERE, 0)]),
    "mkdirat": (258, 34, [(0, 1)]), "mknod": (133, -1, [(_HERE, 0)]), "mknodat": (259, 33, [(0, 1)]),
    "rename": (82, -1, [(_HERE, 0), (_HERE, 1)]), "renameat": (264, 38, [(0, 1), (2, 3)]),
    "renameat2": (316, 276, [(0, 1), (2, 3)]), "link": (86, -1, [(_HERE, 1)]), "linkat": (265, 37, [(2, 3)]),
    "symlink": (88, -1, [(_HERE, 1)]), "symlinkat": (266, 36, [(1, 2)]), "unlink": (87, -1, [(_HERE, 0)]),
    "unlinkat": (263, 35, [(0, 1)]), "rmdir": (84, -1, [(_HERE, 0)]), "socket": (41, 198, []), "connect": (42, 203, []),
    "bind": (49, 200, []), "sendto": (44, 206, []), "sendmsg": (46, 211, []), "sendmmsg": (307, 269, []),
    "io_uring_setup": (425, 425, []),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # which number, AUDIT_ARCH_*
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_RESOLVER_FILES = {"/etc/resolv.conf", "/etc/hosts"}  # read only to look a name up
_FAMILIES = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16}  # 16: AF_NETLINK, the kernel itself
_DNS = 53

# linux/seccomp.h, linux/filter.h, linux/prctl.h
_SET_MODE_FILTER, _NEW_LISTENER, _SPEC_ALLOW, _NO_NEW_PRIVS = 1, 8, 4, 38
_RET_ALLOW, _RET_ERRNO, _RET_NOTIFY = 0x7FFF0000, 0x00050000, 0x7FC00000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_SECCOMP, _PIDFD_GETFD = {"x86_64": 317, "aarch64": 277}, 438  # numbers of system calls
_NOTIFICATION, _RESPONSE = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


@dataclass
class Record:
    """What was asked for, in order; nothing of `lookups` and `connections` went out."""

    lookups: list[str] = field(default_factory=list)  # names, servers asked, resolver's files read
    connections: list[str] = field(default_factory=list)  # outside loopback: "connect 203.0.113.7:443"
    loopback: list[str] = field(default_factory=list)
    local: list[str] = field(default_factory=list)  # paths of AF_UNIX sockets
    written: list[tuple[str, str]] = field(default_factory=list)  # call and path, whether or not it succeeded

    @property
    def went_out(self) -> list[str]:
        return [f"looks up {name}" for name in self.lookups] + self.connections

    def written_outside(self, *folders: Path) -> list[str]:
        """What was written that neither lies below `folders` nor made the way there. Devices are not files, and the
        names of semaphores, which are taken away at once, are none either.
        """
        return sorted({f"{call} {path}" for call, path in self.written if _is_foreign(call, Path(path), folders)})


def _is_foreign(call: str, path: Path, folders: Sequence[Path]) -> bool:
    if any(path.is_relative_to(folder) for folder in folders):
        return False
    if call in ("mkdir", "mkdirat") and any(folder.is_relative_to(path) for folder in folders):
        return False
    if path.is_relative_to("/dev/shm"):
        return not path.name.startswith("sem.")
    return not path.is_relative_to("/dev")


class Watched:
    """A program under watch. `process` is its Popen, `record` grows while it runs. Raises OSError if it cannot be."""

    def __init__(self, command: Sequence[Any], **options: Any) -> None:
        self.record = Record()
        self._failure: BaseException | None = None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            starter = [sys.executable, "-I", "-S", __file__, str(theirs.fileno()), *map(str, command)]
            self.process = subprocess.Popen(starter, pass_fds=[theirs.fileno()], **options)
            theirs.close()
            told, descriptors, *_ = socket.recv_fds(ours, 4, 1)
            if not descriptors:
                ours.close()
                self.process.wait()
                raise OSError(int.from_bytes(told, sys.byteorder), "no seccomp filter can be installed")
            self._listener = descriptors[0]
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
            ours.sendall(b"go")

    def wait(self, timeout: float | None = None) -> int:
        """The program's exit status, after all that it started has ended too (10 s at most). Raises what went wrong."""
        status = self.process.wait(timeout)
        self._thread.join(10)
        if self._failure is not None:
            raise self._failure
        return status

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while True:
                ready = poll.poll(500)
                if any(event & (select.POLLHUP | select.POLLERR) and not event & select.POLLIN for _, event in ready):
                    break
                if ready:
                    self._one()
                elif self.process.returncode is not None:
                    break
        except BaseException as error:
            self._failure = error
            self.process.kill()
        finally:
            os.close(self._listener)

    def _one(self) -> None:
        """Take one call, record it and let it go on, or refuse it."""
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # a signal came between
                return
            raise
        identity, task, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        try:
            refusal = self._judge(_names()[number], _Task(task), arguments)
        except (FileNotFoundError, ProcessLookupError):  # killed meanwhile
            refusal = 0
        answer = _RESPONSE.pack(identity, 0, -refusal, 0 if refusal else _CONTINUE)
        try:
            fcntl.ioctl(self._listener, _SEND, answer)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def _judge(self, call: str, task: "_Task", arguments: list[int]) -> int:
        """Record a call. Returns 0 to let it go on, or the errno that it shall fail with."""
        if places := _CALLS[call][2]:
            self._file(call, task, places, arguments)
            return 0
        if call == "io_uring_setup":
            return errno.ENOSYS
        if call == "socket":
            if arguments[0] not in _FAMILIES:
                self.record.connections.append(f"socket of family {arguments[0]}")
                return errno.EAFNOSUPPORT
            return 0
        if call in ("connect", "bind"):
            return self._address(call, task, arguments[0], task.memory(arguments[1], arguments[2]))
        if call == "sendto":
            messages = [(arguments[4], arguments[5], [(arguments[1], arguments[2])])]
        else:
            messages = task.messages(arguments[1], 1 if call == "sendmsg" else arguments[2], call == "sendmmsg")
        for name, size, pieces in messages:
            address = task.memory(name, size) if name else task.peer(arguments[0])
            if _port(address) == _DNS:
                self.record.lookups.append(_question(b"".join(task.memory(*piece) for piece in pieces)))
                return errno.ENETUNREACH
            if name and (refusal := self._address(call, task, arguments[0], address)):
                return refusal
        return 0

    def _address(self, call: str, task: "_Task", descriptor: int, address: bytes) -> int:
        """Judge an address that is bound to, or sent to."""
        family = int.from_bytes(address[:2], sys.byteorder)
        if family == socket.AF_UNIX:
            path = address[2:]
            if call != "bind" and path:
                self.record.local.append((path[1:] if path[0] == 0 else path.split(b"\0")[0]).decode(errors="replace"))
            return 0
        if (host := _host(address)) is None:  # AF_UNSPEC takes a connection back; AF_NETLINK
            return 0
        text = f"{call} {host} port {_port(address)}"
        if call == "connect" and _port(address) == _DNS:
            self.record.lookups.append(f"by the name server {host}")
            # Connecting a datagram socket sends nothing, and the name comes with the first datagram; where containers
            # do not let us look at sockets of others (pidfd_getfd), names stay unknown.
            return 0 if task.is_datagram(descriptor) else errno.ENETUNREACH
        if host.is_loopback:
            self.record.loopback.append(text)
            return 0
        self.record.connections.append(text)
        return errno.ENETUNREACH

    def _file(self, call: str, task: "_Task", places: list[tuple[int, int]], arguments: list[int]) -> None:
        paths = [task.path(None if folder == _HERE else arguments[folder], arguments[at]) for folder, at in places]
        flags = {"open": 1, "openat": 2}.get(call)
        if call == "openat2":
            opening = int.from_bytes(task.memory(arguments[2], 8), sys.byteorder)
        else:
            opening = _WRITING if flags is None else arguments[flags]
        if opening & _WRITING:
            self.record.written += [(call, path) for path in paths]
        elif paths[0] in _RESOLVER_FILES:
            self.record.lookups.append(f"something: {paths[0]} is read")


class _Task:
    """A thread that waits in a system call."""

    def __init__(self, number: int) -> None:
        self._number = number

    def memory(self, start: int, size: int) -> bytes:
        """Up to `size` bytes of its memory: fewer where its mapping ends."""
        with open(f"/proc/{self._number}/mem", "rb", buffering=0) as file:
            try:
                return os.pread(file.fileno(), min(size, 1 << 16), start)
            except (OSError, OverflowError):  # no such address: the call itself will fail
                return b""

    def path(self, folder: int | None, start: int) -> str:
        """An absolute path, `..` taken out; links in it are kept."""
        name = os.fsdecode(self.memory(start, 4096).split(b"\0")[0])
        if not name.startswith("/"):
            at_cwd = folder is None or folder & 0xFFFFFFFF == 0xFFFFFF9C  # AT_FDCWD
            base = os.readlink(f"/proc/{self._number}/{'cwd' if at_cwd else f'fd/{folder & 0xFFFFFFFF}'}")
            name = f"{base}/{name}"
        return os.path.normpath(name)

    def messages(self, start: int, count: int, several: bool) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Of each msghdr: address and size of the name, and its pieces."""
        found = []
        for i in range(min(count, 1024)):
            header = self.memory(start + i * (64 if several else 56), 56)
            if len(header) < 56:
                break
            name, size, vectors, pieces = struct.unpack_from("=QI4xQQ", header)
            iovec = self.memory(vectors, 16 * min(pieces, 64))
            found.append((name, size, list(struct.iter_unpack("=QQ", iovec[: len(iovec) // 16 * 16]))))
        return found

    def peer(self, descriptor: int) -> bytes:
        """What a socket is connected to, as a sockaddr; nothing but for the internet's."""
        with suppress(OSError), self._socket(descriptor) as copy:  # not connected, no socket, not allowed
            if copy.family in (socket.AF_INET, socket.AF_INET6):
                host, port, *_ = copy.getpeername()
                return _pack(copy.family, host, port)
        return b""

    def is_datagram(self, descriptor: int) -> bool:
        with suppress(OSError), self._socket(descriptor) as copy:
            return copy.type == socket.SOCK_DGRAM
        return False

    def _socket(self, descriptor: int) -> socket.socket:
        status = Path(f"/proc/{self._number}/status").read_text()
        process = int(status.split("Tgid:")[1].split()[0])
        copy = _descriptor(process, descriptor & 0xFFFFFFFF)
        try:
            return socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            raise


def _pack(family: int, host: str, port: int) -> bytes:
    packed = ipaddress.ip_address(host.split("%")[0]).packed
    return struct.pack("=H", family) + struct.pack(">H", port) + (b"" if len(packed) == 4 else b"\0" * 4) + packed


def _host(address: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    family = int.from_bytes(address[:2], sys.byteorder)
    if family == socket.AF_INET and len(address) >= 8:
        return ipaddress.IPv4Address(address[4:8])
    if family == socket.AF_INET6 and len(address) >= 24:
        host = ipaddress.IPv6Address(address[8:24])
        return host.ipv4_mapped or host
    return None


def _port(address: bytes) -> int | None:
    return None if _host(address) is None else int.from_bytes(address[2:4], "big")


def _question(query: bytes) -> str:
    """The name a DNS query asks for (RFC 1035, 4.1)."""
    labels, at = [], 12
    while at < len(query) and query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace"))
        at += 1 + query[at]
    return ".".join(labels) or "a name"


@functools.cache
def _names() -> dict[int, str]:
    column = _ARCHITECTURES[platform.machine()][0]
    return {call[column]: name for name, call in _CALLS.items() if call[column] >= 0}


def _descriptor(process: int, number: int) -> int:
    """A copy of another process's descriptor."""
    pidfd = os.pidfd_open(process)
    try:
        return _system_call(_PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)


def _system_call(number: int, *arguments: Any) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@functools.cache
def why_not() -> str | None:
    """Why programs cannot be watched on this machine, None if they can."""
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES:
        return f"system calls of {sys.platform} on {platform.machine()} cannot be watched"
    try:
        watched = Watched([sys.executable, "-I", "-S", "-c", "open('/dev/null', 'w')"])
        watched.wait(60)
    except OSError as error:
        return f"system calls cannot be watched here: {error}"
    return None if ("openat", "/dev/null") in watched.record.written else "system calls cannot be watched here"


# -- in the child ------------------------------------------------------------------------------------------------------


def _filter() -> bytes:
    """The BPF program: hand over `_CALLS`, let all others through."""
    architecture = _ARCHITECTURES[platform.machine()][1]
    missing = _RET_ERRNO | errno.ENOSYS
    steps = [
        (_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, missing),  # calls of another architecture
        (_LOAD, 0, 0, 0), (_JUMP_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, missing),  # x32
    ]  # fmt: skip
    for number in _names():
        steps += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _RET_NOTIFY)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (_RETURN, 0, 0, _RET_ALLOW)])


def _start() -> None:
    """python watched.py SOCKET PROGRAM ARGUMENT...: put the filter on, say where its listener is, become PROGRAM."""
    channel, command = socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]
    steps = _filter()

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    installed = threading.Event()
    listener = failure = -1

    def tell() -> None:
        """In a thread of its own, which has no filter: this very call would be handed over, to nobody yet."""
        installed.wait()
        if listener < 0:
            channel.sendall(struct.pack("=i", failure))
        else:
            socket.send_fds(channel, [b"fd"], [listener])

    threading.Thread(target=tell, daemon=True).start()
    program = Program(len(steps) // 8, steps)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    flags = ctypes.c_ulong(_NEW_LISTENER | _SPEC_ALLOW)
    number = ctypes.c_long(_SECCOMP[platform.machine()])
    listener = libc.syscall(number, ctypes.c_ulong(_SET_MODE_FILTER), flags, ctypes.byref(program))
    failure = ctypes.get_errno()
    installed.set()
    if os.read(channel.fileno(), 2) != b"go":
        os._exit(1)
    os.close(channel.fileno())
    os.execvp(command[0], command)


if __name__ == "__main__":
    _start()
