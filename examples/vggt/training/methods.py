"""The ways to fine-tune a VGGT, by name: what is trained where, and what an optimiser needs to know of it.

    full      W itself
    lora      W + s B A                      s = alpha / rank
    pissa     (W - s B0 A0) + s B A          B0 A0: the leading part of W's SVD; a Conv2d has a plain LoRA
    adalora   W + s B diag(e) A              entries of e are set to 0 until their number is the budget
    psv, random, attrsub   W + A M B^T       only M is trained; A, B from W, from a seed, or mined

on every qkv, proj, fc1, fc2 of the aggregator. What the camera and the depth head carry is chosen apart (`heads`). The
encoder is frozen throughout, and so is a point head.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.basis.files import atomic_folder
from peft_attrsub.basis.identity import BaseIdentity, shared_base
from peft_attrsub.tuner.vocabulary import embedding_layers
from peft_attrsub.vggt import VggtModel, vggt_targets

from .adalora import AdaLora
from .options import CORES, ModelSettings
from .parts import Parts, count_parts, part_of
from .pissa import Pissa

_HEADS = ("camera_head", "depth_head")
_CONFIG = "adapter_config.json"


@dataclass
class Built:
    """A model that is ready to be trained.

    model: what is trained and called. groups: "aggregator", "camera", "depth" -> their trained parameters; a part
    without any is not there. named: the same by name. parts: what is trained where; table: that as text. trainable:
    how many numbers are trained.
    """

    model: PeftModel | VggtModel
    settings: ModelSettings
    groups: dict[str, list[nn.Parameter]]
    named: dict[str, nn.Parameter]
    parts: Parts
    adalora: AdaLora | None = None
    pissa: Pissa | None = None

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.named.values())

    @property
    def table(self) -> str:
        return self.parts.table()

    @property
    def base(self) -> VggtModel:
        """The VGGT itself, with the adapter's layers in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def optimizer_groups(self, lora_a_ratio: float = 1.0) -> list[dict[str, Any]]:
        """What is trained, for an optimiser; `Loop` multiplies the learning rate of a group by its "ratio".

        lora_a_ratio: of the factors lora_A. They start at random and lora_B at 0, so that at equal rates a short
        training leaves lora_A about where it was (the same idea as LoRA+, arXiv 2402.12354, for the other factor).
        """
        factors = [p for name, p in self.named.items() if "lora_A" in name and lora_a_ratio != 1]
        chosen = {id(p) for p in factors}
        rest = [p for p in self.named.values() if id(p) not in chosen]
        groups = [(rest, 1.0), (factors, float(lora_a_ratio))]
        return [{"params": part, "ratio": ratio} for part, ratio in groups if part]

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss (AdaLoRA's orthogonality), or None; nobody else adds it."""
        return None if self.adalora is None else self.adalora.penalty()

    def after_step(self, step: int) -> None:
        """To be called after each step of the optimiser, before gradients are cleared; not after a skipped one.

        step: how many steps were taken, this one included.
        """
        if self.adalora is not None:
            self.adalora.after_step(step)

    def state(self) -> dict[str, Tensor]:
        """All that a continued training needs of the model: what is trained, and the method's own memory."""
        found = {f"parameter/{name}": parameter.detach() for name, parameter in self.named.items()}
        for extra in (self.adalora, self.pissa):
            if extra is not None:
                found |= extra.state()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ValueError, and changes nothing, where it is of another model."""
        # AdaLoRA's own entries come and go with the steps.
        saved, own = ({n for n in names if n.startswith(("parameter/", "pissa/"))} for names in (state, self.state()))
        if different := sorted(saved ^ own):
            where = "the model" if different[0] in own else "the checkpoint"
            raise ValueError(
                f"the checkpoint is of another model or method: {different[0]} is only in {where}. Give the settings "
                "it was made with, or another folder."
            )
        for name, parameter in self.named.items():
            if state[f"parameter/{name}"].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[f'parameter/{name}'].shape)} in the checkpoint and "
                    f"{tuple(parameter.shape)} in the model: give the settings it was made with, or another folder."
                )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state[f"parameter/{name}"])
        for extra in (self.adalora, self.pissa):
            if extra is not None:
                extra.load_state(state)


def build(
    model: VggtModel,
    settings: ModelSettings,
    *,
    steps: int | None = None,
    seed: int = 0,
    base: BaseIdentity | None = None,
) -> Built:
    """Make a VGGT ready to be trained by `settings.method`; the model is changed in place, and put in train mode.

    steps: how long the training is, which AdaLoRA has to know. seed: of what is drawn at the start (LoRA's A, the
    basis "random"), so that it is the same in every process. base: the weights of the model, which must be those that
    the basis was mined for, where it records them. Raises ValueError with a sentence for settings that the model or
    the basis cannot serve; before anything is changed, where that can be known.
    """
    # The generators go on afterwards as if nothing had been drawn here.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        config = _config(model, settings, steps, seed)
        if settings.method == "attrsub" and base is not None:
            _check_basis_base(config, settings, base)
        model.requires_grad_(False)
        model.freeze_encoder()
        recompute(model, settings.checkpointed)
        tuned: PeftModel | VggtModel = model
        if config is None:
            _train_in_full(model, settings)
        else:
            tuned = get_peft_model(model, config)
        pissa = Pissa(tuned, settings.pissa_iterations) if settings.method == "pissa" else None
    adalora = AdaLora(tuned) if settings.method == "adalora" else None
    named = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault(part_of(name), []).append(parameter)
    tuned.train()
    return Built(tuned, settings, groups, named, count_parts(tuned), adalora, pissa)


def recompute(model: VggtModel, parts: Sequence[str]) -> None:
    """Have the blocks of these parts compute their activations again in the backward pass; none: all keep them."""
    # The older name warns in the newer transformers.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if parts:
        model.checkpoint_blocks(parts)
        enable = getattr(model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    elif getattr(model, f"is_{name}_checkpointing"):
        getattr(model, f"{name}_checkpointing_disable")()


def save(built: Built, folder: str | os.PathLike[str], tags: Mapping[str, Any] | None = None) -> Path:
    """Write what was trained, in one step; a folder of an earlier save is replaced.

    An adapter is what PEFT saves: `PeftModel.from_pretrained(vggt, folder)` on the model as it was before `build`.
    PiSSA's, which changes W, is saved as the plain LoRA of twice the rank that makes up for it. Method full saves the
    whole model for `VggtModel.from_pretrained`. tags: JSON values that go into the config file, as "training".
    """
    full = not isinstance(built.model, PeftModel)
    with atomic_folder(folder, "config.json" if full else _CONFIG, overwrite=True) as beside:
        if built.pissa is not None:
            built.pissa.save(beside)
        else:
            with warnings.catch_warnings():
                # AdaLoRA may leave a matrix without any rank.
                warnings.filterwarnings("ignore", ".*have invalid shape")
                if full:
                    built.model.save_pretrained(str(beside))
                else:
                    layers = embedding_layers(built.model)
                    built.model.save_pretrained(str(beside), save_embedding_layers=layers)
        if tags:
            _tag(beside / ("config.json" if full else _CONFIG), tags)
    return Path(folder)


def _tag(path: Path, tags: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    holder = config
    if path.name == _CONFIG:
        # PEFT warns of fields it does not know; this one is a free dictionary.
        holder = config["auto_mapping"] = dict(config.get("auto_mapping") or {})
    holder["training"] = dict(tags)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _heads(settings: ModelSettings) -> str:
    return settings.heads or ("full" if settings.method == "full" else "lora")


def _train_in_full(model: VggtModel, settings: ModelSettings) -> None:
    trained = ["aggregator", *(_HEADS if _heads(settings) == "full" else ())]
    for name in trained:
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)
    model.freeze_encoder()


def _config(model: VggtModel, settings: ModelSettings, steps: int | None, seed: int) -> PeftConfig | None:
    """The PEFT config of a method; None for full."""
    if settings.method == "full":
        return None
    heads = _heads(settings)
    body, head = (_targets(which, model, settings) for which in ("aggregator", "heads"))
    saved = [name for name in _HEADS if hasattr(model, name)] if heads == "full" else None
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    if settings.method in CORES:
        return _cores(model, settings, body, head, saved, alpha, seed)
    targets = body + (head if heads == "lora" else [])
    if not targets:
        raise ValueError(f"--exclude {settings.exclude!r} leaves no matrix for an adapter.")
    shared: dict[str, Any] = {
        "target_modules": targets,
        "modules_to_save": saved,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
    }
    if settings.method != "adalora":
        return LoraConfig(r=settings.rank, **shared)
    return AdaLora.config(settings, steps, shared)


def _check_basis_base(config: Any, settings: ModelSettings, base: BaseIdentity) -> None:
    """ValueError where the basis records other base weights than those to be tuned."""
    shared_base(
        [(f"basis {' '.join(settings.basis or [])!r}", config.open_basis().config.base), ("the model", base)],
        "take a basis mined from adapters of this model, or tune the model that it was mined for",
    )


def _targets(which: str, model: VggtModel, settings: ModelSettings) -> list[str]:
    if which == "heads" and not any(hasattr(model, name) for name in _HEADS):
        return []
    names = vggt_targets(which, model)
    return [n for n in names if settings.exclude is None or not re.search(settings.exclude, n)]


def _cores(
    model: VggtModel,
    settings: ModelSettings,
    body: list[str],
    head: list[str],
    saved: list[str] | None,
    alpha: float,
    seed: int,
) -> AttrSubspaceConfig:
    shared: dict[str, Any] = {
        "basis": settings.method,
        "dim": settings.dims,
        "core": settings.core,
        "columns": settings.columns,
        "dropout": settings.dropout,
        "missing": settings.missing,
        "seed": seed,
        "modules_to_save": saved,
        "lora_rank": settings.rank,
        "lora_alpha": alpha,
    }
    if settings.method == "attrsub":
        basis = settings.basis or []
        shared |= {"basis": basis[0] if len(basis) == 1 else basis, "attributes": settings.attributes}
        if settings.start == "consensus":
            shared |= {"init_weights": "consensus", "init_scale": settings.start_scale}
    cores, lora = list(body), head if _heads(settings) == "lora" else []
    if _heads(settings) == "cores":
        small = _too_small(model, AttrSubspaceConfig(**shared), head, settings.core_min_side)
        cores += [name for name in head if name not in small]
        lora = [name for name in head if name in small]
    if not cores:
        raise ValueError(f"--exclude {settings.exclude!r} leaves no matrix for a core.")
    return AttrSubspaceConfig(**shared, target_modules=cores, lora_modules=lora or None)


def _too_small(model: VggtModel, config: AttrSubspaceConfig, names: list[str], least: int | None) -> set[str]:
    """Matrices with a side below `least`; None: below the D that the basis has for them."""
    sides = {name: min(model.get_submodule(name).weight.flatten(1).shape) for name in names}
    if least is None and not config.generated:
        basis = config.open_basis().select(config.attributes, config.dim)
        held = set(basis.modules)
        return {
            name
            for name, side in sides.items()
            if name in held and sum(basis.dim(name, attribute) for attribute in basis.attributes) > side
        }
    limit = config.generated_dim if least is None else least
    return {name for name, side in sides.items() if side < limit}


__all__ = ["Built", "build", "recompute", "save"]
