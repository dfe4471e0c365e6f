"""examples/vggt/training/methods.py: every method trains what it says, starts from the model, resumes and reloads."""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_attrsub import build_basis
from peft_attrsub.vggt import VggtConfig, VggtLoss, VggtModel, vggt_targets
from tests.basis.helpers import random_factors, save_lora
from tests.vggt.small import meta, tiny

FOLDER = Path(__file__).parents[2] / "examples" / "vggt"
STEPS = 6
SMALL: dict[str, Any] = {"depth": 2, "encoder_depth": 1, "dpt_features": 8}
#: method, heads -> every combination that is allowed
COMBINATIONS = [("full", None), ("full", "frozen")]
COMBINATIONS += [(m, h) for m in ("lora", "pissa", "adalora") for h in (None, "full", "frozen")]
COMBINATIONS += [(m, h) for m in ("psv", "random", "attrsub") for h in ("cores", None, "full", "frozen")]
every = pytest.mark.parametrize(("method", "heads"), COMBINATIONS)
#: Those that are saved in different ways.
SAVED = [(m, h) for m, h in COMBINATIONS if h is None or (m, h) in (("full", "frozen"), ("random", "cores"))]
SAVED += [(m, "full") for m in ("lora", "pissa", "adalora", "attrsub")]
METHODS = ("full", "lora", "pissa", "adalora", "psv", "random", "attrsub")


