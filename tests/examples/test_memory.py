"""training/memory.py: what is counted is what autograd keeps, and plans fit, by the tensors that are really alive."""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.vggt import VggtConfig, VggtLoss, VggtModel, vggt_targets

VGGT = Path(__file__).parents[2] / "examples" / "vggt"
SIZES = {
    "mini": {"image_size": 112},
    "wide": {"image_size": 112, "embed_dim": 256, "depth": 4, "encoder_depth": 1},
}
GIB = 2**30


@pytest.fixture(scope="module")
def memory() -> Iterator[ModuleType]:
    sys.path.insert(0, str(VGGT))
    yield importlib.import_module("training.memory")
    sys.path.remove(str(VGGT))


def build(method: str, size: str = "mini") -> Any:
    torch.manual_seed(0)
    model = VggtModel(VggtConfig.preset("vggt-mini", **SIZES[size]))
    model.freeze_encoder()
    targets, heads = vggt_targets("aggregator", model), vggt_targets("heads", model)
    if method == "full":
        return model.train()
    if method == "lora":
        config: Any = LoraConfig(r=4, target_modules=[*targets, *heads])
    elif method == "adalora":
        linear = [name for name in targets if "qkv" in name]
        config = AdaLoraConfig(init_r=6, target_r=4, total_step=10, tinit=1, tfinal=1, target_modules=linear)
    else:
        more = {"lora_modules": heads, "lora_rank": 4} if method == "cores" else {}
        config = AttrSubspaceConfig(basis="random", dim=16, target_modules=targets, **more)
    return get_peft_model(model, config).train()


def base(model: Any) -> VggtModel:
    return model if isinstance(model, VggtModel) else model.get_base_model()


def a_batch(views: int, height: int, width: int) -> dict[str, torch.Tensor]:
    k = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    return {
        "images": torch.rand(1, views, 3, height, width),
        "depths": torch.rand(1, views, height, width) + 1,
        "extrinsics": torch.eye(4)[:3].expand(1, views, 3, 4).clone(),
        "intrinsics": k.expand(1, views, 3, 3).clone(),
    }


def own_storages(model: Any) -> set[int]:
    own = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for held in (getattr(module, "attrsub_A", {}), getattr(module, "attrsub_B", {})):
            own += [held[adapter] for adapter in held]
    return {tensor.untyped_storage().data_ptr() for tensor in own}


