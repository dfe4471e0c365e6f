"""The traps of VGGT, each against a slow reference or a wrong reading that must differ."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from peft_attrsub.vggt.blocks import rope_tables, rotate
from peft_attrsub.vggt.dpt_head import add_positions

from .reference import camera_head, dense_head, positions_2d, rotated
from .small import images, relative, tiny

DENSE = ("depth", "depth_conf", "world_points", "world_points_conf")


def seen(model, module, call, output=False):
    """What goes into a module (or comes out of it) while `call` runs the model: one entry per forward."""
    found = []
    if output:
        hook = model.get_submodule(module).register_forward_hook(lambda _, args, out: found.append(out))
    else:
        hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args))
    with torch.no_grad():
        call()
    hook.remove()
    return found


def predict(model, x):
    with torch.no_grad():
        return model(x)


# Frames


def test_the_first_frame_has_tokens_of_its_own():
    model, x = tiny(), images(3)
    frames = seen(model, "aggregator.frame_blocks.0", lambda: model(x))[0][0]
    camera, register = model.aggregator.camera_token[0], model.aggregator.register_token[0]
    assert frames.shape == (3, 5 + 3 * 4, 32)
    for i in range(3):
        slot = min(i, 1)
        torch.testing.assert_close(frames[i, :5], torch.cat([camera[slot], register[slot]]), rtol=0, atol=0)


def test_frames_after_the_first_may_change_places():
    model, x = tiny(), images(4)
    order = [0, 3, 1, 2]
    straight, permuted = predict(model, x), predict(model, x[:, order])
    for name in ("pose_enc", *DENSE):
        assert relative(permuted[name], straight[name][:, order]) < 1e-4, name
    swapped = predict(model, x[:, [1, 0, 2, 3]])
    assert relative(swapped.pose_enc, straight.pose_enc[:, [1, 0, 2, 3]]) > 0.05, "the first frame is the world's"


def test_scenes_of_a_batch_know_nothing_of_each_other():
    model, x = tiny(), images(3, scenes=2)
    both = predict(model, x)
    for i in range(2):
        alone = predict(model, x[i : i + 1])
        for name in ("pose_enc", *DENSE):
            assert relative(both[name][i : i + 1], alone[name]) < 1e-4, name


def test_a_single_view_is_a_scene():
    output = predict(tiny(), images(1))
    assert output.pose_enc.shape == (1, 1, 9)
    assert output.depth.shape == (1, 1, 42, 56, 1)


def test_views_without_a_scene_axis_are_one_scene():
    model, x = tiny(), images(2)
    one, same = predict(model, x[0]), predict(model, x)
    for name in ("pose_enc", *DENSE):
        assert torch.equal(one[name], same[name])


# Rotary positions


@given(
    head=st.sampled_from([4, 8, 16, 64]),
    theta=st.sampled_from([100.0, 10.0]),
    row=st.integers(0, 80),
    column=st.integers(0, 80),
    seed=st.integers(0, 99),
)
def test_rotation_by_row_and_column(head, theta, row, column, seed):
    x = torch.randn(head, generator=torch.Generator().manual_seed(seed))
    tables = rope_tables(torch.tensor([[row, column]]), head, theta)
    found = rotate(x.view(1, 1, 1, head), tables).flatten()
    np.testing.assert_allclose(found.numpy(), rotated(x.double().numpy(), row, column, theta), atol=2e-5)


@given(shift=st.tuples(st.integers(0, 30), st.integers(0, 30)), seed=st.integers(0, 99))
def test_scores_depend_on_the_offset_only(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(at_q, at_k):
        tables = [rope_tables(torch.tensor([p]), 16, 100.0) for p in (at_q, at_k)]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    moved = [(r + shift[0], c + shift[1]) for r, c in ((3, 5), (7, 2))]
    assert score((3, 5), (7, 2)) == pytest.approx(score(*moved), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_are_float32_whatever_the_model(dtype):
    model = tiny(heads=("camera",))
    model.aggregator.to(dtype)
    for blocks in ("frame_blocks", "global_blocks"):
        args = seen(model, f"aggregator.{blocks}.0", lambda: model(images(2, 56, 70)))[0]
        cos, sin = args[1]
        assert args[0].dtype == dtype
        assert cos.dtype == sin.dtype == torch.float32
        at = positions_2d(4, 5, frames=2 if blocks == "global_blocks" else 1)
        for n, (row, column) in enumerate(at):
            turned = rotated(np.ones(16), row, column, 100.0)
            quarters = (cos - torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(4) * sin)[n]
            np.testing.assert_allclose(quarters.numpy(), turned, atol=1e-5, err_msg=f"token {n}")


def test_half_precision_rounds_values_and_not_angles():
    """At position 600 an angle rounded to bfloat16 would be off by up to two radians."""
    x = torch.randn(1, 1, 1, 16).bfloat16()
    found = rotate(x, rope_tables(torch.tensor([[601, 599]]), 16, 100.0))
    assert found.dtype == torch.bfloat16
    exact = torch.from_numpy(rotated(x.double().numpy().ravel(), 601, 599, 100.0))
    torch.testing.assert_close(found.double().flatten(), exact, rtol=2**-8, atol=2e-3)


def test_special_tokens_are_not_turned():
    model = tiny(heads=("camera",))
    cos, sin = seen(model, "aggregator.global_blocks.0", lambda: model(images(3)))[0][1]
    per_frame = 5 + 3 * 4
    assert cos.shape == (3 * per_frame, 16)
    for frame in range(3):
        special = slice(frame * per_frame, frame * per_frame + 5)
        assert cos[special].eq(1).all() and sin[special].eq(0).all()
        assert cos[frame * per_frame + 5].ne(1).all(), "the first patch stands at (1, 1)"


def test_the_encoder_and_the_camera_head_have_no_rotary_positions():
    model = tiny()
    for module in ("aggregator.patch_embed.blocks.0", "camera_head.trunk.0"):
        assert all(len(args) == 1 for args in seen(model, module, lambda: model(images(2))))
    with_norm = {n.partition(".attn")[0] for n, _ in model.named_parameters() if "q_norm" in n}
    assert with_norm == {f"aggregator.{b}_blocks.{i}" for b in ("frame", "global") for i in range(4)}


# Positions of the encoder


def test_the_position_embedding_is_interpolated_only_when_needed(monkeypatch):
    model = tiny(heads=("camera",))  # no DPT head: every interpolation is the encoder's
    calls = []
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *args, **more: calls.append(more) or interpolate(*args, **more))
    encoder = model.aggregator.patch_embed
    predict(model, images(2, 56, 56))
    assert calls == []
    assert encoder.positions(4, 4)[1].data_ptr() == encoder.pos_embed[:, 1:].data_ptr()
    predict(model, images(2, 42, 56))
    assert [(c["size"], c["antialias"], c["align_corners"]) for c in calls] == [((3, 4), True, False)]
    predict(model, images(2, 42, 42))
    assert calls[-1]["size"] == (3, 3), "square, but of another size"


@pytest.mark.parametrize("size", [(3, 4), (2, 2), (6, 5), (9, 3)])
def test_interpolation_is_antialiased_bicubic(size):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra [vggt])")
    encoder = tiny().aggregator.patch_embed
    special, found = encoder.positions(*size)
    assert torch.equal(special, encoder.pos_embed[:, :1])
    for channel in range(0, 32, 7):
        square = encoder.pos_embed.detach()[0, 1:, channel].reshape(4, 4).numpy()
        expected = np.asarray(image.fromarray(square).resize(size[::-1], image.Resampling.BICUBIC))
        np.testing.assert_allclose(found.detach()[0, :, channel].reshape(size).numpy(), expected, atol=1e-5)


def test_interpolation_is_done_in_float32():
    encoder = tiny().aggregator.patch_embed
    exact = encoder.positions(3, 4)[1]
    encoder.pos_embed.data = encoder.pos_embed.data.bfloat16().float()
    rounded = encoder.positions(3, 4)[1]
    encoder.pos_embed.data = encoder.pos_embed.data.bfloat16()
    found = encoder.positions(3, 4)[1]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rounded.bfloat16()) and not torch.equal(exact, rounded)


def test_registers_have_no_position_and_are_dropped():
    model, x = tiny(heads=("camera",)), images(2, 56, 56)
    encoder = model.aggregator.patch_embed
    tokens = seen(model, "aggregator.patch_embed.blocks.0", lambda: model(x))[0][0]
    assert tokens.shape == (2, 1 + 4 + 16, 32)
    assert torch.equal(tokens[0, 0], (encoder.cls_token + encoder.pos_embed[:, :1])[0, 0])
    assert torch.equal(tokens[1, 1:5], encoder.register_tokens[0])
    last = seen(model, "aggregator.patch_embed.blocks.1", lambda: model(x), output=True)[0]
    out = seen(model, "aggregator.patch_embed", lambda: model(x), output=True)[0]
    torch.testing.assert_close(out, F.layer_norm(last, (32,), encoder.norm.weight, encoder.norm.bias, 1e-6)[:, 5:])


def test_images_are_normalised_inside():
    model, x = tiny(heads=("camera",)), images(2)
    patches = seen(model, "aggregator.patch_embed.patch_embed", lambda: model(x))[0][0]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (x[0].numpy() - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(patches.numpy(), expected, atol=1e-5)


# What is kept


def test_only_layers_that_heads_read_are_kept():
    model = tiny(depth=8)
    assert model.config.dpt_layers == [1, 3, 5, 7]
    born = []
    for name, module in model.aggregator.named_modules():
        if type(module).__name__ == "Block" and "patch_embed" not in name:
            module.register_forward_hook(lambda _, args, out: born.append(weakref.ref(out)))
    alive = []

    def count(_, args):
        gc.collect()
        alive.append(sum(ref() is not None for ref in born))
        assert len(args[0]) == 4

    model.depth_head.register_forward_pre_hook(count)
    predict(model, images(2))
    assert len(born) == 16
    assert alive == [0], "of block outputs only copies, side by side, are kept"


@pytest.mark.parametrize(
    ("heads", "kept"), [(("camera",), [7]), (("camera", "depth"), [1, 3, 5, 7]), (("depth", "point"), [1, 3, 5, 7])]
)
def test_the_aggregator_is_asked_for_few_layers(heads, kept, monkeypatch):
    model = tiny(depth=8, heads=heads)
    asked = []
    forward = model.aggregator.forward
    monkeypatch.setattr(
        model.aggregator, "forward", lambda x, layers: asked.append(sorted(layers)) or forward(x, layers)
    )
    predict(model, images(2))
    assert asked == [kept]
    with torch.no_grad():
        assert sorted(forward(images(2), {1, 4})) == [1, 4]


def test_no_block_runs_beyond_the_last_layer_asked_for():
    model = tiny(depth=8)
    ran = seen(model, "aggregator.global_blocks.1", lambda: model.aggregator(images(2), {0, 1}))
    beyond = seen(model, "aggregator.frame_blocks.2", lambda: model.aggregator(images(2), {0, 1}))
    assert len(ran) == 1 and beyond == []


def test_a_layer_is_its_frame_and_its_global_output():
    model, x = tiny(), images(2)
    frames = seen(model, "aggregator.frame_blocks.2", lambda: model(x), output=True)[0]
    globals_ = seen(model, "aggregator.global_blocks.2", lambda: model(x), output=True)[0]
    with torch.no_grad():
        kept = model.aggregator(x, {2})[2]
    torch.testing.assert_close(kept[..., :32].flatten(0, 1), frames, rtol=0, atol=0)
    torch.testing.assert_close(kept[..., 32:].flatten(1, 2), globals_, rtol=0, atol=0)


# Camera head


def camera_tokens(seed=3):
    return torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(seed))


def test_the_camera_head_step_by_step():
    head, t = tiny().camera_head, camera_tokens()
    with torch.no_grad():
        found, expected = head(t), camera_head(head, t)
    assert len(found) == 4
    for iteration, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert relative(one, other) < 1e-5, f"iteration {iteration}"


def test_the_raw_encoding_is_fed_back():
    head, t = tiny().camera_head, camera_tokens()
    with torch.no_grad():
        raws = camera_head(head, t, activate=False)
        assert any((raw[..., 7:] < 0).any() for raw in raws[:-1]), "else both readings agree"
        wrong = camera_head(head, t, feed_back_activated=True)
        found = head(t)
    assert relative(found[-1], wrong[-1]) > 1e-3


def test_fields_of_view_are_clipped_and_quaternions_left_alone():
    head, t = tiny().camera_head, camera_tokens()
    with torch.no_grad():
        found, raw = torch.stack(head(t)), torch.stack(camera_head(head, t, activate=False))
    assert found[..., 7:].min() == 0
    torch.testing.assert_close(found[..., :7], raw[..., :7], rtol=1e-4, atol=1e-5)
    lengths = found[..., 3:7].norm(dim=-1)
    assert lengths.min() < 0.9 or lengths.max() > 1.1
    assert (found[..., 6] < 0).any(), "nor is the sign of w fixed"


def test_the_pose_is_not_differentiated_through_the_iterations():
    head, t = tiny().camera_head, camera_tokens()
    for iteration in range(4):
        head.zero_grad()
        head(t)[iteration].square().sum().backward()
        gradient = head.empty_pose_tokens.grad
        assert (gradient is not None and bool(gradient.any())) is (iteration == 0)
        assert head.embed_pose.weight.grad.any()


def test_no_gradient_for_the_empty_pose_from_the_last_iteration():
    model = tiny()
    model(images(2)).pose_enc.square().sum().backward()
    gradient = model.camera_head.empty_pose_tokens.grad
    assert gradient is None or not gradient.any()
    assert model.camera_head.embed_pose.weight.grad.any()


# Dense heads


@pytest.mark.parametrize("size", [(42, 56), (56, 42), (70, 14), (56, 56)], ids=str)
@pytest.mark.parametrize("name", ["depth_head", "point_head"])
def test_the_dense_head_step_by_step(name, size):
    head = getattr(tiny(), name)
    n = 5 + size[0] * size[1] // 14**2
    levels = [torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        value, confidence = head(levels, size)
        expected = dense_head(head, [level[0, :, 5:] for level in levels], size)  # [F, outputs, H, W]
    y, c = expected[:, :-1].permute(0, 2, 3, 1), expected[:, -1]
    wanted = y.exp() if name == "depth_head" else y.sign() * (y.abs().exp() - 1)
    assert relative(value[0], wanted) < 1e-4
    assert relative(confidence[0], 1 + c.exp()) < 1e-4


def test_the_skip_path_carries_relu():
    unit = tiny().depth_head.scratch.refinenet2.resConfUnit1
    x = torch.randn(1, 16, 5, 6)
    with torch.no_grad():
        mixed = F.conv2d(F.relu(x), unit.conv1.weight, unit.conv1.bias, padding=1)
        mixed = F.conv2d(F.relu(mixed), unit.conv2.weight, unit.conv2.bias, padding=1)
        kept = x.clone()
        torch.testing.assert_close(unit(x), F.relu(x) + mixed)
        assert relative(unit(x), x + mixed) > 0.1
    assert torch.equal(x, kept), "and nothing is done in place"


def test_mixing_before_upsampling_is_the_same():
    fusion = tiny().depth_head.scratch.refinenet4
    x = torch.randn(2, 16, 4, 5)
    with torch.no_grad():
        upsampled = F.interpolate(fusion.resConfUnit2(x), size=(7, 10), mode="bilinear", align_corners=True)
        assert relative(fusion(x, None, (7, 10)), fusion.out_conv(upsampled)) < 1e-6


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 0])
def test_chunks_of_frames_change_nothing(chunk):
    whole, part, x = tiny(), tiny(dpt_frames_chunk=chunk), images(5)
    sizes = [args[0].shape[0] for args in seen(part, "depth_head.scratch.output_conv1", lambda: part(x))]
    assert sum(sizes) == 5 and max(sizes) <= (chunk or 5)
    expected, found = predict(whole, x), predict(part, x)
    for name in DENSE:
        assert relative(found[name], expected[name]) < 1e-5


def test_activations():
    model, x = tiny(), images(2)
    raw = seen(model, "depth_head.scratch.output_conv2", lambda: model(x), output=True)[0]
    points = seen(model, "point_head.scratch.output_conv2", lambda: model(x), output=True)[0]
    output = predict(model, x)
    torch.testing.assert_close(output.depth[0, ..., 0], raw[:, 0].exp())
    torch.testing.assert_close(output.depth_conf[0], 1 + raw[:, 1].exp())
    y = points[:, :3].movedim(1, -1)
    torch.testing.assert_close(output.world_points[0], y.sign() * y.abs().expm1())
    torch.testing.assert_close(output.world_points_conf[0], 1 + points[:, 3].exp())
    assert output.depth.min() > 0 and output.depth_conf.min() > 1 and output.world_points_conf.min() > 1
    assert output.world_points.min() < 0 < output.world_points.max()


@given(c=st.sampled_from([4, 8, 12, 32]), h=st.integers(1, 6), w=st.integers(1, 6), aspect=st.floats(0.3, 3.0))
def test_positions_added_to_a_map(c, h, w, aspect):
    found = add_positions(torch.zeros(1, c, h, w), aspect)[0]
    diagonal = math.sqrt(aspect**2 + 1)
    for row in range(h):
        for column in range(w):
            # an axis of n pixels runs over +-span (n-1)/n; a single pixel stands at its middle
            u = aspect / diagonal * (2 * column - (w - 1)) / w
            v = 1 / diagonal * (2 * row - (h - 1)) / h
            expected = []
            for p in (u, v):
                waves = [p * 100 ** (-j / (c / 4)) for j in range(c // 4)]
                expected += [math.sin(a) for a in waves] + [math.cos(a) for a in waves]
            np.testing.assert_allclose(found[:, row, column].numpy(), 0.1 * np.array(expected), atol=1e-6)
