"""Mixed batches through whole models: padded sequences, generation, heads, scenes of frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.vggt import VggtModel
from peft_attrsub.vggt.dpt_head import DptHead

from ..vggt.small import images, tiny, tiny_config
from .checks import same
from .mixing import BASE, alone, clean, shake
from .transformers_models import IDS_OF, bert, gpt2

# transformers models: padding, sequences, generation


def language_model(modules: list[str], **more: Any) -> PeftModel:
    torch.manual_seed(0)

    def config() -> AttrSubspaceConfig:
        return AttrSubspaceConfig(
            basis="random", dim=4, target_modules=modules, init_weights=False, task_type=TaskType.CAUSAL_LM, **more
        )

    model = get_peft_model(gpt2(), config(), adapter_name="one")
    model.add_adapter("two", config())
    return model.eval()


def prompts() -> tuple[Tensor, Tensor]:
    """Four prompts of 6, 4, 3 and 6 tokens, padded on the left."""
    ids = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([6, 4, 3, 6])
    mask = (torch.arange(6) >= 6 - lengths[:, None]).long()
    return ids * mask, mask


WHO = ["one", "two", BASE, "two"]


@pytest.mark.parametrize(
    "modules", [["c_attn", "c_fc", "c_proj"], ["wte", "wpe", "c_fc"]], ids=["conv1d", "embeddings"]
)
def test_padded_sequences(modules):
    # Position ids are one row for the whole batch: each sample gets that row with its own adapter.
    model, (ids, mask) = language_model(modules), prompts()
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, adapter_names=WHO).logits
        for i, name in enumerate(WHO):
            row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            logits = alone(model, name, lambda row=row: model(**row).logits)[0]
            real = mask[i].bool()
            assert same(together[i][real], logits[real])


def test_a_wrong_count_is_seen_through_a_task_model():
    model, (ids, mask) = language_model(["c_attn"]), prompts()
    with pytest.raises(ValueError, match="2 and 4 respectively"):
        model(input_ids=ids, attention_mask=mask, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match="2 and 4 respectively"):
        model.generate(input_ids=ids, attention_mask=mask, adapter_names=["one", "two"])
    assert clean(model)
    positions = torch.arange(6)[None]
    assert model(input_ids=ids, position_ids=positions, adapter_names=WHO).logits.shape == (4, 6, 40)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate(more):
    model, (ids, mask) = language_model(["c_attn", "c_fc"]), prompts()
    more = {"max_new_tokens": 5, "do_sample": False, **more}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=WHO, **more)
    each = more.get("num_return_sequences", 1)
    rows = []
    for i, name in enumerate(WHO):
        row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
        rows.append(alone(model, name, lambda row=row: model.generate(**row, **more)))
    expected = torch.cat(rows)
    assert together.shape == (4 * each, 11) and torch.equal(together, expected)
    assert not torch.equal(expected, alone(model, BASE, lambda: model.generate(input_ids=ids, **more)))


def test_beams_of_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    ends = {"forced_eos_token_id": None, "decoder_start_token_id": 1}
    base = BartForConditionalGeneration(BartConfig(**sizes, **heads, **ends, **IDS_OF, init_std=0.3))
    more = {"target_modules": ["q_proj", "v_proj", "fc1"], "init_weights": False, "task_type": TaskType.SEQ_2_SEQ_LM}
    model = get_peft_model(base, AttrSubspaceConfig(basis="random", dim=4, **more), adapter_name="one")
    model.add_adapter("two", AttrSubspaceConfig(basis="random", dim=4, **more))
    ids = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(2))
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    together = model.eval().generate(input_ids=ids, adapter_names=WHO, **options)
    each = [
        alone(model, w, lambda i=i: model.generate(input_ids=ids[i : i + 1], **options)) for i, w in enumerate(WHO)
    ]
    assert torch.equal(together, torch.cat(each))


def test_a_classifier_with_its_own_head():
    torch.manual_seed(0)
    more = {"target_modules": ["query", "value"], "init_weights": False, "task_type": TaskType.SEQ_CLS}
    model = get_peft_model(bert(), AttrSubspaceConfig(basis="random", dim=4, **more), adapter_name="one")
    model.add_adapter("two", AttrSubspaceConfig(basis="random", dim=4, **more))
    shake(model.eval())
    ids, mask = prompts()
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, adapter_names=WHO).logits
        for i, name in enumerate(WHO):
            row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            assert same(together[i : i + 1], alone(model, name, lambda row=row: model(**row).logits))


# VGGT: scenes of several frames


def adapted(model: VggtModel, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    config = AttrSubspaceConfig(basis="random", dim=3, init_weights=False, **more)
    model = get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", AttrSubspaceConfig(basis="random", dim=3, init_weights=False, **more))
    return model.eval()


def outputs(model: PeftModel, x: Tensor, **more: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model(x, **more)
    return {name: found[name] for name in ("pose_enc", "depth", "depth_conf", "world_points")}


@pytest.mark.parametrize("chunk", [0, 4])
def test_scenes_of_several_frames(chunk):
    # Blocks see frames, scenes or the camera tokens of scenes; the dense heads see chunks of frames.
    model = adapted(
        tiny(depth=2, encoder_depth=1, dpt_frames_chunk=chunk),
        target_modules=["qkv", "proj", "fc1", "fc2", "output_conv1"],
        lora_modules=["projects.1", "resConfUnit1.conv1"],
        lora_rank=2,
    )
    x, names = images(3, 28, 28, scenes=3), ["two", BASE, "one"]
    together = outputs(model, x, adapter_names=names)
    for i, name in enumerate(names):
        for key, value in alone(model, name, lambda i=i: outputs(model, x[i : i + 1])).items():
            assert same(together[key][i : i + 1], value, 2e-4), (key, name)
    swapped = outputs(model, x, adapter_names=["one", BASE, "two"])
    assert not same(swapped["depth"][0], together["depth"][0], 1e-2)


@pytest.mark.parametrize(("scenes", "frames", "chunk"), [(2, 3, 4), (3, 2, 2), (2, 5, 5), (1, 3, 2)])
def test_chunks_over_scenes_are_scene_by_scene(scenes, frames, chunk):
    torch.manual_seed(0)
    config = tiny_config(dpt_frames_chunk=chunk)
    head, dim = DptHead(config, 2, "exp").eval(), 2 * config.embed_dim
    levels = [torch.randn(scenes, frames, head.special_tokens + 6, dim) for _ in range(4)]
    size = (2 * config.patch_size, 3 * config.patch_size)
    seen: list[int] = []
    head.scratch.output_conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        found = head(levels, size)
        assert sum(seen) == scenes * frames and all(rows % scenes == 0 for rows in seen)
        assert not chunk or max(seen) <= max(chunk, scenes)
        each = [head([level[i : i + 1] for level in levels], size) for i in range(scenes)]
    for got, want in zip(found, zip(*each, strict=True), strict=True):
        assert same(got, torch.cat(want))
