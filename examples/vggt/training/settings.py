"""Settings of a training run from presets, YAML and the command line; the presets "paper", "release" and "smoke".

A value comes from the preset, over it the YAML file of --config, over it the command line. What a preset or the file
says of its own model (`BELONGING`) is dropped where a layer above names a model. The values of "paper" and
"release" are those of arXiv 2604.10095 (section 4) and of its public release, "smoke" runs on a CPU in a minute.
"""

from __future__ import annotations

import difflib
import types
from argparse import Action, ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .options import (
    CHECKPOINTED,
    CORES,
    METHODS,
    DataSettings,
    Heads,
    Method,
    ModelSettings,
    TrainSettings,
    number_or_none,
)

# VGGT's released recipe: the same for the paper and its release.
_RECIPE: dict[str, Any] = {
    "gradient_checkpointing": ["frame", "global"],
    "image_size": 518,
    "aspect_min": 0.33,
    "aspect_max": 1.0,
    "crop_min": 0.8,
    "crop_max": 1.2,
    "rescale": 0.3,
    "jitter": 0.9,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.5,
    "hue": 0.1,
    "gray": 0.05,
    "blur": 0.0,
    "same_colors": 0.7,
    "beta1": 0.9,
    "beta2": 0.999,
    "seed": 42,
    "camera_weight": 5.0,
    "depth_weight": 1.0,
    "depth_gradient": True,
    "quantile": 0.98,
}
_PAPER: dict[str, Any] = _RECIPE | {
    "model": "facebook/VGGT-1B",
    "rank": 16,
    "steps": 24_000,
    "lr": 1e-5,
    "lr_start": 1e-8,
    "lr_final": 1e-8,
    "warmup_share": 0.05,
    "weight_decay": 0.05,
    "clip": 0.5,
    "clip_groups": False,
    "images_per_step": 32,
    "accumulate": 1,
    "views_min": 4,
    "views_max": 16,
    "precision": "auto",  # bf16 as published on GPUs from CUDA capability 8.0 on
}
_RELEASE: dict[str, Any] = _PAPER | {
    "alpha": None,  # twice the rank
    "clip": 1.0,
    "clip_groups": True,
    "images_per_step": 48,
    "accumulate": 2,
    "views_min": 3,
}
_SMOKE: dict[str, Any] = _PAPER | {
    "model": "vggt-mini",
    "random_weights": 0,
    "rank": 4,
    "steps": 20,
    "lr": 1e-3,
    "images_per_step": 8,
    "views_min": 2,
    "views_max": 4,
    "image_size": 112,
    "aspect_min": 0.75,
    "precision": "auto",
    "gradient_checkpointing": ["none"],
    "workers": 0,
    "eval_limit": 2,
    "eval_share": 0.25,
    "log_every": 1,
    "eval_every": 10,
    "panel_every": 20,
    "checkpoint_every": 10,
}
#: Preset -> field -> value; what a preset does not name has the default of its dataclass.
PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": _PAPER, "release": _RELEASE, "smoke": _SMOKE}

#: Field -> fields whose values hold only together with its own: naming it drops those of the layers below.
BELONGING: Mapping[str, tuple[str, ...]] = {"model": ("random_weights",)}

_TYPES = (ModelSettings, DataSettings, TrainSettings)


def parse(
    arguments: Sequence[str] | None = None,
    *,
    required: Sequence[str] = ("data", "out"),
    description: str | None = None,
) -> tuple[ModelSettings, DataSettings, TrainSettings]:
    """The settings of one run, from the command line (default: this process's) and the YAML file of its --config.

    required: fields that must be given. Raises ValueError (FileNotFoundError for the YAML file) with a sentence for
    what is unknown, missing or does not fit. --help prints the options and ends the process.
    """
    model, data, train = parse_types(_TYPES, arguments, required=required, description=description)
    return model, data, train