@pytest.fixture(scope="module")
def methods() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("training.methods")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Mined from three LoRAs of rank 3 for each of two attributes, on all that a LoRA is put on."""
    folder = tmp_path_factory.mktemp("basis")
    names, model = vggt_targets("lora", fresh()), fresh()
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    linear = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    generator = torch.Generator().manual_seed(1)
    adapters = {
        attribute: [save_lora(folder / f"{attribute}-{i}", random_factors(linear, 3, generator)) for i in range(3)]
        for attribute in ("texture", "geometry")
    }
    build_basis(adapters, dim=3, progress=False).save_pretrained(folder / "basis")
    return str(folder / "basis")


def fresh(heads: tuple[str, ...] = ("camera", "depth")) -> VggtModel:
    return tiny(heads=heads, **SMALL)


def chosen(methods: ModuleType, method: str, heads: str | None = None, basis: str | None = None, **more: Any) -> Any:
    if method == "attrsub":
        more["basis"] = [basis]
        # The basis of these tests has no convolutions.
        if heads == "cores":
            more["exclude"] = r"^depth_head\."
    elif method in ("psv", "random"):
        more.setdefault("dim", ["4"])
    more = {"rank": 2, "gradient_checkpointing": ["none"]} | more
    return methods.ModelSettings(method=method, heads=heads, **more)


def built(methods: ModuleType, *choice: Any, model: VggtModel | None = None, seed: int = 0, **more: Any) -> Any:
    return methods.build(model or fresh(), chosen(methods, *choice, **more), steps=STEPS, seed=seed)


def truth(seed: int = 0) -> dict[str, Tensor]:
    """Two views of noise, and a truth for them."""
    g = torch.Generator().manual_seed(seed)
    extrinsics = torch.eye(3, 4).repeat(1, 2, 1, 1)
    extrinsics[..., 3] = 0.1 * torch.randn(1, 2, 3, generator=g)
    lens = torch.tensor([[40.0, 0, 21], [0, 40, 14], [0, 0, 1]])
    return {
        "images": torch.rand(1, 2, 3, 28, 42, generator=g),
        "depths": 1 + torch.rand(1, 2, 28, 42, generator=g),
        "extrinsics": extrinsics,
        "intrinsics": lens.repeat(1, 2, 1, 1),
    }


def train(
    b: Any, first: int = 1, last: int = STEPS, optimizer: torch.optim.Optimizer | None = None, lr: float = 1e-2
) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW([p for group in b.groups.values() for p in group], lr=lr)
    losses = []
    b.model.train()
    for step in range(first, last + 1):
        batch = truth(step % 2)
        loss = VggtLoss()(b.model(batch["images"]), batch).total
        losses.append(float(loss.detach()))
        penalty = b.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        b.after_step(step)
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def predict(model: Any) -> tuple[Tensor, Tensor]:
    output = model.eval()(truth()["images"])
    return output.pose_enc, output.depth


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> bool:
    return all(
        float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


@every
def test_a_method_begins_at_the_model_and_learns(
    methods: ModuleType, basis: str, method: str, heads: str | None
) -> None:
    expected = predict(fresh())
    # So long a training that AdaLoRA's ranks do not fall yet.
    b = methods.build(fresh(), chosen(methods, method, heads, basis), steps=100)
    assert b.model.training
    assert close(predict(b.model), expected, 1e-4 if method == "pissa" else 1e-6)
    before = {name: p.detach().clone() for name, p in b.model.named_parameters()}
    whole_matrices = method == "full" or heads == "full"
    losses = train(b, last=4, lr=1e-3 if whole_matrices else 1e-2)
    assert losses[2] < losses[0], "the same batch, two steps later"
    assert not close(predict(b.model), expected, 1e-3)
    moved = {name for name, p in b.model.named_parameters() if not torch.equal(p, before[name])}
    # LoRA's and AdaLoRA's A begin to move one step after B: four steps are enough for all.
    assert moved == set(b.named), sorted(moved ^ set(b.named))[:5]


@every
def test_the_encoder_is_frozen_and_the_heads_do_as_told(
    methods: ModuleType, basis: str, method: str, heads: str | None
) -> None:
    b = built(methods, method, heads, basis)
    encoder = b.base.aggregator.patch_embed
    assert not any(p.requires_grad for p in encoder.parameters()) and not any(m.training for m in encoder.modules())
    assert not any("patch_embed" in name for name in b.named)
    grouped = [p for group in b.groups.values() for p in group]
    assert len(grouped) == len(b.named) and {id(p) for p in grouped} == {id(p) for p in b.named.values()}
    assert b.trainable == sum(p.numel() for p in b.model.parameters() if p.requires_grad) == b.parts.trained()
    groups = {"aggregator"} if heads == "frozen" else {"aggregator", "camera", "depth"}
    if (method, heads) == ("attrsub", "cores"):
        groups.discard("depth")
    assert set(b.groups) == groups
    whole = sum(p.numel() for p in fresh().camera_head.parameters())
    kinds = {kind: b.parts.numbers["camera", kind] for kind in ("cores", "lora", "full", "frozen")}
    if heads == "full" or (method, heads) == ("full", None):
        assert kinds == {"cores": 0, "lora": 0, "full": whole, "frozen": 0}
    elif heads == "frozen":
        assert kinds == {"cores": 0, "lora": 0, "full": 0, "frozen": whole}
    else:
        assert kinds["frozen"] == whole and bool(kinds["lora"]) == (heads is None)
        assert bool(kinds["cores"]) == (heads == "cores")


@pytest.mark.parametrize(("method", "heads"), SAVED)
def test_what_is_saved_loads_on_the_untouched_model(
    methods: ModuleType, basis: str, method: str, heads: str | None, tmp_path: Path
) -> None:
    b = built(methods, method, heads, basis)
    methods.save(b, tmp_path / "adapter")
    train(b)
    folder = methods.save(b, tmp_path / "adapter", {"attribute": "texture", "steps": STEPS})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    expected = predict(b.model)
    if method == "full":
        loaded: Any = VggtModel.from_pretrained(folder)
        tags = json.loads((folder / "config.json").read_text())["training"]
    else:
        loaded = PeftModel.from_pretrained(fresh(), folder)
        tags = json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]["training"]
    assert tags == {"attribute": "texture", "steps": STEPS}
    assert close(predict(loaded), expected, 1e-4 if method in ("pissa", "adalora") else 1e-6)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_saving_asks_the_hub_for_nothing(
    methods: ModuleType, basis: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(name: str, file: str) -> None:
        raise AssertionError(f"the Hub was asked for {file} of {name}")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    model = fresh()
    model.name_or_path = model.config.name_or_path = "nobody/vggt"
    b = built(methods, method, None, basis, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = methods.save(b, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "nobody/vggt"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [2, 5])
def test_a_continued_training_ends_with_the_same_bits(methods: ModuleType, basis: str, method: str, stop: int) -> None:
    """Stopped while AdaLoRA's ranks fall, and after they have fallen."""
    options = {"adalora_every": 2} if method == "adalora" else {}

    def optimiser(b: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(b.named.values()), lr=0.01)

    whole = built(methods, method, None, basis, **options)
    train(whole, optimizer=optimiser(whole))
    first = built(methods, method, None, basis, **options)
    one = optimiser(first)
    train(first, last=stop, optimizer=one)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    second = built(methods, method, None, basis, **options)
    two = optimiser(second)
    second.load_state(state)
    two.load_state_dict(one.state_dict())
    train(second, stop + 1, optimizer=two)
    for name, p in whole.named.items():
        assert torch.equal(second.named[name], p), name
    assert all(torch.equal(a, b) for a, b in zip(predict(second.model), predict(whole.model), strict=True))


