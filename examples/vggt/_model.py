"""The model that a script works on: VGGT, an adapter on it, and what it was made of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peft_attrsub  # also registers the method with PEFT
from peft_attrsub.vggt import VggtConfig, VggtModel

PACKAGES = ("torch", "peft", "transformers", "accelerate", "numpy", "scipy")


@dataclass
class Loaded:
    """model: in eval mode, on its device. trainable: parameters that were trained, None where nobody can tell.
    digest: sha256 of the adapter's tensors, "" without an adapter."""

    model: VggtModel
    trainable: int | None
    digest: str


def load_base(name: str, random_weights: int | None = None) -> VggtModel:
    """VGGT by folder, Hub id or the name of the trained vggt-mini of this repository, on the CPU, float32, with the
    heads for cameras and depth; with a seed, an untrained preset."""
    heads = ["camera", "depth"]
    if random_weights is None:
        return VggtModel.from_pretrained(name, heads=heads)
    torch.manual_seed(random_weights)
    return VggtModel(VggtConfig.preset(name, heads=heads))


def load_config(name: str, random_weights: int | None = None) -> VggtConfig:
    """The sizes of what `load_base` would load."""
    config: VggtConfig = VggtConfig.preset(name) if random_weights is not None else VggtConfig.from_pretrained(name)
    return config


def load_model(
    name: str,
    adapter: str | None = None,
    *,
    merge: bool = False,
    random_weights: int | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """VGGT by folder or Hub id with the heads for cameras and depth; an adapter of any PEFT method on top.

    random_weights: seed of untrained weights; name is then a preset, vggt-1b or vggt-mini. merge: fold the adapter
    into the weights, which changes no number but rounding, and costs nothing per layer afterwards.
    """
    model = load_base(name, random_weights)
    if adapter is None:
        return Loaded(model.to(device).eval(), 0, "")
    from peft import PeftModel, get_peft_model_state_dict
    from training.checks import check_adapter_base

    if Path(adapter).is_dir():  # on the Hub, PEFT itself says what does not fit
        check_adapter_base(adapter, model)
    tuned = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trainable = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    digest = state_digest(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    model = tuned.merge_and_unload() if merge else tuned.get_base_model()
    model.requires_grad_(False)
    return Loaded(model.to(device).eval(), trainable, digest)


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Revision of the code, versions and machine, for the summary of a run."""
    found: dict[str, Any] = {"revision": git_revision(), "python": platform.python_version()}
    found["peft_attrsub"] = peft_attrsub.__version__
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    device = torch.device(device)
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return found


def git_revision() -> str | None:
    """Commit of the checkout that this script stands in, with "-dirty" where files differ; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, check=True)
        return found.stdout.decode("utf-8", "replace").strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
