"""Running the model: dtypes, attention backends, checkpointing, a frozen encoder, compilation, refused inputs."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_attrsub.vggt import VggtModel

from .small import fill, images, relative, tiny, tiny_config

OUTPUTS = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
PARTS = {
    "encoder": "aggregator.patch_embed.blocks",
    "frame": "aggregator.frame_blocks",
    "global": "aggregator.global_blocks",
    "camera": "camera_head.trunk",
}


def predict(model, x):
    with torch.no_grad():
        return model(x)


def loss(output):
    """Every output and every iteration pulls on it."""
    return sum(output[name].square().mean() for name in OUTPUTS) + sum(pose.mean() for pose in output.pose_enc_list)


def checkpointing(model, **options):
    """transformers 5.2x renames this call and says so in a FutureWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(**options)
    return model


def gradients(model, x):
    model.zero_grad()
    loss(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def block_runs(model, call):
    """How often the blocks of each part ran during `call`, recomputation included."""
    runs: Counter[str] = Counter()
    hooks = [
        # A block's forward is called again by its checkpoint, past the block's own hooks: count its first norm.
        block.norm1.register_forward_hook(lambda *_, part=part: runs.update([part]))
        for part, path in PARTS.items()
        for block in model.get_submodule(path)
    ]
    call()
    for hook in hooks:
        hook.remove()
    return dict(runs)


ONCE = {"encoder": 2, "frame": 4, "global": 4, "camera": 4 * 1}


# Numbers


@pytest.mark.parametrize("scenes", [1, 2])
def test_sdpa_equals_eager(scenes):
    model, x = tiny(), images(2, scenes=scenes)
    assert model.config._attn_implementation == "sdpa"
    expected = predict(model, x)
    model.set_attn_implementation("eager")
    found = predict(model, x)
    for name in OUTPUTS:
        assert relative(found[name], expected[name]) < 1e-4, name


def test_an_attention_function_of_ones_own(monkeypatch):
    calls = []

    def mine(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        calls.append((tuple(query.shape), scaling, attention_mask, dropout))
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    model, x = tiny(), images(2)
    expected = predict(model, x)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "mine", mine)
    model.set_attn_implementation("mine")
    found = predict(model, x)
    n = 5 + 12
    encoder, frame = [((2, 2, n, 16), 0.25, None, 0.0)] * 2, ((2, 2, n, 16), 0.25, None, 0.0)
    over, camera = ((1, 2, 2 * n, 16), 0.25, None, 0.0), [((1, 4, 2, 16), 0.25, None, 0.0)] * 4
    assert calls == [*encoder, *([frame, over] * 4), *camera]
    assert relative(found.depth, expected.depth) < 1e-4


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attn_implementation"):
        tiny().set_attn_implementation("telepathy")


def test_train_and_eval_agree():
    model, x = tiny(), images(3)
    expected, found = predict(model, x), predict(model.train(), x)
    for name in OUTPUTS:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("training", [False, True])
def test_heads_stay_in_float32_under_autocast(training):
    model, x = tiny().train(training), images(3)
    expected = predict(model, x)
    kinds = {}
    watched = {
        "aggregator.frame_blocks.1.attn.qkv": torch.bfloat16,
        "aggregator.global_blocks.3": torch.float32,  # the residual stream
        "camera_head.embed_pose": torch.float32,
        "camera_head.trunk.0.attn.qkv": torch.float32,
        "depth_head.projects.2": torch.float32,
        "point_head.scratch.output_conv2.2": torch.float32,
    }
    for name in watched:
        model.get_submodule(name).register_forward_hook(lambda _, a, out, name=name: kinds.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x) if training else predict(model, x)
    assert kinds == watched
    for name in OUTPUTS:
        assert found[name].dtype == torch.float32
        assert relative(found[name].detach(), expected[name]) < 0.05, name
    if training:
        loss(found).backward()
        assert all(
            p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
        )


def test_float32_heads_on_a_half_precision_aggregator():
    model, x = tiny(), images(3)
    expected = predict(model, x)
    model.aggregator.to(torch.bfloat16)
    found = predict(model, x)
    for name in OUTPUTS:
        assert found[name].dtype == torch.float32
        assert relative(found[name], expected[name]) < 0.1, name
    tokens = model.aggregator(x, {3})[3]
    assert tokens.dtype == torch.bfloat16


def test_outputs_come_in_the_order_of_the_fields():
    """By index too, as everywhere in transformers: the loss first where there is one, then the cameras."""
    model, x = tiny(), images(2)
    plain = predict(model, x)
    assert list(plain) == ["pose_enc", "pose_enc_list", *OUTPUTS[1:]]
    assert plain[0] is plain.pose_enc
    camera = torch.tensor([[40.0, 0, 28], [0, 40, 21], [0, 0, 1]])
    truth = {
        "depths": torch.rand(1, 2, 42, 56) + 1,
        "extrinsics": torch.eye(3, 4).repeat(1, 2, 1, 1),
        "intrinsics": camera.repeat(1, 2, 1, 1),
    }
    with_loss = model(x, **truth)
    assert with_loss[0] is with_loss.loss and with_loss.loss.requires_grad
    assert list(with_loss)[: len(plain) + 1] == ["loss", *plain]


# Checkpointing


@pytest.mark.parametrize("parts", [None, ["global"], ["encoder", "frame", "global", "camera"], ["frame", "camera"]])
def test_checkpointing_gives_the_same_gradients(parts):
    model, x = tiny().train(), images(2)
    expected = gradients(model, x)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    checkpointing(model)
    if parts is not None:
        model.checkpoint_blocks(parts)
    found = gradients(model, x)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("before", [True, False], ids=["chosen-then-enabled", "enabled-then-chosen"])
@pytest.mark.parametrize("parts", [["global"], ["encoder", "camera"], ["frame", "global"]], ids="-".join)
def test_only_the_chosen_blocks_are_recomputed(parts, before):
    model, x = tiny().train(), images(2)
    assert block_runs(model, lambda: loss(model(x)).backward()) == ONCE
    for step in [0, 1] if before else [1, 0]:
        if step == 0:
            model.checkpoint_blocks(parts)
        else:
            checkpointing(model)
    expected = {part: count * (2 if part in parts else 1) for part, count in ONCE.items()}
    assert block_runs(model, lambda: loss(model(x)).backward()) == expected


def test_all_blocks_are_recomputed_unless_told_otherwise():
    model, x = checkpointing(tiny()).train(), images(2)
    twice = {part: 2 * count for part, count in ONCE.items()}
    assert block_runs(model, lambda: loss(model(x)).backward()) == twice
    assert block_runs(model, lambda: predict(model.eval(), x)) == ONCE


def test_choosing_blocks_does_not_switch_checkpointing_on():
    model, x = tiny().train(), images(2)
    model.checkpoint_blocks(["global"])
    assert block_runs(model, lambda: loss(model(x)).backward()) == ONCE


def test_the_choice_can_be_changed():
    model, x = checkpointing(tiny()).train(), images(2)
    model.checkpoint_blocks([])
    assert block_runs(model, lambda: loss(model(x)).backward()) == ONCE
    model.checkpoint_blocks(["global"])
    assert block_runs(model, lambda: loss(model(x)).backward()) == {**ONCE, "global": 8}


def test_choosing_blocks_says_nothing():
    model = checkpointing(tiny())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.checkpoint_blocks(["global"])


def test_an_unknown_part_is_a_sentence():
    with pytest.raises(ValueError, match=r"'decoder' is no part with blocks.*encoder, frame, global, camera"):
        tiny().checkpoint_blocks(["global", "decoder"])


def test_a_model_without_a_camera_head_has_no_camera_blocks():
    model = fill(VggtModel(tiny_config(heads=("depth",)))).train()
    checkpointing(model).checkpoint_blocks(["camera", "global"])
    model(images(2)).depth.mean().backward()
    assert model.aggregator.frame_blocks[0].attn.qkv.weight.grad.any()


# A frozen encoder


def saved_inside(model, path, call):
    """How many tensors autograd keeps for the backward pass of one submodule."""
    packed, at = [0], []
    module = model.get_submodule(path)
    hooks = [
        module.register_forward_pre_hook(lambda *_: at.append(packed[0])),
        module.register_forward_hook(lambda *_: at.append(packed[0])),
    ]

    def pack(tensor):
        packed[0] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for hook in hooks:
        hook.remove()
    return at[1] - at[0], packed[0]


@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_encoder_keeps_nothing(recompute, of_images):
    """Not even for images that ask for a gradient, as those of an adapter's input hooks do."""
    model, x = tiny().train(), images(2).requires_grad_(of_images)
    if recompute:
        checkpointing(model)
    inside, everywhere = saved_inside(model, "aggregator.patch_embed", lambda: model(x))
    assert inside > 0
    model.freeze_encoder()
    frozen, rest = saved_inside(model, "aggregator.patch_embed", lambda: model(x))
    assert frozen == 0 and 0 < rest <= everywhere - inside
    runs = block_runs(model, lambda: loss(model(x)).backward())
    assert runs["encoder"] == 2, "nothing is recomputed either"
    assert runs["global"] == (8 if recompute else 4)


def test_a_frozen_encoder_stays_frozen_and_in_eval_mode():
    model, x = tiny().train(), images(2)
    expected = gradients(model, x)
    model.freeze_encoder()
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for m in model.aggregator.patch_embed.modules())
        assert not any(p.requires_grad for p in model.aggregator.patch_embed.parameters())
        assert model.aggregator.training is model.camera_head.training is mode
    found = gradients(model, x)
    assert not any(name.startswith("aggregator.patch_embed") for name in found)
    rest = {name for name in expected if not name.startswith("aggregator.patch_embed")}
    assert found.keys() == rest
    for name in rest:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


