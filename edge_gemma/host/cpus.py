"""Finds out how many CPUs this process may keep busy.

Owns: the process's affinity and the CPU quota of its control groups (containers, `systemd-run -p CPUQuota=`, Kubernetes
limits). Does not know: threads, kernels.

A quota is a share of time, not a set of CPUs. The process sees all CPUs. When it has used its share, it is stopped for
the rest of the period, and threads that wait for each other are stopped together.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path


def available() -> int:
    """The number of CPUs that this process can keep busy all the time, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota()
    return affinity if limit is None else max(1, min(affinity, math.floor(limit)))


def quota(root: Path = Path("/")) -> float | None:
    """The number of CPUs that the tightest control group of this process allows; None if there is no known limit.

    root: where the file system begins. Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst (cpu.max) and
    scheduler/sched-bwc.rst (cpu.cfs_quota_us), proc_pid_mountinfo(5).
    """
    limits: list[float] = []
    with contextlib.suppress(OSError, ValueError):
        groups = _groups((root / "proc/self/cgroup").read_text())
        for kind, inside, mounted in _mounts((root / "proc/self/mountinfo").read_text()):
            limits += _limits(root / mounted.lstrip("/"), _below(groups.get(kind, "/"), inside))
    return min(limits, default=None)


def _groups(text: str) -> dict[str, str]:
    """The process's control groups that limit CPU time: "cgroup2" or "cgroup" (version 1) -> path in the hierarchy."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            found["cgroup"] = path
    return found


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Where the hierarchies are mounted: (kind, the group at the mount's root, the mount point)."""
    for line in text.splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            inside, mounted = (_unescaped(field) for field in mount.split(" ")[3:5])
            yield kind, inside, mounted


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _below(path: str, inside: str) -> list[str]:
    """The names of a group's path below the mounted group; empty if it lies elsewhere."""
    own, mounted = (value.strip("/").split("/") if value.strip("/") else [] for value in (path, inside))
    return own[len(mounted) :] if own[: len(mounted)] == mounted and ".." not in own else []


def _limits(mounted: Path, names: list[str]) -> Iterator[float]:
    """The quotas of a group and its parents, in CPUs, if they have any."""
    for depth in range(len(names) + 1):
        folder = mounted.joinpath(*names[:depth])
        for read in (_version2, _version1):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if (limit := read(folder)) > 0:
                    yield limit


def _version2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()  # "max 100000": no limit, and no number
    return int(quota) / int(period)


def _version1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text())  # -1: no limit
    return quota / int((folder / "cpu.cfs_period_us").read_text())
