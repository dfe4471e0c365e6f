"""DDP, FSDP and FSDP2 on two gloo processes: one step on two batches equals one step on both, in one process.

DDP broadcasts all parameters and buffers once, at its construction, and all buffers before every forward pass after it
(`_sync_module_states` and `_sync_buffers` in torch/nn/parallel/distributed.py), except those that the module lists in
`_ddp_params_and_buffers_to_ignore`. FSDP and FSDP2 gather the parameters of a module when it is called. FSDP2's
`get_model_state_dict` and `set_model_state_dict` look every key up on its module.
"""

from __future__ import annotations

import json

import pytest

from .wrapped import KINDS, mine, run_twice

WORKER = '''
import json, sys, traceback
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from tests.conformance.wrapped import KINDS, adapted, logits

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
batches = torch.randint(3, 128, (2, 2, 8), generator=torch.Generator().manual_seed(3))  # [process, sentence, token]

def step(model, ids):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

def alone(kind):
    """The model before and after one step on both batches in this process."""
    model = adapted(kind, folder)
    before = logits(model)
    step(model, batches.flatten(0, 1))
    after = logits(model)
    assert not torch.allclose(before, after, atol=1e-4), "one step must be seen"
    return before, after

def ddp(kind):
    sent = []
    real = dist._broadcast_coalesced
    def counted(group, tensors, *rest):
        sent.extend(tensors)
        return real(group, tensors, *rest)
    dist._broadcast_coalesced = counted
    try:
        before, after = alone(kind)
        model = adapted(kind, folder)
        bases = {
            tensor.data_ptr()
            for module in model.modules()
            for name in ("attrsub_A", "attrsub_B")
            for tensor in [getattr(module, name)["default"] if hasattr(module, name) else None]
            if tensor is not None
        }
        assert bool(bases) == (kind != "lora")
        wrapped = DDP(model)
        assert not bases & {t.data_ptr() for t in sent}, "a frozen basis was broadcast at the start"
        sent.clear()
        step(wrapped, batches[rank])
        logits(wrapped)
        assert not bases & {t.data_ptr() for t in sent}, "a frozen basis was broadcast during a step"
        if kind != "lora":
            assert not [t for t in sent if t.dtype == torch.uint8], "a fingerprint was broadcast during a step"
        assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    finally:
        dist._broadcast_coalesced = real

def fsdp(kind):
    before, after = alone(kind)
    cpu = torch.device("cpu")
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    model = FSDP(adapted(kind, folder), auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    step(model, batches[rank])
    assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = model.state_dict()
    fresh = adapted(kind, folder, trained=False)
    assert set(state) == set(fresh.state_dict())
    fresh.load_state_dict(state)
    assert_close(logits(fresh), after, rtol=1e-4, atol=1e-5)

def sharded(kind, trained):
    model = adapted(kind, folder, trained)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def fsdp2(kind):
    before, after = alone(kind)
    model = sharded(kind, True)
    assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    step(model, batches[rank])
    assert_close(logits(model), after, rtol=1e-4, atol=1e-5)

def fsdp2_state(kind):
    before, _ = alone(kind)
    plain = adapted(kind, folder).state_dict()
    state = get_model_state_dict(sharded(kind, True), options=StateDictOptions(full_state_dict=True))
    assert set(state) == set(plain)
    assert_close(state, plain)
    fresh = sharded(kind, False)
    set_model_state_dict(fresh, state, options=StateDictOptions(full_state_dict=True))
    assert_close(logits(fresh), before, rtol=1e-4, atol=1e-5)

results = {}
for wrapper in (ddp, fsdp, fsdp2, fsdp2_state):
    for kind in KINDS:
        try:
            wrapper(kind)
            results[f"{wrapper.__name__} {kind}"] = "fine"
        except Exception:
            results[f"{wrapper.__name__} {kind}"] = traceback.format_exc()[-1500:]
dist.destroy_process_group()
print(json.dumps(results))
'''


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    mine(folder)
    return [json.loads(out.splitlines()[-1]) for out in run_twice(WORKER, str(folder))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp2", "fsdp2_state"])
def test_two_processes(results, wrapper, kind):
    assert [found[f"{wrapper} {kind}"] for found in results] == ["fine", "fine"]
