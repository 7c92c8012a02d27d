"""How many CPUs a process may keep busy: control groups as container runtimes lay them out, made of files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.host import cpus
from edge_gemma.kernels import thread_count

V2 = "30 23 0:26 {inside} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {inside} {at} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
OTHERS = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n33 31 0:30 / /sys/fs/cgroup/m rw - cgroup cgroup rw,memory\n"


def system(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": OTHERS + mounts, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_version_2_takes_the_tightest_of_the_groups_around(tmp_path: Path) -> None:
    mounts = V2.format(inside="/", at="/sys/fs/cgroup")
    at = "sys/fs/cgroup"
    files = {
        f"{at}/a.slice/cpu.max": "300000 100000\n",
        f"{at}/a.slice/b.service/cpu.max": "max 100000\n",
        f"{at}/a.slice/b.service/inner/cpu.max": "250000 50000\n",
        f"{at}/other/cpu.max": "1000 100000\n",
    }
    assert cpus.quota(system(tmp_path, mounts, "0::/a.slice/b.service/inner\n", files)) == 3.0


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    mounts = V2.format(inside="/", at="/sys/fs/cgroup")
    assert cpus.quota(system(tmp_path, mounts, "0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"})) == 0.5


@pytest.mark.parametrize("own", ["/docker/f00", "/docker/f00/init", "/../elsewhere", "/"])
def test_version_1_in_a_container_without_a_namespace_of_its_own(tmp_path: Path, own: str) -> None:
    mounts = V1.format(inside="/docker/f00", at="/sys/fs/cgroup/cpu\\040time")
    files = {
        "sys/fs/cgroup/cpu time/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu time/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu time/init/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu time/init/cpu.cfs_period_us": "100000\n",
    }
    groups = f"12:memory:/m\n4:cpu,cpuacct:{own}\n1:name=systemd:/s\n0::/u\n"
    assert cpus.quota(system(tmp_path, mounts, groups, files)) == 1.5


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"sys/fs/cgroup/cpu.max": "max 100000\n"},
        {"sys/fs/cgroup/cpu.max": ""},
        {"sys/fs/cgroup/cpu.max": "100000 0\n"},
        {"sys/fs/cgroup/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu.cfs_period_us": "100000\n"},
        {"sys/fs/cgroup/cpu.cfs_quota_us": "100000\n"},
    ],
)
def test_no_limit_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert cpus.quota(system(tmp_path, V2.format(inside="/", at="/sys/fs/cgroup"), "0::/\n", files)) is None


def test_a_system_without_proc_has_no_quota(tmp_path: Path) -> None:
    assert cpus.quota(tmp_path) is None


@given(mounts=st.text(), groups=st.text(), limit=st.text())
def test_whatever_these_files_hold_is_no_error(tmp_path_factory, mounts: str, groups: str, limit: str) -> None:
    root = system(tmp_path_factory.mktemp("system"), mounts, groups, {"sys/fs/cgroup/cpu.max": limit})
    assert cpus.quota(root) is None
    (root / "proc/self/mountinfo").write_text(V2.format(inside="/", at="/sys/fs/cgroup"))
    found = cpus.quota(root)
    assert found is None or found > 0


@pytest.mark.parametrize(("limit", "expected"), [(None, 8), (0.5, 1), (1.0, 1), (1.9, 1), (6.5, 6), (64.0, 8)])
def test_a_quota_counts_in_whole_cpus_within_the_affinity(monkeypatch, limit: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "quota", lambda: limit)
    assert cpus.available() == expected


def test_the_kernels_default_is_what_is_available(monkeypatch) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 1)
    thread_count._default_threads.cache_clear()
    try:
        assert thread_count.threads() == 1
        with thread_count.use_threads(2):
            assert thread_count.threads() == 2
    finally:
        thread_count._default_threads.cache_clear()