def measure_kept(model: Any, images: torch.Tensor, low: bool) -> int:
    """Bytes of the storages that autograd holds after a forward pass, beside the model's own."""
    own, found = own_storages(model), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
        output = model(pixel_values=images)
    assert output.depth.requires_grad
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "cores", "frozen heads"])
def test_what_is_counted_is_what_is_kept(
    memory: ModuleType, monkeypatch: pytest.MonkeyPatch, method: str, low: bool, size: str
) -> None:
    model = build(method, size)
    if method == "frozen heads":
        assert not any(p.requires_grad for p in base(model).depth_head.parameters())
    views, height, width = 3, 112, 80
    norm = torch.nn.functional.layer_norm
    if low:  # CUDA's autocast widens the inputs of norms, the CPU's does not
        monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *rest, **more: norm(x.float(), *rest, **more))
    for checkpoint in memory.CHECKPOINTING:
        if checkpoint:
            base(model).checkpoint_blocks(checkpoint)
            base(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        costs = memory.kept(
            base(model).config, memory.describe(model), (height, width), "bf16" if low else "no", checkpoint
        )
        # Without what the losses and the batch take.
        counted = costs.once + views * (costs.per_image - memory.PIXEL_BYTES * height * width)
        measured = measure_kept(model, torch.rand(1, views, 3, height, width), low)
        assert counted == pytest.approx(measured, rel=0.03), checkpoint


class Live(TorchDispatchMode):
    """Bytes of all tensors alive that were made inside: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("method", ["full", "lora", "cores"])
@pytest.mark.parametrize("checkpoint", [(), ("frame", "global")], ids=["kept", "recomputed"])
def test_the_peak_of_a_step_is_below_the_plan(
    memory: ModuleType, method: str, checkpoint: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, views, side = build(method, "mini"), 8, 112
    trained, batch = memory.describe(model), a_batch(views, side, side)
    monkeypatch.setattr(memory, "CHECKPOINTING", (checkpoint,))
    plan = memory.plan_memory(
        base(model).config,
        trained,
        image_size=side,
        views=views,
        images_per_step=views,
        free_bytes=GIB,
        precision="no",
    )
    if checkpoint:
        base(model).checkpoint_blocks(checkpoint)
        base(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    with Live() as live:
        for _ in range(2):  # the second has moments and gradients
            VggtLoss()(model(pixel_values=batch["images"]), batch).total.backward()
            optimizer.step()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    real = live.most + weights + sum(value.nbytes for value in batch.values())
    assert 0.6 * plan.peak < real < 1.05 * plan.peak


def test_what_is_trained_is_read_off_the_model(memory: ModuleType) -> None:
    full, lora, cores = (memory.describe(build(method)) for method in ("full", "lora", "cores"))
    assert (full.full, full.keeps_inputs, full.width, full.head_width) == (True, True, 0, 0)
    assert (lora.full, lora.keeps_inputs, lora.width, lora.head_width) == (False, True, 4, 4)
    assert (cores.full, cores.keeps_inputs, cores.width, cores.head_width) == (False, False, 16, 4)
    ada = memory.describe(build("adalora"))
    assert (ada.keeps_inputs, ada.width, ada.head_width) == (True, 6, 0)
    model = build("frozen heads")
    blocks = 2 * model.get_base_model().config.depth  # frame and global
    assert memory.describe(model).trainable == 4 * blocks * 16 * 16  # 4 matrices
    weights = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    bases = sum(16 * (n + m) for n, m in ((384, 128), (128, 128), (512, 128), (128, 512))) * blocks
    fingerprints = 64 * 4 * blocks
    assert memory.describe(model).frozen_bytes == 4 * (weights + bases) + fingerprints


def counts(memory: ModuleType, method: str) -> Any:
    """VGGT-1B with LoRA of rank 16, with cores of 64, in full; without building it."""
    frozen = 4 * 1_158_000_000
    return {
        "lora": memory.Trained(16_336_192, frozen, False, True, 16, 16),
        "cores": memory.Trained(4_539_712, frozen + 4 * 64 * 786_432, False, False, 64, 16),
        "full": memory.Trained(853_568_756, 4 * 304_372_736, True, True),
    }[method]


def plan(memory: ModuleType, method: str, gib: float, **changes: Any) -> Any:
    how = {"image_size": 518, "views": 16, "images_per_step": 32, "free_bytes": int(gib * GIB)} | changes
    return memory.plan_memory(VggtConfig.preset("vggt-1b"), counts(memory, method), **how)


@pytest.mark.parametrize("method", ["lora", "cores", "full"])
def test_plans_fit_and_more_memory_is_never_slower(memory: ModuleType, method: str) -> None:
    before = None
    for gib in (40, 48, 64, 80, 96, 141, 192, 400):
        found = plan(memory, method, gib)
        assert found.peak <= gib * GIB
        assert 16 <= found.images_per_device <= 32
        assert found.images_per_device * found.accumulate >= 32
        rank = (memory.CHECKPOINTING.index(found.checkpoint_blocks), found.accumulate)
        assert before is None or rank <= before
        before = rank
    assert before == (0, 1)


def test_cores_need_less_than_lora_and_that_less_than_all(memory: ModuleType) -> None:
    peaks = [plan(memory, method, 1000).peak for method in ("cores", "lora", "full")]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3


def test_a_step_is_shared_by_processes_and_a_scene_never_divided(memory: ModuleType) -> None:
    found = plan(memory, "cores", 400, processes=2, images_per_step=48)
    assert (found.images_per_device, found.accumulate) == (24, 1)
    # Four processes would have 8 images each: the largest scene has 16.
    assert plan(memory, "cores", 400, processes=4).images_per_device == 16


def test_reasons_are_printed(memory: ModuleType) -> None:
    assert plan(memory, "lora", 40).why.startswith(
        "16 images of 518 x 518 px at a time, 2 micro-batches a step, frame and global blocks recomputed: "
    )
    assert "1 micro-batch a step, nothing recomputed" in plan(memory, "lora", 400).why


def test_no_plan(memory: ModuleType) -> None:
    with pytest.raises(
        ValueError, match=r"scene of 16 views at 518 x 518 px needs about .* at most \d+ views per scene"
    ):
        plan(memory, "lora", 16)
    with pytest.raises(ValueError, match="not one image fits"):
        plan(memory, "full", 8)
    with pytest.raises(ValueError, match=r"side of 500 px: expected a multiple of 14"):
        plan(memory, "lora", 80, image_size=500)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        plan(memory, "lora", 80, precision="int8")
    with pytest.raises(ValueError, match="views is 0"):
        plan(memory, "lora", 80, views=0)


def test_the_views_that_are_said_to_fit_do(memory: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"at most (\d+) views") as error:
        plan(memory, "lora", 16)
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert plan(memory, "lora", 16, views=most, images_per_step=most).peak <= 16 * GIB
    with pytest.raises(ValueError, match=f"at most {most} views"):
        plan(memory, "lora", 16, views=most + 1)


def test_memory_of_this_machine(memory: ModuleType) -> None:
    before = memory.peak_memory("cpu")
    block = torch.ones(2**26)  # 256 MiB
    assert memory.peak_memory("cpu") >= max(before, block.nbytes)
    assert 0 < memory.free_memory() < 2**45
