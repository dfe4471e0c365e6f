"""Which matrices of a VGGT are adapted: the sets that the published parameter counts point to, as module names."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from .configuration_vggt import VggtConfig
from .modeling_vggt import VggtModel

TARGETS = ("aggregator", "paper", "lora", "heads")
#: The largest core of the paper's tables; "paper" leaves out matrices too small for it.
LARGEST_CORE = 256

_AGGREGATOR = ("aggregator.frame_blocks.", "aggregator.global_blocks.")
_HEADS = ("camera_head.", "depth_head.")


def vggt_targets(which: str, model: nn.Module | VggtConfig | None = None, *, min_side: int | None = None) -> list[str]:
    """Exact module names of one set of VGGT's matrices, in the model's order, for PEFT's `target_modules`.

        get_peft_model(vggt, LoraConfig(target_modules=vggt_targets("lora")))
        AttrSubspaceConfig(basis, target_modules=vggt_targets("aggregator"), lora_modules=vggt_targets("heads"))

    | which      | VGGT-1B | what                                                                             |
    |------------|---------|----------------------------------------------------------------------------------|
    | aggregator | 192     | qkv, proj, fc1, fc2 of every frame and global block                              |
    | heads      | 50      | the 20 Linear of the camera head and the 30 Conv2d of the depth head             |
    | lora       | 242     | both: every Linear and Conv2d but those of the encoder, point and track head     |
    | paper      | 237     | those of "lora" that can hold a core of 256: all but the five named below        |

    The encoder stays frozen, and ConvTranspose2d can carry neither LoRA nor core. "lora" is the one set for which
    LoRA of rank 16, 32, 64 has the 16.3, 32.7, 65.3 M parameters of the paper (arXiv 2604.10095). "paper" is
    inferred: 3.8 to 19.3 M at D = 16 to 256 fit 237 D^2 + 3,753,280 (LoRA of rank 16 on the heads), and 237 is 242
    less the five matrices with a side below 256: camera_head.embed_pose and pose_branch.fc2, depth_head's
    scratch.output_conv1, output_conv2.0 and output_conv2.2. The authors' code has cores on the aggregator only.

    Args:
        which: "aggregator", "heads", "lora" or "paper".
        model: a VggtModel, any model with its module names (the public package's VGGT), or a VggtConfig; not
            yet adapted. Default VGGT-1B.
        min_side: leave out matrices (n x m; a convolution has m = inputs * k * k) with fewer rows or columns.
            Default 256 for "paper", none for the others.

    Raises:
        ValueError: `which` is unknown, the model is adapted already, or has no such matrix.
    """
    if which not in TARGETS:
        raise ValueError(f"{which!r} is no set of VGGT's matrices: choose from {', '.join(TARGETS)}.")
    if min_side is None:
        min_side = LARGEST_CORE if which == "paper" else 0
    parts = {"aggregator": _AGGREGATOR, "heads": _HEADS}.get(which, _AGGREGATOR + _HEADS)
    matrices = {name: shape for name, shape in _matrices(model).items() if name.startswith(parts)}
    found = [name for name, shape in matrices.items() if min(shape) >= min_side]
    if not found:
        limit = f" with both sides of at least {min_side}; min_side can be set lower" if matrices else ""
        raise ValueError(f"the {type(model).__name__} given has no matrix of the set {which!r}{limit}.")
    return found


def _matrices(model: nn.Module | VggtConfig | None) -> dict[str, tuple[int, int]]:
    """name -> (n, m) of every Linear and Conv2d."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = VggtModel(model or VggtConfig.preset("vggt-1b"))
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "base_layer":
            raise ValueError(f"module {name!r} shows that the model is adapted already: give it as it was before.")
        # By the attributes, since a quantised weight may have another shape.
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            found[name] = (module.out_channels, module.in_channels // module.groups * prod(module.kernel_size))
    return found
