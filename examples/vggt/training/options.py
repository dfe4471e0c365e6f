"""What can be set in a training run: the model and its method, the data, the training.

The defaults are the preset "paper" (see `settings`). Source: arXiv 2604.10095 and its release; augmentation and losses
as in the released recipe of VGGT (arXiv 2503.11651). What neither states is marked "ours".
"""

from __future__ import annotations

# ruff: noqa: RUF009 (_set gives what dataclasses.field gives)
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["full", "lora", "pissa", "adalora", "psv", "random", "attrsub"]
Heads = Literal["cores", "lora", "full", "frozen"]
METHODS: tuple[str, ...] = ("full", "lora", "pissa", "adalora", "psv", "random", "attrsub")
#: Methods that train cores between frozen bases.
CORES = ("psv", "random", "attrsub")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
#: Parts of the model whose blocks can recompute their activations.
CHECKPOINTED = ("encoder", "frame", "global", "camera")


def _set(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    """Which model, which method, and where its parameters go."""

    _argument_group_name = "the model and the method"

    model: str = _set("facebook/VGGT-1B", "folder or Hub id; one that is given drops the random_weights of a preset")
    random_weights: int | None = _set(
        None, "seed of untrained weights; model is then a preset: vggt-1b, vggt-mini (none: trained)"
    )
    method: Method = _set("attrsub", "attrsub: cores in a mined basis; psv, random: cores in a basis of the weights")
    basis: list[str] | None = _set(None, "attrsub: folder or Hub id of the basis; several are put side by side")
    attributes: list[str] | None = _set(None, "attrsub: which attributes of the basis, in this order (None: all)")
    dim: list[str] | None = _set(None, "directions per attribute: 16, or texture=16 geometry=32 (None: all; 16)")
    core: Literal["full", "block_diagonal", "diagonal", "dials"] = _set(
        "full", "full: attributes may mix; diagonal: a number per direction; dials: one per attribute"
    )
    start: Literal["zero", "consensus"] = _set(
        "zero", "attrsub: where cores start; consensus: where the sources agree"
    )
    start_scale: float | None = _set(
        None, "start=consensus: factor of each attribute's consensus (None: 1 / their number)"
    )
    calibrate: int = _set(0, "start=consensus: steps of data on which the factors are found before training (0: none)")
    columns: Literal["orthonormal", "spectral"] = _set("orthonormal", "of the bases; spectral: strong ones are longer")
    missing: Literal["error", "intersect"] = _set(
        "error", "what to do with a matrix of the aggregator the basis lacks"
    )
    heads: Heads | None = _set(None, "what camera and depth head carry (None: full with method full, else lora)")
    core_min_side: int | None = _set(None, "heads=cores: a smaller matrix gets a LoRA (None: D; the paper: 256)")
    rank: int = _set(16, "of LoRA, PiSSA and of the heads' LoRA; the mean final rank of AdaLoRA")
    alpha: float | None = _set(None, "the LoRA is scaled by alpha / rank (None: 2 rank, as in the release)")
    dropout: float = _set(0.0, "of what goes into a LoRA or a core")
    exclude: str | None = _set(None, "regex: matrices whose name contains it get no adapter")
    pissa_iterations: int | None = _set(None, "of a randomised SVD; 16 is fast (None: exact)")
    adalora_init_rank: int | None = _set(None, "rank at the start (None: 1.5 rank)")
    adalora_warm: float = _set(0.1, "share of the steps before ranks begin to fall (ours)")
    adalora_final: float = _set(0.4, "share of the steps after they have fallen (ours)")
    adalora_every: int = _set(10, "steps between two allocations (ours)")
    adalora_orthogonal: float = _set(0.5, "weight of |P P^T - I| of the factors (PEFT)")
    gradient_checkpointing: list[str] = _set(
        ["frame", "global"], "which blocks recompute their activations: of encoder, frame, global, camera; or none"
    )

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        if self.method == "attrsub" and not self.basis:
            raise ValueError(
                "--basis is missing: method attrsub trains cores in a mined basis; give its folder or Hub id, or take "
                "--method psv or random, which need none."
            )
        for name in ("basis", "attributes"):
            if self.method != "attrsub" and getattr(self, name) is not None:
                raise ValueError(f"--{name} is for method attrsub: method {self.method} has none.")
        if self.dim is not None and self.method not in CORES:
            raise ValueError(f"--dim is the size of cores: method {self.method} has none; give --rank.")
        if isinstance(self.dims, dict) and self.method != "attrsub":
            raise ValueError(f"--dim {' '.join(self.dim or [])} is by attribute, which {self.method} has not.")
        self._check_heads()
        self._check_start()
        _at_least("rank", self.rank, 1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} is outside [0, 1).")
        if self.adalora_warm < 0 or self.adalora_final < 0 or self.adalora_warm + self.adalora_final >= 1:
            raise ValueError(
                f"--adalora-warm {self.adalora_warm} and --adalora-final {self.adalora_final} leave no steps in which "
                "ranks fall: their sum must be below 1."
            )
        if self.adalora_init_rank is not None and self.adalora_init_rank <= self.rank:
            raise ValueError(f"--adalora-init-rank {self.adalora_init_rank} must be above --rank {self.rank}.")
        _at_least("adalora_every", self.adalora_every, 1)
        for part in self.checkpointed:
            _one_of("gradient_checkpointing", part, (*CHECKPOINTED, "none"))
        if self.exclude is not None:
            try:
                re.compile(self.exclude)
            except re.error as error:
                raise ValueError(f"--exclude {self.exclude!r} is no regular expression: {error}.") from error

    def _check_start(self) -> None:
        _one_of("start", self.start, ("zero", "consensus"))
        if self.start == "consensus" and self.method != "attrsub":
            raise ValueError(
                f"--start consensus needs method attrsub: method {self.method} has no sources that agree."
            )
        for name in ("start_scale", "calibrate"):
            if getattr(self, name) and self.start != "consensus":
                raise ValueError(f"--{name.replace('_', '-')} needs --start consensus.")
        _at_least("calibrate", self.calibrate, 0)

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        _one_of("heads", self.heads, ("cores", "lora", "full", "frozen"))
        if self.heads == "cores" and self.method not in CORES:
            raise ValueError(f"--heads cores needs method {', '.join(CORES)}; {self.method} has no cores.")
        if self.heads == "lora" and self.method == "full":
            raise ValueError("--heads lora does not go with method full: give --heads full or frozen.")

    @property
    def dims(self) -> int | dict[str, int] | None:
        """`dim` as AttrSubspaceConfig takes it: one number, one by attribute, or None."""
        if self.dim is None:
            return None
        pairs = [str(item).partition("=") for item in self.dim]
        try:
            found = {name if mark else "": int(value if mark else name) for name, mark, value in pairs}
            if len(found) < len(pairs) or min(found.values()) < 1 or ("" in found and len(found) > 1):
                raise ValueError
        except ValueError:
            given = " ".join(map(str, self.dim))
            raise ValueError(f"--dim {given}: give one number, or one by attribute: texture=16 geometry=32.") from None
        return found.get("", found)

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """The parts that recompute their activations."""
        return tuple(part for part in self.gradient_checkpointing if part != "none")


@dataclass
class DataSettings:
    """Which scenes, how many views of how many pixels, and how they are changed."""

    _argument_group_name = "the data"

    benchmark: Literal["face", "face-real", "human", "clearpose", "scenes"] = _set("scenes", "the layout on disk")
    data: str | None = _set(None, "folder of the scenes to learn from")
    sequences: str | None = _set(None, "JSON file, {sequence: [frames]}: these alone")
    split: str | None = _set(None, "human, clearpose: train, test or all")
    eval_data: str | None = _set(None, "folder of the held-out scenes (None: part of data)")
    eval_sequences: str | None = _set(None, "JSON file of the held-out sequences")
    eval_split: str | None = _set(None, "human, clearpose: the held-out split")
    eval_share: float = _set(0.05, "share of the sequences held out where nothing else says which (ours)")
    eval_limit: int = _set(16, "held-out sequences that are evaluated (ours)")
    views_min: int = _set(4, "views per scene are drawn for each micro-batch, from this number")
    views_max: int = _set(16, "to this")
    images_per_step: int = _set(32, "images per optimiser step, over all processes and micro-batches")
    frames: Literal["random", "nearby"] = _set("random", "how the views of a scene are drawn")
    window: float = _set(8.0, "nearby: from a window of this many times the views")
    image_size: int = _set(518, "width in pixels")
    aspect_min: float = _set(0.33, "height / width is drawn for each micro-batch, from this number")
    aspect_max: float = _set(1.0, "to this")
    crop_min: float = _set(0.8, "share of width and of height that is kept, from this number")
    crop_max: float = _set(1.2, "to this; above 1 counts as 1")
    rescale: float = _set(0.3, "end of the triangular distribution of extra size before the last crop")
    jitter: float = _set(0.9, "probability of changing the colours")
    brightness: float = _set(0.5, "by up to this factor")
    contrast: float = _set(0.5, "by up to this factor")
    saturation: float = _set(0.5, "by up to this factor")
    hue: float = _set(0.1, "by up to this share of the circle")
    gray: float = _set(0.05, "probability of grey images")
    blur: float = _set(0.0, "probability of blurred images")
    same_colors: float = _set(0.7, "probability that all views of a scene change alike")
    workers: int = _set(8, "processes that read and change images (ours)")

    def __post_init__(self) -> None:
        _at_least("image_size", self.image_size, 1)
        for name in ("views", "aspect", "crop"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 0 < low <= high:
                raise ValueError(f"--{name}-min {low} and --{name}-max {high}: expected 0 < min <= max.")
        if self.images_per_step < self.views_max:
            raise ValueError(
                f"--images-per-step {self.images_per_step} is less than one scene of --views-max {self.views_max}."
            )
        for name in ("jitter", "gray", "blur", "same_colors"):
            _probability(name, getattr(self, name))
        for name in ("rescale", "brightness", "contrast", "saturation", "workers"):
            _at_least(name, getattr(self, name), 0)
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"--hue {self.hue} is outside [0, 0.5].")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"--eval-share {self.eval_share} is outside [0, 1).")
        _at_least("window", self.window, 1)
        _at_least("eval_limit", self.eval_limit, 1)

    def check_patch(self, patch: int) -> None:
        """ValueError where images of this size cannot be cut into patches of the model's side."""
        if self.image_size % patch:
            raise ValueError(
                f"--image-size {self.image_size} is no multiple of {patch}, the side of this VGGT's patches."
            )
        if self.aspect_max * self.image_size < patch or self.aspect_min * self.image_size < patch:
            raise ValueError(
                f"--aspect-min {self.aspect_min} of {self.image_size} pixels is less than one patch of {patch}."
            )


