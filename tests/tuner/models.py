"""Tiny models for the tuner tests, and the cases: a model, what to target in it, and an input.

Every model is built under a fixed seed, so two calls give the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_attrsub import AttrSubspaceConfig, Basis


class Mlp(nn.Module):
    """Two linear layers with dropout between: 12 -> 20 -> 4."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20, bias=bias)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(20, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


class Affine(nn.Module):
    """Two linear layers and nothing else: the output is affine in the update of either."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Stack(nn.Module):
    """Three numbered blocks, for targets by layer index."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(Mlp() for _ in range(3))
        lift = nn.ModuleList(nn.Linear(4, 12) for _ in range(3))
        self.body = nn.ModuleDict({"layers": layers, "lift": lift})
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block, lift in zip(self.body["layers"], self.body["lift"], strict=True):
            x = x + lift(block(x))
        return self.head(x)


class SharedNames(nn.Module):
    """The same short name at three places, with three shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"proj": nn.Linear(12, 6)})
        self.right = nn.ModuleDict({"proj": nn.Linear(6, 10)})
        self.proj = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.tanh(self.right["proj"](torch.tanh(self.left["proj"](x)))))


class PrefixNamed(nn.Module):
    """A base model whose own names hold the tuner's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.attrsub_trunk = nn.ModuleDict({"up": nn.Linear(12, 20), "attrsub_M": nn.Linear(20, 20)})
        self.attrsub_head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attrsub_head(torch.tanh(self.attrsub_trunk["attrsub_M"](self.attrsub_trunk["up"](x))))


class TokenModel(nn.Module):
    """An embedding, a GPT-2 style Conv1D (weight stored in x out), and a head."""

    def __init__(self, tokens: int = 30) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, 8)
        self.mix = Conv1D(6, 8)
        nn.init.normal_(self.mix.weight, std=0.5)  # its own start is so small that no adapter would be seen
        self.head = nn.Linear(6 * 5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(ids))).flatten(1))


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its rows on the way out, as Gemma 3's does."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class ScaledTokenModel(TokenModel):
    """TokenModel on a scaled embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = ScaledEmbedding(30, 8, padding_idx=0)


class ConvNet(nn.Module):
    """One convolution and a head; `shape` is one input without the batch."""

    def __init__(self, conv: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = conv
        features = conv(torch.zeros(1, *shape)).numel()
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def floats(*shape: int) -> Callable[[], Tensor]:
    """A maker of one fixed batch of numbers."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ids(*shape: int, below: int = 30) -> Callable[[], Tensor]:
    """A maker of one fixed batch of token ids."""
    return lambda: torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A model, its input, and the config arguments that pick its modules; dim is 3 unless they say."""

    name: str
    model: Callable[[], nn.Module]
    sample: Callable[[], Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base model, the same weights at every call."""
        torch.manual_seed(0)
        return self.model().to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The case's batch; ids stay integers."""
        sample = self.sample()
        return sample.to(dtype) if sample.is_floating_point() else sample

    def config(self, basis: Any, **more: Any) -> AttrSubspaceConfig:
        """The case's config on `basis`; `more` overrides."""
        return AttrSubspaceConfig(basis=basis, **{"dim": 3, **self.arguments, **more})

    def peft(self, basis: Any, adapter: str = "default", draw: int = 0, **more: Any) -> PeftModel:
        """A fresh PeftModel of this case in eval mode; `draw` seeds what the adapter draws at random."""
        base = self.base()
        torch.manual_seed(draw)
        return get_peft_model(base, self.config(basis, **more), adapter_name=adapter).eval()


def _conv(conv: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    return lambda: ConvNet(conv(), shape)


X = floats(6, 12)
IMAGE = floats(3, 4, 9, 9)
VOLUME = floats(2, 3, 5, 5, 5)
SIGNAL = floats(3, 4, 11)
IDS = ids(6, 5)
IMAGE_NET = _conv(lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), 4, 9, 9)
OBLONG_NET = _conv(lambda: nn.Conv2d(4, 8, (3, 5), padding="same"), 4, 9, 9)
VOLUME_NET = _conv(lambda: nn.Conv3d(3, 7, 3, padding=1), 3, 5, 5, 5)

MLP = Case("mlp", Mlp, X, {"target_modules": ["up", "down"]})

