"""Adapters on disk: hand-made factors in PEFT's layout, and models that stock PEFT itself saves."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_attrsub import build_basis

ATTRIBUTES = ["texture", "geometry"]
SHAPES = {"block.0.fc": (24, 20), "block.1.proj": (16, 28)}  # module -> (n, m) = (out, in)
PREFIX = "base_model.model."


def orthonormal(n, d, generator):
    return torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64)).Q


def random_factors(shapes, rank, generator, scale=1.0):
    """{module: (B n x r, A r x m)}: dW = B @ A, entries of order `scale`."""
    return {
        name: (
            scale * torch.randn(n, rank, generator=generator, dtype=torch.float64) / n**0.5,
            torch.randn(rank, m, generator=generator, dtype=torch.float64) / m**0.5,
        )
        for name, (n, m) in shapes.items()
    }


def refactored(factors, seed):
    """The same updates by other factors: (B R)(R^T A), R a random rotation. No copy of a file, but of what it does."""
    generator = torch.Generator().manual_seed(seed)
    rotations = {name: orthonormal(B.shape[1], B.shape[1], generator) for name, (B, _) in factors.items()}
    return {name: (B @ rotations[name], rotations[name].T @ A) for name, (B, A) in factors.items()}


def deltas(adapters, module):
    """The dense updates of several {module: (B, A)} adapters at one module."""
    return [B @ A for B, A in (a[module] for a in adapters)]


def save_lora(folder, factors, *, dtype=torch.float32, base_model="toy/base", extra_tensors=None, **config):
    """Write {module: (B, A)} as PEFT would, scaling s = 1 unless `config` says otherwise."""
    folder = Path(folder)
    ranks = {name: B.shape[1] for name, (B, _) in factors.items()}
    config.setdefault("r", max(ranks.values()))
    config.setdefault("lora_alpha", config["r"])
    if len(set(ranks.values())) > 1:
        config.setdefault("rank_pattern", ranks)
        config.setdefault("alpha_pattern", ranks)  # alpha = rank keeps s = 1 in each module
    config.setdefault("target_modules", sorted(factors))
    LoraConfig(base_model_name_or_path=base_model, **config).save_pretrained(str(folder))
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to(dtype).contiguous()
    save_file({**tensors, **(extra_tensors or {})}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def save_many(root, adapters, **kwargs):
    """Folders root/adapter-0, root/adapter-1, ..."""
    return [save_lora(Path(root) / f"adapter-{i}", a, **kwargs) for i, a in enumerate(adapters)]


def edit_config(folder, **changes):
    """Change keys of a saved adapter_config.json, as another tool or version would have written them."""
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


class Zoo(nn.Module):
    """One of every layer LoRA knows; never run, only adapted."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.fc = nn.Linear(20, 24)
        self.gpt = Conv1D(18, 14)  # weight is 14 (in) x 18 (out)
        self.conv1 = nn.Conv1d(6, 16, 3)
        self.conv2 = nn.Conv2d(4, 14, 3, stride=2)
        self.point = nn.Conv2d(10, 12, 1)
        self.oblong = nn.Conv2d(4, 10, (1, 3))
        self.conv3 = nn.Conv3d(2, 9, 2)


ZOO = ["embed", "fc", "gpt", "conv1", "conv2", "point", "oblong", "conv3"]


def train_zoo(folder, seed=0, targets=None, **config):
    """Adapt a Zoo with random LoRA weights, save it with PEFT; returns {module: oriented dW (n x m)}."""
    torch.manual_seed(seed)
    config.setdefault("r", 4)
    model = get_peft_model(Zoo(), LoraConfig(target_modules=targets or ZOO, init_lora_weights=False, **config))
    model.save_pretrained(str(folder))
    return stock_deltas(model)


def stock_deltas(model, adapter="default"):
    """{module: dW} by PEFT's own get_delta_weight, as out x in (conv flattened, embedding d x rows)."""
    return {
        name.removeprefix(PREFIX): oriented(layer.get_delta_weight(adapter), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def oriented(delta, layer):
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding | Conv1D):
        return delta.T.contiguous()
    return delta.flatten(1)


def low_rank(basis, module, attribute):
    """U diag(S) V^T of a basis, n x m."""
    U, S, V = (t.double() for t in basis.factors(module, attribute))
    return (U * S) @ V.T


def make_basis(root, seed=0, dim=3, attributes=ATTRIBUTES, **kwargs):
    """A basis mined from three random adapters per attribute, saved under `root`."""
    generator = torch.Generator().manual_seed(seed)
    groups = {
        name: save_many(Path(root) / name, [random_factors(SHAPES, 3, generator) for _ in range(3)])
        for name in attributes
    }
    return build_basis(groups, dim=dim, progress=False, **kwargs)