@dataclass
class TrainSettings:
    """The optimiser, the loss, and what is written when."""

    _argument_group_name = "the training"

    out: str | None = _set(None, "folder of the run: checkpoints, logs, the adapter; an existing run is continued")
    steps: int = _set(24_000, "of the optimiser")
    lr: float = _set(1e-5, "peak; a small core takes several times a LoRA's")
    lr_start: float = _set(1e-8, "before the linear warm-up")
    lr_final: float = _set(1e-8, "after the cosine")
    lora_a_ratio: float = _set(1.0, "lora_A learns so many times as fast: it starts at random, lora_B at 0 (ours)")
    warmup_share: float = _set(0.05, "of the steps")
    weight_decay: float = _set(0.05, "of AdamW, on everything that is trained")
    beta1: float = _set(0.9, "of AdamW")
    beta2: float = _set(0.999, "of AdamW")
    clip: float = _set(0.5, "largest norm of the gradient; 0: no limit")
    clip_groups: bool = _set(False, "for aggregator, camera and depth head each, not for all together")
    accumulate: int = _set(1, "micro-batches per step")
    precision: str = _set(
        "auto",
        "auto, bf16, fp16 or fp32, of the aggregator; the heads are always float32. auto: what the device computes "
        "natively; a run that is continued keeps what it began with",
    )
    seed: int = _set(42, "of everything that is drawn")
    camera_weight: float = _set(5.0, "of the cameras in the loss")
    depth_weight: float = _set(1.0, "of the depth in the loss")
    depth_gradient: bool = _set(True, "whether the loss has the term of the depth's gradient")
    quantile: float = _set(0.98, "errors from this quantile on are left out; 1: none")
    ema: float = _set(0.0, "decay of the moving average of what is trained; 0: none is kept")
    log_every: int = _set(10, "steps (ours)")
    eval_every: int = _set(1000, "steps; 0: never (ours)")
    panel_every: int = _set(1000, "steps between two pictures; 0: never (ours)")
    checkpoint_every: int = _set(500, "steps (ours)")
    keep: int = _set(2, "last checkpoints that are kept beside the best (ours)")
    max_skipped: int = _set(10, "steps with NaN in a row that end the run")
    tracker: Literal["tensorboard", "wandb", "none"] = _set("tensorboard", "where curves go")
    auto_memory: bool = _set(False, "choose checkpointing and micro-batches by what the GPU has")
    check: bool = _set(False, "read the whole dataset, report, and no more")

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep", "max_skipped"):
            _at_least(name, getattr(self, name), 1)
        for name in ("weight_decay", "clip", "camera_weight", "depth_weight", "eval_every", "panel_every"):
            _at_least(name, getattr(self, name), 0)
        if not self.lr > 0 or min(self.lr_start, self.lr_final) < 0:
            raise ValueError(
                f"--lr {self.lr}, --lr-start {self.lr_start}, --lr-final {self.lr_final}: expected lr > 0 and the "
                "others 0 or more."
            )
        if not self.lora_a_ratio > 0:
            raise ValueError(f"--lora-a-ratio is {self.lora_a_ratio}: give a number above 0.")
        _probability("warmup_share", self.warmup_share)
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is outside [0, 1).")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"--quantile {self.quantile} is outside (0, 1].")
        if not self.camera_weight and not self.depth_weight:
            raise ValueError("--camera-weight and --depth-weight are both 0: there is nothing to learn.")
        if self.precision not in PRECISIONS:
            # Other spellings, such as bfloat16, are rare, and this import takes seconds.
            from peft_attrsub.vggt.precision import parse_precision

            self.precision = parse_precision(self.precision, "--precision")


def number_or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option for argparse that takes a number of this kind, or "none" for None."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # what argparse calls it in an error
    return read


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"--{name.replace('_', '-')} is {value}: give {least} or more.")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"--{name.replace('_', '-')} {value} is outside [0, 1].")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"--{name.replace('_', '-')} {value!r} is unknown: give one of {', '.join(allowed)}.")
