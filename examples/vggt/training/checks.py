"""What is wrong with a dataset or an adapter, found before the first step; one sentence for each problem.

`check_data` reads everything and goes on after a problem; `check_adapter_base` compares an adapter's shapes with the
model that it is to be put on; `check_run_base` compares the weights that a run was begun with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_attrsub.basis.identity import BaseIdentity, shared_base
from peft_attrsub.datasets import MultiViewDataset, Sample
from peft_attrsub.scenes.agreement import PosedDepth, pairs_to_compare, pose_problem
from peft_attrsub.vggt import to_image_corner
from peft_attrsub.vggt.losses import MIN_PIXELS

from .batches import training_frames
from .options import DataSettings

#: In the folder of a run: the weights that it was begun with.
BASE = "base.json"
#: Frames that are read at a time.
CHUNK = 16
#: How much the shapes (height / width) of a picture and of its depth map may differ.
SHAPE_TOLERANCE = 0.02
#: A principal point farther from the centre than this share of a side loses most of the picture in a crop about it.
FARTHEST_CENTRE = 0.25


def check_data(
    open_dataset: Callable[[], MultiViewDataset],
    views_min: int = 1,
    names: Sequence[str] | None = None,
    workers: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[str]:
    """Read all frames of all sequences (or of these `names`); what is wrong with them, one sentence each.

    open_dataset: gives the dataset, for what is wrong may be that it cannot be opened (no scenes found). Looked for:
    fewer than views_min views; pictures, depth maps and cameras that cannot be read; poses that are missing or are
    no rotations; depth maps of another shape than their pictures, or without measured pixels; cameras without a
    finite focal length, or whose principal point is far from the centre; poses by which the views contradict each
    other or share nothing, with the convention that they look like. workers: processes that read.
    progress: wraps the loop over sequences, such as tqdm.
    """
    try:
        dataset = open_dataset()
    except (OSError, ValueError) as error:
        return [_sentence(error)]
    chosen = dataset.names if names is None else tuple(names)
    loader: Any = torch.utils.data.DataLoader(
        _Checker(dataset, chosen, views_min),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
    # Parts of a sequence, and sequences that share a file, say the same.
    return list(dict.fromkeys(problem for found in progress(loader) for problem in found))


def report_data(settings: DataSettings) -> int:
    """--check: print one line per problem of the data that the settings name, and return the exit status: 0 or 1."""
    from tqdm import tqdm

    from .sources import open_learnt

    problems = check_data(
        lambda: open_learnt(settings),
        settings.views_min,
        workers=settings.workers,
        progress=lambda items: tqdm(items, desc="check", unit="sequence"),
    )
    for problem in problems:
        print(problem)
    print(f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}", flush=True)
    return 1 if problems else 0


class _Checker(torch.utils.data.Dataset[list[str]]):
    """Problems of sequence i."""

    def __init__(self, dataset: MultiViewDataset, names: Sequence[str], views_min: int) -> None:
        self.dataset, self.names, self.views_min = dataset, names, views_min

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> list[str]:
        return check_sequence(self.dataset, self.names[index], self.views_min)


def check_sequence(dataset: MultiViewDataset, name: str, views_min: int = 1) -> list[str]:
    """Problems of one sequence; the same one may be told twice."""
    try:
        frames = training_frames(dataset, name)
    except (OSError, ValueError) as error:
        return [_sentence(error, name)]
    problems = []
    if len(frames) < views_min:
        problems.append(f"{name} has {len(frames)} views, a batch takes {views_min} or more: it is never trained on.")
    empty: list[str] = []
    pairs = pairs_to_compare(len(frames))
    wanted = {frames[place]: place for pair in pairs for place in pair}
    posed: dict[int, PosedDepth] = {}
    moving = _moving(dataset, name, problems)
    for start in range(0, len(frames), CHUNK):
        chunk = frames[start : start + CHUNK]
        for sample in _read(dataset, name, chunk, problems):
            problems += check_sample(sample)
            for view, frame in enumerate(sample.frames):
                if frame in wanted and (depth := posed_depth(sample, view, moving)) is not None:
                    posed[wanted[frame]] = depth
            measured = sample.point_masks.flatten(1).sum(1)
            empty += [frame for frame, count in zip(sample.frames, measured, strict=True) if count < MIN_PIXELS]
    if empty:
        problems.append(
            f"{name}: {len(empty)} of its {len(frames)} views have fewer than {MIN_PIXELS} measured pixels, frame "
            f"{empty[0]} first: no loss can learn from them."
        )
    if fault := pose_problem(posed, [pair for pair in pairs if pair[0] in posed and pair[1] in posed]):
        problems.append(f"{name}: {fault}")
    return problems


def posed_depth(sample: Sample, view: int, moving: Sequence[int] = ()) -> PosedDepth | None:
    """A view as `pose_problem` compares it, without the pixels labelled `moving`; None if its camera is unusable.

    Samples count pixels from the center of the first one, PosedDepth from its corner: cx, cy + 1/2.
    """
    intrinsic = to_image_corner(sample.intrinsics[view]).numpy()
    if sample.extrinsics is None or not bool(sample.extrinsics[view].isfinite().all()):
        return None
    if not np.isfinite(intrinsic).all() or min(intrinsic[0, 0], intrinsic[1, 1]) <= 0:
        return None
    mask = sample.point_masks[view].numpy()
    if moving and sample.labels is not None:
        mask = mask & ~np.isin(sample.labels[view].numpy(), moving)
    return PosedDepth(sample.depths[view].numpy(), sample.extrinsics[view].numpy(), intrinsic, mask)


def _moving(dataset: MultiViewDataset, name: str, problems: list[str]) -> list[int]:
    try:
        return dataset.moving(name)
    except (OSError, ValueError) as error:
        problems.append(_sentence(error, name))
        return []


def _read(dataset: MultiViewDataset, name: str, frames: list[str], problems: list[str]) -> list[Sample]:
    """The frames as one sample; one by one where that fails, so that the broken ones alone are left out."""
    try:
        return [dataset.read(name, frames)]
    except (OSError, ValueError) as whole:
        if len(frames) == 1:
            problems.append(_sentence(whole, name))
            return []
        found = [sample for frame in frames for sample in _read(dataset, name, [frame], problems)]
        if len(found) == len(frames):  # each is good, but they do not go together
            problems.append(_sentence(whole, name))
        return found


def check_sample(sample: Sample) -> list[str]:
    """Problems that a sample's own rules let through, but training does not."""
    problems = []
    height, width = sample.images.shape[-2:]
    rows, columns = sample.depths.shape[-2:]
    if abs((rows / columns) / (height / width) - 1) > SHAPE_TOLERANCE:
        problems.append(
            f"{sample.name}: its pictures are {height} x {width} pixels, its depth maps {rows} x {columns}, which is "
            "another shape: they do not show the same."
        )
    if not bool(sample.images.isfinite().all()) or sample.images.amin() < 0 or sample.images.amax() > 1:
        problems.append(f"{sample.name}: its pictures have values outside of [0, 1]: a fault of its reader.")
    if sample.extrinsics is None:
        problems.append(f"{sample.name} has no poses: it can be evaluated on its depth, but not trained on.")
    elif not bool(sample.extrinsics.isfinite().all()):
        problems.append(f"{sample.name}: a translation is not finite: its pose file is damaged.")
    k = sample.intrinsics
    for view, frame in enumerate(sample.frames):
        focal, center = k[view, (0, 1), (0, 1)], to_image_corner(k[view])[:2, 2]
        if not bool(k[view].isfinite().all()) or bool((focal <= 0).any()):
            problems.append(
                f"{sample.name}: frame {frame} has no focal lengths greater than 0: its camera is damaged."
            )
            break
        sides = torch.tensor([columns, rows], dtype=k.dtype)
        if bool(((center - sides / 2).abs() > FARTHEST_CENTRE * sides).any()):
            x, y = center.tolist()
            problems.append(
                f"{sample.name}: frame {frame} has its principal point at ({x:.1f}, {y:.1f}) of {columns} x {rows} "
                "pixels: its camera belongs to pictures of another size, or they were cropped."
            )
            break
    return problems


