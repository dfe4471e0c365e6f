"""LoRA, cores and int8 weights on VGGT as on any transformers model; adapters of the public package fit by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from peft_attrsub import AttrSubspaceConfig, build_basis, project_lora
from peft_attrsub.basis.convert import convert_release
from peft_attrsub.tuner import AttrSubspaceLayer
from peft_attrsub.vggt import VggtModel
from peft_attrsub.vggt.targets import vggt_targets
from tests.basis.helpers import random_factors, save_lora

from .small import images, relative, tiny, tiny_config
from .test_running import checkpointing, predict

HEADS = ("camera", "depth")
AGGREGATOR = vggt_targets("aggregator", tiny_config())
ON_HEADS = vggt_targets("heads", tiny_config())
SHAPES = {
    name: tuple(module.weight.flatten(1).shape) for name, module in tiny().named_modules() if name in set(AGGREGATOR)
}


def attrsub(**more):
    """Cores on the aggregator and LoRA on the heads, as the paper trains."""
    return AttrSubspaceConfig(
        basis="random", dim=4, target_modules=AGGREGATOR, lora_modules=ON_HEADS, lora_rank=2, **more
    )


def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules=vggt_targets("lora", tiny_config()))


CONFIGS = {"lora": lora, "attrsub": attrsub}
every_method = pytest.mark.parametrize("method", CONFIGS)


def adapted(method):
    return get_peft_model(tiny(heads=HEADS), CONFIGS[method]())


def total(output):
    return (
        output.depth.square().mean() + output.depth_conf.mean() + sum(p.square().mean() for p in output.pose_enc_list)
    )


def train(model, x, steps=2):
    """A few steps of Adam; returns the loss of each."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = total(model(x))
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    model.eval()
    return losses


def same(found, expected, tolerance=1e-4):
    return all(relative(found[name], expected[name]) < tolerance for name in ("pose_enc", "depth", "depth_conf"))


@every_method
def test_train_save_load_merge(method, tmp_path):
    x = images(2)
    base, model = predict(tiny(heads=HEADS), x), adapted(method)
    assert same(predict(model, x), base, 1e-6), "a new adapter changes nothing"
    losses = train(model, x)
    assert losses[1] < losses[0]
    trained = predict(model, x)
    assert not same(trained, base, 1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(heads=HEADS), tmp_path)
    assert same(predict(loaded, x), trained, 1e-5)
    with loaded.disable_adapter():
        assert same(predict(loaded, x), base, 1e-6)
    merged = loaded.merge_and_unload()
    assert type(merged) is VggtModel and not any(
        isinstance(m, AttrSubspaceLayer | LoraLayer) for m in merged.modules()
    )
    assert same(predict(merged, x), trained)
    merged.save_pretrained(tmp_path / "merged")
    assert same(predict(VggtModel.from_pretrained(tmp_path / "merged"), x), trained)


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_every_adapter_tensor_learns_under_checkpointing(method, reentrant):
    x, plain = images(2), adapted(method).train()

    def gradients(model):
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.manual_seed(len(name))
                p.data = 0.05 * torch.randn(p.shape)
        total(model(x)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(plain)
    assert all(gradient.any() for gradient in expected.values())
    base = tiny(heads=HEADS)
    base.freeze_encoder()
    checkpointing(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(get_peft_model(base, CONFIGS[method]()).train())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name] is not None, f"{name} got no gradient"
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@every_method
@pytest.mark.parametrize("first", [True, False], ids=["frozen-first", "adapted-first"])
def test_a_frozen_encoder_under_an_adapter(method, first):
    base = tiny(heads=HEADS)
    if first:
        base.freeze_encoder()
    model = get_peft_model(base, CONFIGS[method]())
    if not first:
        base.freeze_encoder()
    model.train()
    encoder = base.aggregator.patch_embed
    assert not any(m.training for m in encoder.modules()) and base.camera_head.training
    assert not any(p.requires_grad for p in encoder.parameters())
    losses = train(model, images(2))
    assert losses[1] < losses[0]


def public_adapters(root, seeds=(0, 1, 2)):
    """LoRAs as trained with the public package, whose modules have the names of the checkpoint."""
    generator = torch.Generator().manual_seed(4)
    factors = [random_factors(SHAPES, 3, generator, scale=0.3) for _ in seeds]
    more = {"base_model": "facebook/VGGT-1B", "target_modules": ["qkv", "attn.proj", "fc1", "fc2"]}
    folders = [
        save_lora(root / f"texture-{i}", row, exclude_modules=r".*(patch_embed|camera_head).*", **more)
        for i, row in zip(seeds, factors, strict=True)
    ]
    return folders, factors


def test_a_lora_of_the_public_package_loads(tmp_path):
    folders, factors = public_adapters(tmp_path, (0,))
    x, base = images(2), tiny()
    model = PeftModel.from_pretrained(tiny(), folders[0])
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == SHAPES.keys()
    assert not same(predict(model, x), predict(base, x), 1e-3)
    merged = model.merge_and_unload()
    for name, (b, a) in factors[0].items():
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(change, (b @ a).float(), rtol=1e-4, atol=1e-5)


def test_a_basis_of_public_adapters_fits(tmp_path):
    folders, _ = public_adapters(tmp_path)
    basis = build_basis({"texture": folders}, dim=4, progress=False)
    assert set(basis.modules) == set(AGGREGATOR)
    x, base = images(2), predict(tiny(), images(2))
    model = get_peft_model(tiny(), AttrSubspaceConfig(basis=basis))
    assert {
        n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, AttrSubspaceLayer)
    } == set(AGGREGATOR)
    assert same(predict(model, x), base, 1e-6)
    losses = train(model, x)
    assert losses[1] < losses[0]
    # and one of the LoRAs, projected into the basis, is an adapter of ours
    basis.save_pretrained(tmp_path / "basis")
    project_lora(folders[0], tmp_path / "basis", tmp_path / "projected")
    projected = PeftModel.from_pretrained(tiny(), tmp_path / "projected")
    assert not same(predict(projected, x), base, 1e-3)


