"""build_basis split over processes gives every one of them the basis that a single process makes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from peft_attrsub import Basis, build_basis

from .helpers import random_factors, save_many

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {f"blocks.{i}.fc": (20 + i, 16) for i in range(5)}  # five modules: an uneven share for two processes

WORKER = """
import os, sys, torch
torch.set_num_threads(1)
from peft_attrsub import build_basis
from peft_attrsub.basis import build
mine, mined = build.mine_updates, []
build.mine_updates = lambda *args: mined.append(1) or mine(*args)
out, *paths = sys.argv[1:]
basis = build_basis({"a": paths[:2], "b": paths[2:]}, dim=2, allocation="importance", progress=False)
basis.save_pretrained(f"{out}-{os.environ['RANK']}")
print(len(mined))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(script, *args, processes=2, timeout=100):
    """What torchrun and accelerate launch do: one process per rank, found through the environment."""
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        return [(*p.communicate(timeout=timeout), p.returncode) for p in running]
    finally:
        for p in running:
            p.kill()
            p.wait()


def test_two_processes_make_the_same_basis(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = save_many(tmp_path, [random_factors(SHAPES, 3, generator) for _ in range(4)])
    alone = build_basis({"a": paths[:2], "b": paths[2:]}, dim=2, allocation="importance", progress=False)
    shares = []
    for out, errors, code in launch(WORKER, tmp_path / "basis", *paths):
        assert code == 0, errors
        shares.append(int(out.split()[-1]))
    assert sorted(shares) == [4, 6], "the 5 modules of 2 attributes are shared out, none is done twice"
    for rank in range(2):
        basis = Basis.from_pretrained(tmp_path / f"basis-{rank}")
        assert basis.modules == alone.modules and basis.attributes == alone.attributes
        assert basis.digest == alone.digest


def test_a_bad_module_ends_every_process(tmp_path):
    """NaN in a module of one process' share: the other must not wait for ever."""
    generator = torch.Generator().manual_seed(0)
    adapters = [random_factors(SHAPES, 3, generator) for _ in range(4)]
    adapters[3]["blocks.1.fc"][0][0, 0] = float("nan")
    for _, errors, code in launch(WORKER, tmp_path / "basis", *save_many(tmp_path, adapters), timeout=60):
        assert code != 0 and "blocks.1.fc" in errors
