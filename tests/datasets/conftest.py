"""ClearPose's fixture on disk, for the tests of its reader and of its cameras; and caches that are nobody's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the cache of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.datasets.clearpose_files import write_root  # with scipy, which few tests need

    return write_root(tmp_path_factory.mktemp("clearpose"))


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil, without caches."""
    copy = tmp_path / "clearpose"
    shutil.copytree(written, copy, ignore=shutil.ignore_patterns("*.npz"))
    return copy