def test_a_subspace_file_of_the_authors_release_fits(tmp_path):
    tensors = {}
    for name, (n, m) in SHAPES.items():
        _, blocks, layer, part, weight = name.split(".")
        key = f"{blocks}.{part}.{weight}.{layer}"
        tensors |= {f"{key}.A": torch.randn(8, m), f"{key}.B": torch.randn(n, 8)}
    save_file(tensors, tmp_path / "geometry_texture_4.safetensors")
    basis = convert_release(tmp_path / "geometry_texture_4.safetensors", attributes=["geometry", "texture"])
    config = AttrSubspaceConfig(basis=basis, lora_modules=ON_HEADS, lora_rank=2, target_modules=AGGREGATOR)
    model = get_peft_model(tiny(heads=HEADS), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "attrsub_M" in n}
    assert len(trained) == len(AGGREGATOR) and {tuple(p.shape) for p in trained.values()} == {(8, 8)}
    losses = train(model, images(2))
    assert losses[1] < losses[0]


def test_cores_on_convolutions_of_the_depth_head():
    convolutions = [name for name in ON_HEADS if name.startswith("depth_head.") and "output_conv2" not in name]
    model = get_peft_model(tiny(), AttrSubspaceConfig(basis="random", dim=4, target_modules=convolutions))
    x, base = images(2), predict(tiny(), images(2))
    losses = train(model, x)
    assert losses[1] < losses[0]
    trained = predict(model, x)
    assert relative(trained.depth, base.depth) > 1e-3
    assert torch.equal(trained.pose_enc, base.pose_enc) and torch.equal(trained.world_points, base.world_points)
    assert same(predict(model.merge_and_unload(), x), trained)


def test_half_precision_and_autocast_train(tmp_path):
    tiny(heads=HEADS).save_pretrained(tmp_path / "base")
    x = images(2)
    half = VggtModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for model, autocast in ((half, False), (tiny(heads=HEADS), True)):
        peft = get_peft_model(model, attrsub())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = train(peft, x, 3)
        assert losses[-1] < losses[0]
        assert all(p.isfinite().all() for p in peft.parameters())


# int8 weights


@pytest.fixture
def quantised(tmp_path):
    """A saved small VGGT, opened with int8 weights the way transformers does it."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra [dev])")
    from transformers import TorchAoConfig

    tiny(heads=HEADS).save_pretrained(tmp_path / "base")

    def load():
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        return VggtModel.from_pretrained(tmp_path / "base", quantization_config=config)

    return load


def kind(model, name):
    return type(model.get_submodule(name).weight).__name__


def test_int8_weights_keep_the_heads_exact(quantised):
    model, x = quantised(), images(2)
    assert all("Int8" in kind(model, name) for name in AGGREGATOR)
    assert not any("Int8" in kind(model, name) for name in ON_HEADS)
    found, expected = predict(model, x), predict(tiny(heads=HEADS), x)
    assert same(found, expected, 0.1) and not same(found, expected, 1e-5)


@every_method
def test_adapters_on_int8_weights(quantised, method, tmp_path):
    x, model = images(2), get_peft_model(quantised(), CONFIGS[method]())
    assert same(predict(model, x), predict(quantised(), x), 1e-5)
    losses = train(model, x)
    assert losses[1] < losses[0]
    trained = predict(model, x)
    model.save_pretrained(tmp_path / "adapter")
    assert same(predict(PeftModel.from_pretrained(quantised(), tmp_path / "adapter"), x), trained, 1e-4)
    merged = model.merge_and_unload()
    assert "Int8" in kind(merged, AGGREGATOR[0])
    assert same(predict(merged, x), trained, 0.1)
