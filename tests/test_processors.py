"""The number of processors that a process may use, from made-up control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitbundle import processors


def groups(tmp_path: Path, own: str, **files: str) -> dict[str, Path]:
    """Write control groups. A name is the path of a file, with ``__`` for ``/``."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "groups" / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"groups": tmp_path / "groups", "own": tmp_path / "own"}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu_max": "max 100000\n"}, None),
        ("0::/\n", {"cpu_max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu_max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a__cpu_max": "150000 100000", "a__b__cpu_max": "400000 100000"}, 1.5),
        ("0::/a/b\n", {"other__cpu_max": "1000 100000"}, None),
        ("4:cpu,cpuacct:/a\n", {"cpu__cpu_cfs_quota_us": "300000", "cpu__cpu_cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/a\n", {"cpu__a__cpu_cfs_quota_us": "-1", "cpu__a__cpu_cfs_period_us": "100000"}, None),
        ("nonsense", {"cpu_max": "x y"}, None),
        ("0::/\n", {"cpu_max": "100 0"}, None),
        ("", {}, None),
    ],
)
def test_the_quota(tmp_path: Path, own: str, files: dict[str, str], expected: float | None) -> None:
    assert processors.cpu_quota(**groups(tmp_path, own, **files)) == expected


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (0.3, 1), (1.0, 1), (2.5, 3), (64.0, 8)])
def test_the_quota_and_the_affinity(monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int) -> None:
    monkeypatch.setattr(processors, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert processors.usable() == usable
