"""A small mined basis, in memory and on disk, shared by the storage tests."""

import pytest

from .helpers import make_basis


@pytest.fixture(scope="module")
def basis(tmp_path_factory):
    return make_basis(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def saved(basis, tmp_path):
    basis.save_pretrained(tmp_path / "basis")
    return tmp_path / "basis"
