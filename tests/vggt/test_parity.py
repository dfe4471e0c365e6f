"""The model against known answers of the public VGGT: every case, every output, names and shapes of every tensor."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from peft_attrsub.vggt import VggtConfig, VggtModel

from .small import FIXTURES, fill, relative

ANSWERS = FIXTURES / "vggt_known_answers.safetensors"
CASES = {"rect": (1, 3, 3, 98, 140), "tall": (1, 2, 3, 140, 84), "nine": (1, 9, 3, 56, 70)}
LAYERS = (0, 1, 2, 3)
DENSE = ("depth", "depth_conf", "world_points", "world_points_conf")
# The known answers are good to about 2e-6; float32 of another machine may add to that.
TOLERANCE = 1e-4


def small_model() -> VggtModel:
    config = VggtConfig(
        embed_dim=384,
        depth=4,
        num_heads=6,
        encoder_depth=12,
        encoder_num_heads=6,
        heads=("camera", "depth", "point"),
        camera_depth=2,
        camera_num_heads=12,
        dpt_features=64,
        dpt_channels=(48, 96, 192, 192),
        dpt_layers=LAYERS,
    )
    return fill(VggtModel(config)).eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def answers():
    with safe_open(ANSWERS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


@pytest.fixture(scope="module")
def inputs():
    # one generator for all cases, in this order
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(*shape, generator=generator) for name, shape in CASES.items()}


@pytest.fixture(scope="module")
def outputs(model, inputs):
    """case -> (tokens by layer, output of the model)."""
    with torch.no_grad():
        return {name: (model.aggregator(x, LAYERS), model(x)) for name, x in inputs.items()}


every_case = pytest.mark.parametrize("case", CASES)


def test_the_sizes_are_those_of_the_answers(model):
    with safe_open(ANSWERS, "pt") as file:
        told = json.loads(file.metadata()["config"])
    config = model.config
    assert (config.image_size, config.patch_size) == (told["img_size"], told["patch_size"])
    assert (config.embed_dim, config.depth, config.num_heads) == (told["embed_dim"], told["depth"], told["num_heads"])
    assert (config.camera_num_heads, config.camera_depth) == (told["cam_heads"], told["trunk_depth"])
    assert (config.dpt_features, config.dpt_channels) == (told["features"], told["out_channels"])
    assert config.dpt_layers == told["idx"]


def test_every_answer_is_compared(answers):
    """An output added to the file and forgotten here would be no test."""
    parts = [*(f"tokens.{i}" for i in LAYERS), *(f"pose_enc.{k}" for k in range(4)), *DENSE, "images"]
    assert set(answers) == {f"{case}.{part}" for case in CASES for part in parts}


def test_names_and_shapes(model):
    lines = [line for line in (FIXTURES / "vggt_small_names.txt").read_text().splitlines() if line.strip()]
    expected = {name: json.loads(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


@every_case
def test_the_inputs_are_the_answers_inputs(inputs, answers, case):
    torch.testing.assert_close(inputs[case][..., ::7, ::7], answers[f"{case}.images"], rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("layer", LAYERS)
def test_tokens(outputs, answers, case, layer):
    tokens = outputs[case][0][layer][:, :, :8, ::16]
    assert relative(tokens, answers[f"{case}.tokens.{layer}"]) < TOLERANCE


@every_case
@pytest.mark.parametrize("iteration", range(4))
def test_pose_encodings(outputs, answers, case, iteration):
    output = outputs[case][1]
    assert len(output.pose_enc_list) == 4
    assert torch.equal(output.pose_enc, output.pose_enc_list[-1])
    assert relative(output.pose_enc_list[iteration], answers[f"{case}.pose_enc.{iteration}"]) < TOLERANCE


@every_case
@pytest.mark.parametrize("name", DENSE)
def test_dense_outputs(outputs, answers, case, name):
    found = outputs[case][1][name]
    if name == "depth":
        found = found[..., 0]
    assert relative(found[:, :, ::3, ::3], answers[f"{case}.{name}"]) < TOLERANCE


@every_case
def test_eager_attention_gives_the_answers_too(model, inputs, answers, case):
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = model(inputs[case])
    finally:
        model.set_attn_implementation("sdpa")
    assert relative(output.pose_enc, answers[f"{case}.pose_enc.3"]) < TOLERANCE
    assert relative(output.depth[..., 0][:, :, ::3, ::3], answers[f"{case}.depth"]) < TOLERANCE


def test_the_answers_tell_wrong_from_right(model, inputs, answers):
    """The tolerance is tight enough: one bias off by a hundredth of its size is seen."""
    bias = model.depth_head.scratch.output_conv2[2].bias
    was = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[0] += 1e-3
            found = model(inputs["tall"]).depth[..., 0][:, :, ::3, ::3]
    finally:
        bias.data = was
    assert relative(found, answers["tall.depth"]) > TOLERANCE