def test_a_checkpoint_of_another_method_is_refused_and_changes_nothing(methods: ModuleType) -> None:
    lora, random = built(methods, "lora"), built(methods, "random")
    before = {name: p.detach().clone() for name, p in random.named.items()}
    with pytest.raises(ValueError, match=r"another model or method: .* is only in the"):
        random.load_state(lora.state())
    # LoRA and PiSSA train tensors of the same names, on different weights.
    with pytest.raises(ValueError, match=r"pissa/.* is only in the checkpoint"):
        lora.load_state(built(methods, "pissa").state())
    with pytest.raises(ValueError, match=r"pissa/.* is only in the model"):
        built(methods, "pissa").load_state(lora.state())
    with pytest.raises(ValueError, match=r"has shape .* in the checkpoint and .* in the model"):
        random.load_state(built(methods, "random", dim=["3"]).state())
    assert all(torch.equal(p, before[name]) for name, p in random.named.items())


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "random", "psv"])
def test_the_start_follows_from_the_seed_alone(methods: ModuleType, method: str) -> None:
    more = {"pissa_iterations": 2} if method == "pissa" else {}
    model = fresh()
    before = torch.random.get_rng_state()
    one = built(methods, method, model=model, seed=5, **more)
    assert torch.equal(torch.random.get_rng_state(), before), "nothing is drawn from the script's own generator"
    torch.manual_seed(2)
    two, other = built(methods, method, seed=5, **more), built(methods, method, seed=6, **more)
    assert all(torch.equal(p, two.named[name]) for name, p in one.named.items())
    if method != "psv":
        assert not all(torch.equal(p, other.named[name]) for name, p in one.named.items())


def test_counts_at_the_size_of_the_paper(methods: ModuleType) -> None:
    model = meta(VggtConfig.preset("vggt-1b"))
    b = methods.build(model, methods.ModelSettings(method="full"))
    assert b.trainable == 853_568_756
    assert b.parts.trained("encoder") == 0
    b = methods.build(meta(VggtConfig.preset("vggt-1b")), methods.ModelSettings(method="lora", rank=16))
    assert b.trainable == 16_336_192
    assert b.parts.tensors["aggregator", "lora"] == 192
    assert (b.parts.tensors["camera", "lora"], b.parts.tensors["depth", "lora"]) == (20, 30)
    assert re.search(r"aggregator +- +192 x, 12,582,912 +- .* 12,582,912\n", b.table)
    assert b.table.splitlines()[-1].split()[-1] == "16,336,192"


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "expected"), [("lora", 192 * 256 + 3_753_280), ("frozen", 192 * 256)])
def test_cores_at_the_size_of_the_paper(methods: ModuleType, heads: str, expected: int) -> None:
    settings = methods.ModelSettings(method="random", dim=["16"], heads=heads)
    assert methods.build(meta(VggtConfig.preset("vggt-1b")), settings).trainable == expected


def test_head_matrices_too_small_for_a_core_get_a_lora(methods: ModuleType) -> None:
    b = built(methods, "random", "cores", dim=["9"])
    sides = {n: min(fresh().get_submodule(n).weight.flatten(1).shape) for n in vggt_targets("heads", fresh())}
    small = {name for name, side in sides.items() if side < 9}
    assert 0 < len(small) < len(sides)
    with_lora = {n.partition(".attrsub_lora_A")[0].removeprefix("base_model.model.") for n in b.named if "lora_A" in n}
    assert with_lora == small
    b = built(methods, "random", "cores", dim=["9"], core_min_side=16)
    assert b.parts.tensors["camera", "lora"] + b.parts.tensors["depth", "lora"] == sum(s < 16 for s in sides.values())


