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
from peft_attrsub.basis.identity import BaseIdentity, adapter_base, shared_base
from peft_attrsub.tuner.vocabulary import embedding_layers
from peft_attrsub.vggt import VggtConfig, VggtModel
from peft_attrsub.vggt.configuration_vggt import PRESETS
from peft_attrsub.vggt.shipped import SHIPPED

PACKAGES = ("torch", "peft", "transformers", "accelerate", "numpy", "scipy")


@dataclass
class Loaded:
    """model: in eval mode, on its device. trainable: parameters that were trained, None where nobody can tell.
    digest: sha256 of the adapter's tensors, "" without an adapter. base: the weights without the adapter."""

    model: VggtModel
    trainable: int | None
    digest: str
    base: BaseIdentity


def check_name(name: str, random_weights: int | None) -> None:
    """ValueError for a seed with a name that is no preset, and for a name of one word that has no weights."""
    presets = ", ".join(PRESETS)
    if random_weights is not None:
        if name not in PRESETS:
            raise ValueError(
                f"--random-weights {random_weights} makes an untrained model in the sizes of a preset, and --model "
                f"{name} is none of the presets {presets}: give one of them, or --random-weights none to load weights."
            )
    elif name not in SHIPPED and "/" not in name and not Path(name).is_dir():
        # The Hub would be asked for half a minute where it cannot be reached.
        raise ValueError(
            f"--model {name} is neither a folder nor a Hub id (user/name) nor {', '.join(SHIPPED)}, which comes with "
            f"this repository: give one of these, or one of the presets {presets} with --random-weights SEED."
        )


def load_base(name: str, random_weights: int | None = None) -> VggtModel:
    """VGGT by folder, Hub id or the name of the trained vggt-mini of this repository, on the CPU, float32, with the
    heads for cameras and depth; with a seed, an untrained preset."""
    check_name(name, random_weights)
    heads = ["camera", "depth"]
    if random_weights is None:
        return VggtModel.from_pretrained(name, heads=heads)
    torch.manual_seed(random_weights)
    return VggtModel(VggtConfig.preset(name, heads=heads))


def load_config(name: str, random_weights: int | None = None) -> VggtConfig:
    """The sizes of what `load_base` would load."""
    check_name(name, random_weights)
    config: VggtConfig = VggtConfig.preset(name) if random_weights is not None else VggtConfig.from_pretrained(name)
    return config


def identify(model: VggtModel, name: str, random_weights: int | None = None) -> BaseIdentity:
    """What `load_base` gave for this name and seed, before anything is changed in it.

    The digest is `state_digest` of the tensors, not of the files they came from: a copy under another name, in other
    shards or of another dtype that holds the same numbers is the same base. About 2 GB/s on one core with SHA
    instructions (11 ms for vggt-mini), so 3 s for the 4.6 GB of VGGT-1B in float32.
    """
    shown = Path(name).name if Path(name).is_absolute() else name  # an absolute path is of this machine only
    revision = None if random_weights is not None else getattr(model.config, "_commit_hash", None)
    return BaseIdentity(shown, state_digest(model.state_dict()), revision, random_weights)


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
    base = identify(model, name, random_weights)
    if adapter is None:
        return Loaded(model.to(device).eval(), 0, "", base)
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from training.checks import check_adapter_base

    if Path(adapter).is_dir():  # on the Hub, PEFT itself says which shapes do not fit
        check_adapter_base(adapter, model)
    recorded = adapter_base(PeftConfig.from_pretrained(adapter).to_dict())
    shared_base(
        [(f"adapter {adapter!r}", recorded), ("the model", base)],
        "load the adapter's own base by --model (and --random-weights SEED where it is untrained)",
    )
    tuned = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trainable = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    layers = embedding_layers(tuned)
    digest = state_digest(get_peft_model_state_dict(tuned, save_embedding_layers=layers))
    model = tuned.merge_and_unload() if merge else tuned.get_base_model()
    model.requires_grad_(False)
    return Loaded(model.to(device).eval(), trainable, digest, base)


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
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
