"""Trainable parameters at the size of VGGT-1B, on the meta device: the numbers that the paper and its release print.

The paper (arXiv 2604.10095) prints rounded millions: 853.6 for full fine-tuning, 16.3 / 32.7 / 65.3 for LoRA of rank
16 / 32 / 64, and 3.8 / 4.0 / 4.7 / 7.6 / 19.3 for its own method at D = 16 / 32 / 64 / 128 / 256 (D = attributes * d).

The last row fits N D^2 + c with N = 237 and c = 3,753,280, the LoRA of rank 16 on both heads, and with no other whole
N by so simple a c. 237 is the number of adaptable matrices whose smaller side is 256 or more, but 45 of those are
in the heads, so the paper's numbers have head matrices with a core and a LoRA at once. Our tuner puts one or the
other on a module, as the authors' released code does (N = 192). Both readings are counted here: the paper's as the
sum of two models, and what one model of ours trains.
"""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.vggt import VggtConfig
from peft_attrsub.vggt.targets import vggt_targets

from .small import meta

HEADS_LORA = 3_753_280
FULL = 853_568_756
# D -> millions as printed
PAPER = {16: "3.8", 32: "4.0", 64: "4.7", 128: "7.6", 256: "19.3"}
#: Bases of 128 and more take half a minute to make, whatever the device of the model.
WIDTHS = [pytest.param(d, marks=pytest.mark.slow if d > 64 else ()) for d in PAPER]


def vggt(heads=("camera", "depth")):
    return meta(VggtConfig.preset("vggt-1b", heads=heads))


def trained(config) -> int:
    """Trainable parameters of VGGT-1B with this adapter."""
    return get_peft_model(vggt(), config).get_nb_trainable_parameters()[0]


def cores(targets, dim, **more) -> int:
    return trained(AttrSubspaceConfig(basis="random", dim=dim, target_modules=vggt_targets(targets), **more))


def millions(count) -> str:
    return f"{count / 1e6:.1f}"


def test_full_fine_tuning():
    model = vggt()
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("aggregator.patch_embed")) == FULL
    model.freeze_encoder()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == FULL
    assert millions(FULL) == "853.6"


@pytest.mark.parametrize(
    ("which", "modules", "per_rank"),
    [("aggregator", 192, 786_432), ("heads", 50, 145_426 + 89_154), ("lora", 242, 1_021_012)],
)
def test_lora_per_rank(which, modules, per_rank):
    config = LoraConfig(r=1, target_modules=vggt_targets(which))
    model = get_peft_model(vggt(), config)
    adapted = {n for n, _ in model.named_modules() if n.endswith(".lora_A.default")}
    assert len(adapted) == modules
    assert model.get_nb_trainable_parameters()[0] == per_rank


@pytest.mark.parametrize(
    ("rank", "count", "printed"), [(16, 16_336_192, "16.3"), (32, 32_672_384, "32.7"), (64, 65_344_768, "65.3")]
)
def test_lora_as_in_the_paper(rank, count, printed):
    assert trained(LoraConfig(r=rank, target_modules=vggt_targets("lora"))) == count
    assert millions(count) == printed


def test_lora_on_the_heads_alone_is_the_constant_of_the_papers_counts():
    assert trained(LoraConfig(r=16, target_modules=vggt_targets("heads"))) == HEADS_LORA
    assert trained(AttrSubspaceConfig(lora_modules=vggt_targets("heads"), lora_rank=16)) == HEADS_LORA


@pytest.mark.parametrize("dim", WIDTHS)
def test_cores_on_the_237_as_the_paper_prints_them(dim):
    """A core on each of the 237, plus LoRA of rank 16 on the heads: two models added up, see above."""
    count = cores("paper", dim)
    assert count == 237 * dim**2
    assert millions(count + HEADS_LORA) == PAPER[dim]


@pytest.mark.parametrize("dim", WIDTHS)
def test_cores_on_the_aggregator_and_lora_on_the_heads(dim):
    """One model, one kind of adapter a module. At D = 256 this is exactly the count of LoRA of rank 16."""
    count = cores("aggregator", dim, lora_modules=vggt_targets("heads"), lora_rank=16)
    assert count == 192 * dim**2 + HEADS_LORA
    if dim == 256:
        assert count == 16_336_192


def test_a_head_matrix_in_both_lists_gets_the_lora():
    """So of "paper" with LoRA on the heads, one model of ours trains what "aggregator" would."""
    count = cores("paper", 16, lora_modules=vggt_targets("heads"), lora_rank=16)
    assert count == 192 * 16**2 + HEADS_LORA


def test_cores_on_the_237_and_lora_on_the_other_five():
    """The reading without a double: the five matrices that are too small for a core get the LoRA."""
    small = sorted(set(vggt_targets("lora")) - set(vggt_targets("paper")))
    sides = [(9, 2048), (1024, 9), (256 * 9, 128), (128 * 9, 32), (32, 2)]
    count = cores("paper", 16, lora_modules=small, lora_rank=16)
    assert count == 237 * 16**2 + 16 * sum(n + m for n, m in sides)


def test_the_public_packages_other_heads_change_no_target():
    """With the point head built the sets are the same."""
    model = vggt(("camera", "depth", "point"))
    for which in ("aggregator", "heads", "lora", "paper"):
        assert vggt_targets(which, model) == vggt_targets(which)