def parse_types(
    kinds: Sequence[type],
    arguments: Sequence[str] | None = None,
    *,
    required: Sequence[str] = (),
    description: str | None = None,
) -> tuple[Any, ...]:
    """`parse` for other dataclasses: one instance of each of `kinds`, in their order.

    No two of them may have a field of the same name.
    """
    parser = _Parser(kinds, description)
    given = parser.given(arguments)
    config = given.pop("config", None)
    from_file = {} if config is None else parser.read(Path(config))
    preset = given.pop("preset", None) or from_file.pop("preset", None) or "paper"
    from_file.pop("preset", None)
    known = parser.names
    values = layered({k: v for k, v in PRESETS[preset].items() if k in known}, from_file, given)
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise ValueError(f"--{missing[0].replace('_', '-')} is missing: see --help.")
    found = tuple(kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in kinds)
    check_together(*found)
    return found


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The values of several layers, later ones over earlier ones.

    A layer that names a field of `BELONGING` drops what belongs to it from each layer below that names it too: with
    {"model": "vggt-mini", "random_weights": 0} below, {"model": "x"} gives trained weights of x. A lower layer that
    sets random_weights without a model keeps it.
    """
    kept = [dict(layer) for layer in layers]
    for number, layer in enumerate(layers):
        for name in BELONGING.keys() & layer.keys():
            for below in kept[:number]:
                for other in BELONGING[name] if name in below else ():
                    below.pop(other, None)
    return {key: value for layer in kept for key, value in layer.items()}


def check_together(*settings: Any) -> None:
    """ValueError for settings that do not fit each other."""
    data = next((s for s in settings if isinstance(s, DataSettings)), None)
    train = next((s for s in settings if isinstance(s, TrainSettings)), None)
    if data is not None and train is not None and data.images_per_step < data.views_max * train.accumulate:
        raise ValueError(
            f"--images-per-step {data.images_per_step} in --accumulate {train.accumulate} micro-batches cannot hold a "
            f"scene of --views-max {data.views_max} each: {data.views_max * train.accumulate} images would."
        )


def to_yaml(*settings: Any) -> str:
    """All values as YAML that --config reads back."""
    values: dict[str, Any] = {}
    for part in settings:
        values |= asdict(part)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


class _Help(ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that the text explains."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Options of dataclasses; tells which of them were given; errors are sentences."""

    def __init__(self, kinds: Sequence[type], description: str | None) -> None:
        super().__init__(kinds, description=description, allow_abbrev=False, formatter_class=_Help)
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        own = [f.name for kind in kinds for f in fields(kind)]
        self.names = frozenset(own)
        self._lists = {name for name in own if _is_list(hints[name])}
        self._may_be_none = {name for name in own if type(None) in get_args(hints[name])}
        for action in self._actions:
            if action.dest in self._may_be_none and action.type in (int, float):
                action.type = number_or_none(action.type)
        self.add_argument("--preset", choices=tuple(PRESETS), help="values to begin with (None: paper)")
        self.add_argument("--config", metavar="YAML", help="file of values, over the preset, under the command line")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; see --help.")

    def given(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """Only what was given, converted."""
        unset = object()
        # argparse fills in the default of what the namespace has not.
        blank = Namespace(**dict.fromkeys((*self.names, "preset", "config"), unset))
        found, rest = self.parse_known_args(arguments, blank)
        if rest:
            self._refuse(rest[0])
        return {name: value for name, value in vars(found).items() if value is not unset}

    def read(self, path: Path) -> dict[str, Any]:
        """The values of a YAML file, converted as on the command line: YAML takes 1e-5 for a text."""
        if not path.is_file():
            raise FileNotFoundError(f"--config {path} is no file: give a YAML file of settings.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, expected lines like 'lr: 1e-5'.")
        try:
            return self._converted({str(name).replace("-", "_"): value for name, value in values.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _converted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        unknown = [name for name in values if name not in self.names and name != "preset"]
        if unknown:
            self._refuse(f"--{unknown[0]}")
        kept = {name: value for name, value in values.items() if value is None or value == []}
        for name in kept:
            if name not in self._may_be_none:
                raise ValueError(f"--{name} is empty: give a value.")
        words = [word for name, value in values.items() if name not in kept for word in self._words(name, value)]
        return self.given(words) | dict.fromkeys(kept)

    def _words(self, name: str, value: Any) -> Iterator[str]:
        """An entry of a YAML file as it would be on the command line."""
        if isinstance(value, dict) and name in self._lists:
            value = [f"{key}={item}" for key, item in value.items()]
        if isinstance(value, dict) or (isinstance(value, list) and name not in self._lists):
            raise ValueError(f"--{name} is a {'mapping' if isinstance(value, dict) else 'list'}: give one value.")
        if isinstance(value, list):
            yield f"--{name}"
            yield from map(str, value)
        else:
            yield f"--{name}={value}"

    def _refuse(self, word: str) -> NoReturn:
        option = word.partition("=")[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(option, [*self.names, "preset", "config"], 1)
        hint = f": did you mean --{near[0]}?" if near else "; see --help."
        raise ValueError(f"there is no option {word.partition('=')[0]}{hint}")


def _is_list(hint: Any) -> bool:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any(get_origin(part) is list for part in parts)


__all__ = [
    "BELONGING",
    "CHECKPOINTED",
    "CORES",
    "METHODS",
    "PRESETS",
    "DataSettings",
    "Heads",
    "Method",
    "ModelSettings",
    "TrainSettings",
    "check_together",
    "layered",
    "parse",
    "parse_types",
    "to_yaml",
]
