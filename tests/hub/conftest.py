"""The Hub of a test and clients of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_attrsub import build_basis
from tests.basis.helpers import random_factors, save_many

from . import jobs
from .server import USER, Hub
from .worker import Client, Worker


@pytest.fixture(scope="session")
def _server() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture(scope="session")
def _worker(_server: Hub) -> Iterator[Worker]:
    worker = Worker(_server.address)
    yield worker
    worker.close()


@pytest.fixture
def hub(_server: Hub) -> Iterator[Hub]:
    """An empty Hub whose user "user" holds the token hub.token."""
    _server.reset()
    yield _server
    _server.reset()


@pytest.fixture
def client(_worker: Worker, hub: Hub, tmp_path: Path) -> Client:
    return Client(_worker, tmp_path, hub.token)


@dataclass
class Place:
    """Where to push to: the tests' own Hub, or the one of HF_ENDPOINT."""

    client: Client
    user: str
    hub: Hub | None = None  # for what only the tests' own Hub can tell
    made: list[str] = field(default_factory=list)

    def repo(self, name: str) -> str:
        """A repository id that nobody has; deleted after the test."""
        self.made.append(f"{self.user}/{name}-{secrets.token_hex(4)}")
        return self.made[-1]


@pytest.fixture(scope="session")
def _real_worker() -> Iterator[Worker | None]:
    if not (os.environ.get("HF_ENDPOINT") and os.environ.get("HF_TOKEN")):
        yield None
        return
    worker = Worker(os.environ["HF_ENDPOINT"])
    yield worker
    worker.close()


@pytest.fixture
def place(request: pytest.FixtureRequest, _real_worker: Worker | None, tmp_path: Path) -> Iterator[Place]:
    """The Hub of HF_ENDPOINT where HF_TOKEN is given as well, else the loopback one."""
    if _real_worker is None:
        yield Place(request.getfixturevalue("client"), USER, request.getfixturevalue("hub"))
        return
    client = Client(_real_worker, tmp_path, os.environ["HF_TOKEN"])
    found = Place(client, client("me").value)
    yield found
    for repo in found.made:
        client("delete", repo=repo)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texture-{0,1,2} and geometry-{0,1,2}: LoRA adapters of jobs.base(); bases mined from them."""
    root = tmp_path_factory.mktemp("made")
    names = [f"{attribute}-{i}" for attribute in ("texture", "geometry") for i in range(3)]
    for seed, name in enumerate(names):
        model = jobs.base()
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(root / name)
    groups = {a: [root / f"{a}-{i}" for i in range(3)] for a in ("texture", "geometry")}
    both = build_basis(groups, dim=2, base_model="toy/base", progress=False)
    both.save_pretrained(root / "basis")
    both.select(["texture"]).save_pretrained(root / "texture")
    both.select(["geometry"]).save_pretrained(root / "geometry")
    fewer = {a: members[:2] for a, members in groups.items()}
    build_basis(fewer, dim=2, base_model="toy/base", progress=False).save_pretrained(root / "other")
    return root


@pytest.fixture(scope="session")
def _large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.fc": (100_000, 60_000), "blocks.1.fc": (60_000, 60_000)}
    adapters = save_many(root, [random_factors(shapes, 8, generator) for _ in range(2)])
    build_basis({"texture": adapters}, dim=16, progress=False).save_pretrained(root / "basis")
    return root / "basis"


@pytest.fixture
def large(_large: Path) -> Path:
    """A basis of 18 MB: more than the 10 MB that a client takes in at once. Read only."""
    return _large


@pytest.fixture
def made(_made: Path) -> Path:
    """Folder with basis, texture, geometry (its two attributes), other (mined from fewer adapters): read only."""
    return _made
