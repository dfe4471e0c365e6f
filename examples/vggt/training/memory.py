"""How much memory a training step takes, and which division of the step fits into what the device has.

    peak = weights + gradients + AdamW's moments + images x (kept for the backward pass) + what comes and goes

"Kept" is counted tensor by tensor from the shapes of the model: per token of width C an aggregator block keeps its two
inputs of norms (2 C, float32), queries and keys before and after the rotation, values, the attention's output and
the hidden layer (10 C, in the precision of the products), and with LoRA or full fine-tuning also the inputs of its
four matrices (7 C). Checkpointing keeps one input (C) instead. The heads are float32 and keep the input of every
convolution. The counts of blocks and heads agree with what autograd really keeps to a few percent (tested); what
comes and goes is an estimate. For DDP and one process; sharded training (FSDP, ZeRO) needs less. On a CPU the
process can take twice as much as its tensors do, because the C library keeps what is freed between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn

from peft_attrsub import _machine
from peft_attrsub.vggt import VggtConfig
from peft_attrsub.vggt.precision import AUTO, DTYPES, parse_precision

FLOAT32 = 4
#: From the fastest to the smallest: each adds blocks that are computed twice.
CHECKPOINTING: tuple[tuple[str, ...], ...] = ((), ("global",), ("frame", "global"), ("frame", "global", "camera"))
#: Left for fragments of the allocator and for workspaces of libraries.
RESERVE = 0.08
#: Bytes per pixel of a batch with its truth (100), of what the losses keep (52) and of their sorts (32).
PIXEL_BYTES, SORT_BYTES = 152, 32
HIDDEN = 32  # channels of the last layer of a dense head


@dataclass(frozen=True)
class Trained:
    """What is trained, as far as memory goes.

    trainable: parameters with a gradient. frozen_bytes: all else of the model, bases included. full: the
    aggregator's own weights are trained. keeps_inputs: its matrices keep their inputs (full, LoRA; cores do not).
    width: rank of LoRA, or size of a core, on them. head_width: the same on the heads, 0 for none.
    """

    trainable: int
    frozen_bytes: int
    full: bool
    keeps_inputs: bool
    width: int = 0
    head_width: int = 0


def describe(model: nn.Module) -> Trained:
    """The Trained of a VggtModel or of a PEFT model around one, read off its parameters."""
    trainable, frozen, full, inputs, width, head_width = 0, 0, False, False, 0, 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel() * parameter.element_size()
            continue
        trainable += parameter.numel()
        blocks = "frame_blocks." in name or "global_blocks." in name
        thin = parameter.shape[0] if "lora_A" in name or "attrsub_M" in name else 0
        if blocks:
            width = max(width, thin)
            full |= name.endswith((".qkv.weight", ".qkv.base_layer.weight"))
            inputs |= "lora_A" in name
        else:
            # A convolution keeps the core's input and its output.
            head_width = max(head_width, 2 * thin if "attrsub_M" in name else thin)
    held = list(model.buffers())
    # Bases that adapters point to are neither parameters nor buffers.
    for module in model.modules():
        for bases in (getattr(module, "attrsub_A", {}), getattr(module, "attrsub_B", {})):
            held += [bases[adapter] for adapter in bases]
    frozen += sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
    return Trained(trainable, frozen, full, full or inputs, width, head_width)


@dataclass(frozen=True)
class Kept:
    """Bytes: per_image of what a forward pass keeps, once whatever the number of images, passing at the worst moment
    per image, and passing_once for the one chunk of frames that a dense head works on."""

    per_image: int
    once: int
    passing: int
    passing_once: int


def kept(
    config: VggtConfig,
    trained: Trained,
    size: tuple[int, int],
    precision: str = "bf16",
    checkpoint: Sequence[str] = (),
) -> Kept:
    """What one image of size (height, width) keeps from the forward to the backward pass, the encoder being frozen."""
    low = _bytes(precision)
    rows, columns = (_patches(side, config) for side in size)
    patches, pixels = rows * columns, size[0] * size[1]
    tokens, c = patches + 1 + config.num_register_tokens, config.embed_dim
    # Autocast widens queries and keys for their norms: two more tensors in float32.
    full_block = 2 * c * FLOAT32 + (2 * c * FLOAT32 if low < FLOAT32 else 0) + 10 * c * low
    full_block += 7 * c * low * trained.keeps_inputs + 2 * c * low * trained.full + 4 * trained.width * low
    # Copies of weights and bases in the lower precision.
    weights = (12 * c + 16 * trained.width) * c * low if low < FLOAT32 else 0
    blocks, once = 0, 0
    for part in ("frame", "global"):
        recomputed = part in checkpoint
        blocks += config.depth * tokens * (c * FLOAT32 if recomputed else full_block)
        once += 0 if recomputed else config.depth * weights
    dense = [name for name in ("depth", "point") if name in config.heads]
    layers = {*(config.dpt_layers if dense else ()), config.depth - 1}
    levels = len(layers) * tokens * 2 * c * FLOAT32
    heads = sum(_dense_head(config, trained, rows, columns, pixels, outputs=2 if n == "depth" else 4) for n in dense)
    camera = 0
    if "camera" in config.heads:
        per_block = 1 if "camera" in checkpoint else 14 + 9 * trained.keeps_inputs
        camera = config.camera_iterations * (config.camera_depth * per_block + 8) * 2 * c * FLOAT32
    per_image = blocks + levels + heads + camera + PIXEL_BYTES * pixels
    # The backward of a block: what it recomputes, and gradients about as large as what it keeps.
    passing = max(2 * tokens * full_block if checkpoint else tokens * 10 * c * low, SORT_BYTES * pixels)
    frames = config.dpt_frames_chunk
    passing_once = 2 * max(frames, 1) * (config.dpt_features // 2) * pixels * FLOAT32 if dense else 0
    return Kept(per_image, once, passing, passing_once)


def _dense_head(config: VggtConfig, trained: Trained, rows: int, columns: int, pixels: int, outputs: int) -> int:
    """Bytes that a dense head keeps of one frame: the inputs of its convolutions, and thin ones of an adapter."""
    c0, c1, c2, c3 = config.dpt_channels
    p, quarter, f = rows * columns, ceil(rows / 2) * ceil(columns / 2), config.dpt_features
    inputs = 4 * 2 * config.embed_dim * p  # normed tokens
    inputs += (c0 + c1 + c3) * p  # of the resizing
    inputs += (16 * c0 + 4 * c1 + c2) * p + c3 * quarter  # of the pyramid's first convolutions
    inputs += f * (
        3 * quarter + 5 * (1 + 4 + 16) * p + 64 * p
    )  # of the fusion at 1/2, 1, 2, 4 and of what follows at 8
    inputs += (f // 2 + HIDDEN + outputs) * pixels
    convolved = 4 * p + (16 + 4 + 1) * p + 4 * quarter + 5 * (1 + 4 + 16) * p + 64 * p + 2 * pixels
    return (inputs + trained.head_width * convolved) * FLOAT32


@dataclass(frozen=True)
class MemoryPlan:
    """images_per_device in one micro-batch, accumulate micro-batches per step, checkpoint_blocks for
    `VggtModel.checkpoint_blocks` (none: no checkpointing), peak in bytes as estimated, why: what to print."""

    images_per_device: int
    accumulate: int
    checkpoint_blocks: tuple[str, ...]
    peak: int
    why: str


def plan_memory(
    config: VggtConfig,
    trained: Trained,
    *,
    image_size: int | tuple[int, int],
    views: int,
    images_per_step: int,
    free_bytes: int,
    processes: int = 1,
    precision: str = "bf16",
    ema: bool = False,
) -> MemoryPlan:
    """The fastest division of a step that fits into free_bytes, those of the device before the model is on it.

    More micro-batches cost next to nothing, blocks that are computed twice cost about a third of a step: so as few
    blocks as it takes, and then as many images at a time as fit. A scene is never divided, so a micro-batch holds at
    least `views` images, the most that a scene may have. image_size: in pixels, a side or (height, width).

    Raises:
        ValueError: not even one scene fits; the sentence says how many views would.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for name, value in (("views", views), ("images_per_step", images_per_step), ("processes", processes)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected 1 or more.")
    states = _state_bytes(trained, processes, ema)
    room = int(free_bytes * (1 - RESERVE)) - states
    share = max(ceil(images_per_step / processes), views)
    most, costs = 0, Kept(0, 0, 0, 0)
    for checkpoint in CHECKPOINTING:
        costs = kept(config, trained, size, precision, checkpoint)
        most = int(max(0, (room - costs.once - costs.passing_once) // (costs.per_image + costs.passing)))
        if most >= views:
            accumulate = ceil(share / most)
            images = max(views, ceil(share / accumulate))
            peak = states + costs.once + costs.passing_once + images * (costs.per_image + costs.passing)
            why = _reason(trained, states, costs, checkpoint, images, accumulate, peak, free_bytes, size)
            return MemoryPlan(images, accumulate, checkpoint, peak, why)
    need = states + costs.once + costs.passing_once + views * (costs.per_image + costs.passing)
    advice = (
        f"at most {most} views per scene fit: lower the largest number of views or the image size"
        if most
        else "not one image fits: lower the image size, or train fewer parameters"
    )
    raise ValueError(
        f"a scene of {views} views at {size[0]} x {size[1]} px needs about {_gib(need)} even with all blocks "
        f"recomputed, and the device has {_gib(free_bytes)}: {advice}."
    )


def _state_bytes(trained: Trained, processes: int, ema: bool) -> int:
    """Weights, and per trainable parameter its gradient, two moments, DDP's bucket and the running mean."""
    copies = 1 + 1 + 2 + (processes > 1) + ema
    return trained.frozen_bytes + copies * trained.trainable * FLOAT32


def _reason(
    trained: Trained,
    states: int,
    costs: Kept,
    checkpoint: Sequence[str],
    images: int,
    accumulate: int,
    peak: int,
    free_bytes: int,
    size: tuple[int, int],
) -> str:
    recomputed = f"{' and '.join(checkpoint)} blocks recomputed" if checkpoint else "nothing recomputed"
    return (
        f"{images} images of {size[0]} x {size[1]} px at a time, {accumulate} micro-batch"
        f"{'es' * (accumulate > 1)} a step, {recomputed}: {_gib(states)} of weights, gradients and moments "
        f"({trained.trainable / 1e6:.1f} M trained), {_gib(costs.per_image)} an image, about {_gib(peak)} of "
        f"{_gib(free_bytes)} at the peak."
    )


def _patches(side: int, config: VggtConfig) -> int:
    if side < 1 or side % config.patch_size:
        raise ValueError(f"image_size has a side of {side} px: expected a multiple of {config.patch_size}.")
    return side // config.patch_size


def _bytes(precision: str) -> int:
    name = parse_precision(precision)
    if name == AUTO:
        raise ValueError("precision is 'auto': give the one that choose_precision chose for the device.")
    return DTYPES[name].itemsize


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process can still take on the device: of the GPU, or of the machine and its control group."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = _machine.free_memory()
    if found is None:
        raise ValueError("this system does not tell how much memory is free: train without --auto-memory.")
    return found


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the worst moment so far: tensors on a GPU, or all of this process on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _machine.peak_memory() or 0


__all__ = [
    "CHECKPOINTING",
    "Kept",
    "MemoryPlan",
    "Trained",
    "describe",
    "free_memory",
    "kept",
    "peak_memory",
    "plan_memory",
]
