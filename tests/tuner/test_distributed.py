"""DistributedDataParallel on two gloo processes: the cores are averaged, the frozen bases never travel."""

import pytest

from tests.conformance.wrapped import run_twice

WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from peft import get_peft_model
from peft_attrsub import AttrSubspaceConfig

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8))
stored = sys.argv[1] == "stored"
model = get_peft_model(base, AttrSubspaceConfig(basis="random", dim=8, target_modules=["0", "2"], save_basis=stored))

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
# A stored basis is a buffer, which DDP is told to leave alone where it wraps the PeftModel itself.
wrapped = DDP(model) if stored else DDP(Outer(model))
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
during = [t for t in sent[at_start:] if t.numel() > 64 or t.dtype != torch.uint8]  # but for fingerprints
assert not during and (not stored or len(sent) == at_start), f"{during} were broadcast during the steps"
assert not held & {t.data_ptr() for t in sent}, "a frozen basis was broadcast"
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.parametrize("kind", ["stored", "pointed"])
def test_bases_are_not_broadcast_and_cores_stay_equal(kind):
    assert [out.strip() for out in run_twice(WORKER, kind)] == ["fine", "fine"]