def test_cores_take_attributes_and_dims_of_a_mined_basis(methods: ModuleType, basis: str) -> None:
    body = len(vggt_targets("aggregator", fresh()))

    def side(**more: Any) -> int:
        b = built(methods, "attrsub", "frozen", basis, **more)
        assert b.parts.tensors["aggregator", "cores"] == body
        return round((b.trainable / body) ** 0.5)

    assert side() == 6
    assert side(attributes=["geometry"]) == 3
    assert side(dim=["2"]) == 4
    assert side(dim=["texture=1", "geometry=2"]) == 3
    with pytest.raises(ValueError, match="lighting"):
        side(attributes=["lighting"])


def test_two_bases_stand_side_by_side(methods: ModuleType, basis: str, tmp_path: Path) -> None:
    from peft_attrsub import Basis

    for name in ("texture", "geometry"):
        Basis.from_pretrained(basis).select([name]).save_pretrained(tmp_path / name)
    settings = methods.ModelSettings(
        basis=[str(tmp_path / "texture"), str(tmp_path / "geometry")], heads="frozen", gradient_checkpointing=["none"]
    )
    both = methods.build(fresh(), settings)
    assert both.trainable == built(methods, "attrsub", "frozen", basis).trainable


def test_a_basis_that_does_not_cover_the_model_is_a_sentence_or_is_skipped(
    methods: ModuleType, basis: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"depth_head\..*which target_modules asks for"):
        methods.build(fresh(), methods.ModelSettings(basis=[basis], heads="cores"))
    settings = methods.ModelSettings(basis=[basis], heads="cores", missing="intersect", rank=2)
    b = methods.build(fresh(), settings)
    assert b.parts.tensors["camera", "cores"] > 0 and b.parts.tensors["depth", "cores"] == 0
    with pytest.raises(ValueError, match="nowhere"):
        methods.build(fresh(), methods.ModelSettings(basis=[str(tmp_path / "nowhere")]))


def test_adalora_ends_within_its_budget(methods: ModuleType) -> None:
    b = built(methods, "adalora", rank=2, adalora_init_rank=4, adalora_every=1)
    entries = [p for name, p in b.named.items() if ".lora_E." in name]
    assert all(p.shape == (4, 1) for p in entries)
    train(b)
    left = sum(int(p.count_nonzero()) for p in entries)
    assert 0 < left <= 2 * len(entries)


def test_a_skipped_step_does_not_cost_adalora_its_last_allocation(methods: ModuleType) -> None:
    """Ranks have fallen after step 4; that step is skipped, as one with NaN in it would be."""
    b = built(methods, "adalora", rank=2, adalora_init_rank=4, adalora_every=100)
    entries = [p for name, p in b.named.items() if ".lora_E." in name]
    train(b, last=3)
    assert all(p.count_nonzero() == 4 for p in entries)
    train(b, 5)
    assert sum(int(p.count_nonzero()) for p in entries) == 2 * len(entries)


def test_adalora_goes_on_where_the_loss_leaves_out_a_head(methods: ModuleType) -> None:
    b, batch = built(methods, "adalora"), truth()
    VggtLoss(camera_weight=0.0)(b.model(batch["images"]), batch).total.backward()
    b.after_step(1)
    assert all(tensor.isfinite().all() for tensor in b.state().values())


