"""DeepSpeed's ZeRO on a CPU: the losses and the weights of a loop without it, for cores as for a stock LoRA."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from .wrapped import ROOT

WORKER = """
import sys
import deepspeed, torch
from peft import LoraConfig, get_peft_model
from peft_attrsub import AttrSubspaceConfig

def make(kind):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
    if kind == "lora":
        config = LoraConfig(r=4, target_modules=["0", "2"])
    else:
        config = AttrSubspaceConfig(basis="random", dim=4, target_modules=["0", "2"], save_basis=kind == "stored")
    return get_peft_model(base, config)

def trained(model):
    return [p for p in model.parameters() if p.requires_grad]

for kind in ("lora", "pointed", "stored"):
    plain, sharded = make(kind), make(kind)
    alone = torch.optim.SGD(trained(plain), lr=0.5)
    # A threshold of 0: ZeRO-3 takes even these small parameters apart.
    zero = {"stage": int(sys.argv[1]), "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(trained(sharded), lr=0.5)
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=settings)
    losses = []
    for step in range(6):
        torch.manual_seed(step)
        x = torch.randn(4, 32)
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        expected = plain(x).square().mean()
        expected.backward()
        alone.step()
        alone.zero_grad()
        assert torch.allclose(loss, expected, rtol=1e-4), (kind, step, float(loss), float(expected))
    before = make(kind)
    for one, other, start in zip(trained(sharded), trained(plain), trained(before)):
        with deepspeed.zero.GatheredParameters([one]):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), kind
            assert not torch.equal(other, start), kind
print("fine")
import os
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_zero_trains_as_a_plain_loop(stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = subprocess.run(
        [sys.executable, "-c", WORKER, stage], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0 and run.stdout.rstrip().endswith("fine"), run.stderr[-3000:]
