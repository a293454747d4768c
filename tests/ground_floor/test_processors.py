"""Processors that a process may use: affinity and control groups."""

from __future__ import annotations

import os

import pytest

from cxrgaze import processors


def _root(tmp_path, groups, files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2.0),
        ("0::/gone\n", {"cpu.max": "200000 100000"}, 2.0),
        (
            "3:cpu,cpuacct:/d\n1:name=systemd:/d\n",
            {"cpu/d/cpu.cfs_quota_us": "250000", "cpu/d/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "0"}, None),
        ("nonsense", {"cpu.max": "nonsense"}, None),
    ],
)
def test_the_quota_is_the_smallest_of_all_groups(tmp_path, monkeypatch, groups, files, quota):
    root = _root(tmp_path, groups, files)
    assert processors.cpu_quota(root) == quota
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert processors.cpu_count(root) == (max(int(quota), 1) if quota else 8)
    assert processors.is_confined(root) == (quota is not None)


def test_affinity_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert processors.cpu_count(tmp_path) == 2 and processors.is_confined(tmp_path)