@pytest.mark.parametrize(("steps", "sentence"), [(None, "say how many steps"), (1, "--steps 1 is too few")])
def test_adalora_needs_to_know_the_steps(methods: ModuleType, steps: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        methods.build(fresh(), chosen(methods, "adalora"), steps=steps)


def test_the_penalty_is_the_one_of_peft(methods: ModuleType) -> None:
    """PEFT's AdaLoRA adds it to a loss of the model's own; PeftModel, which is what is called, passes by that."""
    b, batch = built(methods, "adalora"), truth()
    names = {"pixel_values": batch.pop("images")} | batch
    with torch.no_grad():
        alone = b.base(**names).loss
        torch.testing.assert_close(b.model(**names).loss, alone)
        torch.testing.assert_close(b.model.base_model(**names).loss - alone, b.penalty(), rtol=1e-4, atol=1e-5)
    assert built(methods, "lora").penalty() is None


def test_pissa_begins_with_the_leading_part_of_the_weight(methods: ModuleType) -> None:
    name = "aggregator.frame_blocks.0.attn.qkv"
    weight = fresh().get_submodule(name).weight
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    leading = (u[:, :2] * s[:2] @ vh[:2]).float()
    layer = built(methods, "pissa").base.get_submodule(name)
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(update, leading, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.get_base_layer().weight, weight - leading, rtol=1e-4, atol=1e-5)


def test_pissa_takes_over_the_start_of_another_machine(methods: ModuleType) -> None:
    """Another SVD gives other factors, here a rough one: W is then taken apart by those of the checkpoint."""
    one = built(methods, "pissa", pissa_iterations=0)
    train(one, last=3)
    state = one.state()
    two = built(methods, "pissa")
    starts = [name for name in state if name.startswith("pissa/")]
    assert not any(torch.allclose(two.state()[name], state[name], rtol=0.01) for name in starts)
    two.load_state(state)
    assert close(predict(two.model), predict(one.model), 1e-4)
    again = two.state()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_pissa_passes_over_weights_of_a_lower_rank(methods: ModuleType, tmp_path: Path) -> None:
    b = built(methods, "pissa", rank=12)
    names = {name.split("/")[1] for name in b.state() if name.startswith("pissa/")}
    assert "camera_head.embed_pose" not in names and "camera_head.pose_branch.fc1" in names
    train(b, last=2)
    loaded = PeftModel.from_pretrained(fresh(), methods.save(b, tmp_path / "adapter"))
    assert close(predict(loaded), predict(b.model), 1e-4)


def test_alpha_is_twice_the_rank_unless_told(methods: ModuleType) -> None:
    name = "aggregator.global_blocks.1.mlp.fc1"
    assert built(methods, "lora", rank=3).base.get_submodule(name).scaling["default"] == 2
    assert built(methods, "lora", rank=4, alpha=4.0).base.get_submodule(name).scaling["default"] == 1
    head = "camera_head.pose_branch.fc1"
    assert built(methods, "random", rank=4, alpha=2.0).base.get_submodule(head).scaling["default"] == 0.5


def test_excluded_matrices_get_nothing(methods: ModuleType) -> None:
    b = built(methods, "lora", exclude=r"\.mlp\.|_head\.")
    assert {name.rpartition(".lora_")[0].split(".")[-1] for name in b.named} == {"qkv", "proj"}
    for method, what in (("lora", "an adapter"), ("random", "a core")):
        with pytest.raises(ValueError, match=f"leaves no matrix for {what}"):
            built(methods, method, "frozen", exclude="aggregator")


@pytest.mark.parametrize("method", ["full", "lora", "random"])
def test_checkpointed_blocks_give_the_same_gradients(methods: ModuleType, method: str) -> None:
    def gradients(parts: list[str]) -> dict[str, Tensor]:
        b = built(methods, method, gradient_checkpointing=parts)
        with torch.no_grad():
            for name, p in sorted(b.named.items()):
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        on = {n for n, m in b.base.named_modules() if getattr(m, "gradient_checkpointing", False)}
        assert {n.split(".")[1] for n in on if n.startswith("aggregator.")} == {
            f"{part}_blocks" for part in parts if part != "none"
        }
        batch = truth()
        VggtLoss()(b.model(batch["images"]), batch).total.backward()
        return {name: p.grad for name, p in b.named.items() if p.grad is not None}

    expected, found = gradients(["none"]), gradients(["frame", "global"])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_without_a_head_is_served(methods: ModuleType) -> None:
    b = methods.build(fresh(("depth",)), chosen(methods, "lora"))
    assert set(b.groups) == {"aggregator", "depth"}
    b = methods.build(fresh(("camera", "depth", "point")), chosen(methods, "full"))
    assert set(b.groups) == {"aggregator", "camera", "depth"}
    assert b.parts.trained("point") == 0


def test_a_folder_of_something_else_is_not_replaced(methods: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="so it is not replaced"):
        methods.save(built(methods, "lora"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
