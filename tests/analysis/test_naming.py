"""Depth, stack and kind from module names alone."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_attrsub.analysis import Place, place


def kinds(names):
    return {name: (one.depth, one.kind) for name, one in place(names).items()}


def test_vggt():
    names = [
        f"aggregator.{stack}_blocks.{i}.{tail}"
        for stack in ("frame", "global")
        for i in range(24)
        for tail in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    found = place(names)
    assert list(found) == names, "in the order given"
    assert found["aggregator.frame_blocks.7.attn.qkv"] == Place(7, "aggregator.frame_blocks", "frame qkv")
    assert found["aggregator.global_blocks.23.mlp.fc2"] == Place(23, "aggregator.global_blocks", "global fc2")
    assert Counter(one.kind for one in found.values()) == {
        f"{stack} {tail}": 24 for stack in ("frame", "global") for tail in ("qkv", "proj", "fc1", "fc2")
    }


def test_vggt_of_one_stack_needs_no_prefix():
    found = place([f"aggregator.frame_blocks.{i}.attn.qkv" for i in range(3)])
    assert {one.kind for one in found.values()} == {"qkv"}


def test_llama():
    tails = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{tail}" for i in range(2) for tail in tails]
    assert kinds([*names, "lm_head"]) == {
        **{name: (int(name.split(".")[2]), name.rpartition(".")[2]) for name in names},
        "lm_head": (None, "lm_head"),
    }
    assert place(names)["model.layers.1.mlp.down_proj"].stack == "model.layers"


def test_gpt2_has_two_c_proj():
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    for stack in ("h", "transformer.h"):
        assert list(kinds([f"{stack}.0.{name}" for name in names]).values()) == [(0, kind) for kind in expected]


def test_bert_has_three_dense():
    tails = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    names = [f"bert.encoder.layer.{i}.{tail}" for i in (0, 11) for tail in tails]
    expected = ["query", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert list(kinds(names).values()) == [(i, kind) for i in (0, 11) for kind in expected]


def test_t5_tells_encoder_from_decoder():
    names = {
        "encoder.block.0.layer.0.SelfAttention.q": (0, "encoder SelfAttention.q"),
        "encoder.block.1.layer.1.DenseReluDense.wi": (1, "encoder wi"),
        "decoder.block.0.layer.0.SelfAttention.q": (0, "decoder SelfAttention.q"),
        "decoder.block.0.layer.1.EncDecAttention.q": (0, "EncDecAttention.q"),
        "decoder.block.1.layer.2.DenseReluDense.wi": (1, "decoder wi"),
    }
    found = kinds(names)
    assert found["encoder.block.1.layer.1.DenseReluDense.wi"] == (1, "encoder wi")
    assert found["decoder.block.1.layer.2.DenseReluDense.wi"] == (1, "decoder wi")
    assert [depth for depth, _ in found.values()] == [depth for depth, _ in names.values()]
    assert len(set(found.values())) == len(names)
    assert found["decoder.block.0.layer.1.EncDecAttention.q"][1].endswith("EncDecAttention.q")
    assert place(names)["decoder.block.0.layer.1.EncDecAttention.q"].stack == "decoder.block"


def test_sequential():
    assert kinds(["0", "2"]) == {"0": (0, "module"), "2": (2, "module")}
    assert place(["net.0", "net.2"])["net.2"] == Place(2, "net", "net")


def test_experts_keep_their_number():
    names = [f"model.layers.3.block_sparse_moe.experts.{i}.{w}" for i in range(8) for w in ("w1", "w2")]
    found = place(names)
    assert found["model.layers.3.block_sparse_moe.experts.5.w2"] == Place(3, "model.layers", "experts.5.w2")
    assert {one.depth for one in found.values()} == {3}, "the first number is the layer, not the expert"


def test_modules_without_a_number():
    assert place(["embed", "vision.proj", "text.proj"]) == {
        "embed": Place(None, "", "embed"),
        "vision.proj": Place(None, "vision", "vision proj"),
        "text.proj": Place(None, "text", "text proj"),
    }


def test_a_number_inside_a_word_is_no_depth():
    assert place(["fc1", "stage2.conv3"]) == {
        "fc1": Place(None, "", "fc1"),
        "stage2.conv3": Place(None, "stage2", "conv3"),
    }


def test_stacks_that_end_alike_keep_their_whole_name():
    found = place(["a.frame_blocks.0.fc", "b.frame_blocks.0.fc"])
    assert len({one.kind for one in found.values()}) == 2
    assert all(one.kind.endswith(" fc") and one.depth == 0 for one in found.values())


def test_no_modules():
    assert place([]) == {}


PARTS = st.sampled_from(["a", "b", "fc", "blocks", "layers", "frame_blocks", "b_blocks", "0", "1", "00", "7"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(st.lists(NAMES, max_size=12, unique=True))
@example(["a.0.fc", "b.0.fc", "0.a.fc", "fc"])
@example(["a.blocks.0.fc", "a.layers.0.fc"])
@example(["a.0.fc", "a.00.fc"])
def test_depth_and_kind_belong_to_one_module(names):
    found = place(names)
    assert list(found) == names
    assert len(kinds(names).values()) == len(set(kinds(names).values()))
    for name, one in found.items():
        assert one.kind
        numbers = [part for part in name.split(".") if part.isdecimal()]
        assert one.depth == (int(numbers[0]) if numbers else None)
        assert name == one.stack or name.startswith(f"{one.stack}.") or one.stack == ""


@given(st.lists(NAMES, min_size=1, max_size=8, unique=True), st.randoms())
def test_the_order_of_the_names_does_not_matter(names, random):
    shuffled = random.sample(names, len(names))
    assert place(shuffled) == place(names)


def test_a_superscript_is_no_number():
    """ "\u00b2".isdigit() is true, and yet int("\u00b2") fails: such a name is odd, but no reason to."""
    assert place(["x.\u00b2.fc"])["x.\u00b2.fc"].depth is None


@pytest.mark.parametrize("name", ["aggregator.frame_blocks.7.attn.qkv", "h.0.attn", "0.0.0"])
def test_a_place_is_fixed(name):
    """Places are keys: they hash, and cannot be changed under way."""
    one = place([name])[name]
    assert hash(one) == hash(place([name])[name])
    with pytest.raises(AttributeError):
        one.depth = 3