CASES = [
    MLP,
    Case("mlp-one-name", Mlp, X, {"target_modules": "up"}),
    Case("mlp-last", Mlp, X, {"target_modules": ["down"]}),
    Case("mlp-regex", Mlp, X, {"target_modules": r".*(up|down)"}),
    Case("mlp-all-linear", Mlp, X, {"target_modules": "all-linear"}),
    Case("mlp-every-default", Mlp, X, {"dim": None}),
    Case("mlp-saved-head", Mlp, X, {"target_modules": ["up"], "modules_to_save": ["down"]}),
    Case("mlp-saved-head-also-target", Mlp, X, {"target_modules": ["up", "down"], "modules_to_save": ["down"]}),
    Case("mlp-no-bias", lambda: Mlp(bias=False), X, {"target_modules": ["up", "down"]}),
    Case("mlp-scaled-dropped", Mlp, X, {"target_modules": ["up"], "scaling": 2.5, "dropout": 0.2}),
    Case("mlp-excluded", Mlp, X, {"target_modules": "all-linear", "exclude_modules": ["down"]}),
    Case("shared-names", SharedNames, X, {"target_modules": ["proj"]}),
    Case("mlp-diagonal", Mlp, X, {"core": "diagonal"}),
    Case("mlp-spectral-blocks", Mlp, X, {"columns": "spectral", "core": "block_diagonal"}),
    Case("stack-layer-1", Stack, X, {"target_modules": ["up", "down"], "layers_to_transform": 1}),
    Case("gpt-conv1d", TokenModel, IDS, {"target_modules": ["mix"], "fan_in_fan_out": True}),
    Case("embedding", TokenModel, IDS, {"target_modules": ["tokens"]}),
    Case("embedding-and-conv1d", TokenModel, IDS, {"target_modules": ["tokens", "mix"]}),
    Case("embedding-scaled", ScaledTokenModel, IDS, {"target_modules": ["tokens", "head"]}),
    Case("conv1d", _conv(lambda: nn.Conv1d(4, 6, 3), 4, 11), SIGNAL, {"target_modules": ["conv"]}),
    Case("conv1d-wide", _conv(lambda: nn.Conv1d(4, 6, 1), 4, 11), SIGNAL, {"target_modules": ["conv", "head"]}),
    Case("conv2d", IMAGE_NET, IMAGE, {"target_modules": ["conv"]}),
    Case("conv2d-and-head", IMAGE_NET, IMAGE, {"target_modules": ["conv", "head"]}),
    Case(
        "conv2d-1x1",
        _conv(lambda: nn.Conv2d(4, 8, 1, bias=False), 4, 9, 9),
        IMAGE,
        {"target_modules": ["conv"]},
    ),
    Case("conv2d-same-oblong", OBLONG_NET, IMAGE, {"target_modules": ["conv"]}),
    Case("conv3d", VOLUME_NET, VOLUME, {"target_modules": ["conv"]}),
    Case("conv3d-and-head", VOLUME_NET, VOLUME, {"target_modules": ["conv", "head"]}),
    Case("conv3d-1x1", _conv(lambda: nn.Conv3d(3, 7, 1), 3, 5, 5, 5), VOLUME, {"target_modules": ["conv"]}),
]
PREFIXED = Case("prefix-in-names", PrefixNamed, X, {"target_modules": ["up", "attrsub_head"]})
CASES.append(PREFIXED)
BY_NAME = {case.name: case for case in CASES}
GROUPED = [
    Case(
        "conv1d-groups",
        _conv(lambda: nn.Conv1d(4, 6, 3, groups=2), 4, 11),
        SIGNAL,
        {"target_modules": ["conv"]},
    ),
    Case(
        "conv2d-groups",
        _conv(lambda: nn.Conv2d(4, 8, 3, groups=2), 4, 9, 9),
        IMAGE,
        {"target_modules": ["conv"]},
    ),
    Case(
        "conv2d-depthwise",
        _conv(lambda: nn.Conv2d(4, 4, 3, groups=4), 4, 9, 9),
        IMAGE,
        {"target_modules": ["conv"]},
    ),
]
BASES = ["random", "psv"]
AFFINE = Case("affine", Affine, X, {"target_modules": ["up"]})
STACK = Case("stack", Stack, X)


def pair(case: Case, one: dict[str, Any], two: dict[str, Any], basis: Any = "random") -> PeftModel:
    """A model with the adapters `one` and `two`, neither a no-op; `one` is active."""
    model = case.peft(**{"basis": basis, **one}, adapter="one", init_weights=False)
    model.add_adapter("two", case.config(**{"basis": basis, **two}, init_weights=False))
    return model.eval()


def mined(model: nn.Module, names: list[str], dim: int = 2) -> Basis:
    """A basis in memory as mining would give it: two attributes, `dim` columns each, of random directions."""
    generator = torch.Generator().manual_seed(7)

    def factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, m = weight.shape
        left = torch.linalg.qr(torch.randn(n, dim, generator=generator))[0]
        right = torch.linalg.qr(torch.randn(m, dim, generator=generator))[0]
        return left, torch.linspace(2.0, 1.0, dim), right

    def attribute() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        return {name: factors(model.get_submodule(name).weight) for name in names}

    return Basis.from_factors({"texture": attribute(), "geometry": attribute()})