def check_adapter_base(adapter: str | os.PathLike[str], model: nn.Module) -> None:
    """Raise a ValueError if an adapter (a folder that PEFT wrote) was made for another base than `model`.

    Compared are the modules that it adapts and, for LoRA and its kin, their sides: A is r x m and B is n x r beside a
    weight of n x m; of cores and their bases likewise. FileNotFoundError where it is no adapter.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(adapter)
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, tensors):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {folder} is no folder of an adapter.")
    try:
        record = json.loads(config.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        raise ValueError(f"{config} is no readable JSON ({error}): save the adapter again.") from error
    try:
        with safe_open(tensors, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{tensors} is no readable safetensors file ({error}): save the adapter again.") from error
    modules = dict(model.named_modules())
    base = record.get("base_model_name_or_path") or "an unnamed base"
    for key, shape in shapes.items():
        if problem := _misfit(key, shape, modules):
            raise ValueError(f"{folder} was made for another base ({base}): {problem}.")


def check_run_base(out: Path, base: BaseIdentity) -> None:
    """ValueError where the run in the folder was begun with other weights: they may have changed under their name."""
    path = out / BASE
    try:
        before = BaseIdentity.of(json.loads(path.read_bytes())) if path.exists() else None
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}): give another folder, or remove this run."
        ) from error
    shared_base(
        [(f"the run in {str(out)!r}", before), ("the model", base)],
        "give another folder, or the weights that it was begun with",
    )


def _misfit(key: str, shape: tuple[int, ...], modules: dict[str, nn.Module]) -> str | None:
    """What does not fit of one tensor of an adapter, or None."""
    name, part = _split(key)
    if part is None:  # a weight saved whole, an importance, a basis: PEFT checks those with the rest
        return None
    module = modules.get(name)
    if module is None:
        return f"it adapts {name}, which the model has not"
    weight = getattr(module, "weight", None)
    if weight is None:
        return f"it adapts {name}, which has no weight in the model"
    n, m = weight.shape[0], weight[0].numel()
    if part == "B" and shape[0] != n:
        return f"its B of {name} has {shape[0]} rows, the weight has {n}"
    if part == "A" and torch.Size(shape[1:]).numel() != m:
        return f"its A of {name} has {torch.Size(shape[1:]).numel()} columns, the weight has {m}"
    for side, expected in (("U", n), ("V", m)):
        if part == side and shape[0] != expected:
            return f"its basis has {shape[0]} rows for {name}, a side of whose weight has {expected}"
    if part == "M" and len(shape) == 2 and (shape[0] > n or shape[1] > m):
        return f"its core of {name} is {shape[0]} x {shape[1]}, the weight {n} x {m}"
    return None


#: How the last words of a tensor's name tell what it is: LoRA and AdaLoRA, then attribute subspaces.
_PARTS = {"lora_A": "A", "lora_B": "B", "attrsub_lora_A": "A", "attrsub_lora_B": "B"} | {
    "attrsub_A": "U",
    "attrsub_B": "V",
    "attrsub_M": "M",
}


def _split(key: str) -> tuple[str, str | None]:
    """Module and part (one of _PARTS, or None) of a tensor: base_model.model.<module>.lora_A.weight."""
    words = key.removeprefix("base_model.model.").split(".")
    for place, word in enumerate(words):
        if word in _PARTS:
            # Next to a core's weight stands the fingerprint of its basis.
            return ".".join(words[:place]), None if words[-1] == "basis" else _PARTS[word]
    return ".".join(words), None


def _sentence(error: Exception, name: str | None = None) -> str:
    """An error's text on one line; with the sequence's name where it does not say it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if name is None or name in text else f"{name}: {text}"


__all__ = [
    "BASE",
    "check_adapter_base",
    "check_data",
    "check_run_base",
    "check_sample",
    "check_sequence",
    "posed_depth",
    "report_data",
]
