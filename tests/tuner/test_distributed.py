"""DistributedDataParallel on two gloo processes: the cores are averaged, the frozen bases never travel."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from peft import get_peft_model
from peft_attrsub import AttrSubspaceConfig

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8))
model = get_peft_model(base, AttrSubspaceConfig(basis="random", dim=8, target_modules=["0", "2"]))

class Outer(torch.nn.Module):  # users wrap the model in modules of their own
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x):
        return self.inner(x)

sent = []
real = dist._broadcast_coalesced
def counted(group, tensors, *rest):
    sent.extend(tensors)
    return real(group, tensors, *rest)
dist._broadcast_coalesced = counted
wrapped = DDP(Outer(model))
at_start = len(sent)
layer = model.base_model.model[0]
held = {layer.attrsub_A["default"].data_ptr(), layer.attrsub_B["default"].data_ptr()}
optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
for step in range(3):
    torch.manual_seed(100 * step + rank)  # every process has its own batch
    wrapped(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
cores = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
other = [torch.empty_like(cores) for _ in range(2)]
dist.all_gather(other, cores)
assert torch.equal(other[0], other[1]), "the cores drifted apart"
assert cores.abs().max() > 0, "nothing was trained"
assert len(sent) == at_start, f"{len(sent) - at_start} tensors were broadcast during the steps"
assert not held & {t.data_ptr() for t in sent}, "a frozen basis was broadcast"
dist.destroy_process_group()
print("fine")
"""


def test_bases_are_not_broadcast_and_cores_stay_equal():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [p.communicate(timeout=120) for p in running]
    finally:
        for p in running:
            p.kill()
    assert [out.strip() for out, _ in results] == ["fine", "fine"], results