# Compilation


@pytest.mark.parametrize("training", [False, True], ids=["eval", "checkpointed"])
@pytest.mark.parametrize("path", [f"{path}.0" for path in PARTS.values()])
def test_a_block_is_one_graph(path, training):
    torch.compiler.reset()
    model, x = tiny(), images(2)
    if training:
        checkpointing(model.train())
    expected = predict(model, x)
    model.get_submodule(path).compile(fullgraph=True, backend="aot_eager")
    found = predict(model, x)
    for name in OUTPUTS:
        assert relative(found[name], expected[name]) < 1e-5
    if training:
        plain = gradients(tiny().train(), x)
        for name, gradient in gradients(model, x).items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_whole_model_is_one_graph_for_inductor():
    torch.compiler.reset()
    model, x = tiny(), images(2)
    compiled = torch.compile(model, fullgraph=True)
    expected, found = predict(model, x), predict(compiled, x)
    for name in OUTPUTS:
        assert relative(found[name], expected[name]) < 1e-4


# Refused inputs


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 2, 3, 40, 56), r"40 x 56.*patches of 14.*multiples of 14"),
        ((1, 2, 3, 42, 55), r"42 x 55"),
        ((1, 2, 3, 0, 56), r"0 x 56"),
        ((1, 2, 4, 42, 56), r"\(1, 2, 4, 42, 56\).*\(scenes, views, 3, H, W\)"),
        ((2, 42, 56, 3), r"\(2, 42, 56, 3\)|\(1, 2, 42, 56, 3\)"),
        ((3, 42, 56), r"\(3, 42, 56\)"),
        ((1, 1, 2, 3, 42, 56), r"\(1, 1, 2, 3, 42, 56\)"),
        ((1, 0, 3, 42, 56), r"\(1, 0, 3, 42, 56\)"),
        ((0, 2, 3, 42, 56), r"\(0, 2, 3, 42, 56\)"),
    ],
    ids=str,
)
def test_images_of_a_wrong_shape(shape, said):
    with pytest.raises(ValueError, match=said):
        tiny(heads=("camera",))(torch.rand(shape))


def test_whole_numbers_are_refused():
    """Divided by a standard deviation of 0.2 cut to 0, they would give NaN."""
    with pytest.raises(ValueError, match="uint8"):
        tiny(heads=("camera",))((255 * images(2)).to(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed_dim": 33}, "33"),
        ({"num_heads": 16}, "multiple of 4"),
        ({"camera_num_heads": 5}, "5 attention heads"),
        ({"heads": ("camera", "track")}, "'track'"),
        ({"dpt_channels": (8, 8, 8)}, "four"),
        ({"dpt_layers": (0, 1, 2, 4)}, r"\[0, 1, 2, 4\].*depth=4"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(**changes)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match=r"'vggt-2b'.*vggt-1b.*vggt-mini"):
        tiny_config().preset("vggt-2b")
