"""What the tensors of an adapter file are, by their names: LoRA factors, known extras, or something else.

| layout    | factors of module X                                                    | scaling                       |
|-----------|------------------------------------------------------------------------|-------------------------------|
| PEFT      | X.lora_A.weight, X.lora_B.weight; X.lora_embedding_A, X.lora_embedding_B | adapter_config.json         |
| torchtune | X.lora_a.weight, X.lora_b.weight                                       | adapter_config.json           |
| kohya     | X.lora_down.weight, X.lora_up.weight                                   | X.alpha / r; without alpha: 1 |
| diffusers | X.lora.down.weight, X.processor.to_q_lora.down.weight (and .up)        | X.alpha / r; without alpha: 1 |

An adapter's name may stand before `.weight` (X.lora_A.default.weight), as in the state dict of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import BasisError
from .naming import natural_key, some

#: (pattern of a factor, what the layout is called, whether the factors are of an embedding)
_FACTORS: tuple[tuple[re.Pattern[str], str, bool], ...] = (
    (re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight"), "PEFT", False),
    (re.compile(r"(?P<stem>.+)\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?"), "PEFT", True),
    (re.compile(r"(?P<stem>.+)\.lora_(?P<side>[ab])\.weight"), "torchtune", False),
    (re.compile(r"(?P<stem>.+)\.lora_(?P<side>down|up)\.weight"), "kohya", False),
    (re.compile(r"(?P<stem>.+)\.(lora|lora_linear_layer)\.(?P<side>down|up)\.weight"), "diffusers", False),
    (re.compile(r"(?P<stem>.+)\.(?P<projection>to_(q|k|v|out))_lora\.(?P<side>down|up)\.weight"), "diffusers", False),
)
# Sides of a pair: the first factor is r x m, the second n x r.
_SIDES = {"A": "B", "a": "b", "down": "up"}
_OTHER = {**_SIDES, **{second: first for first, second in _SIDES.items()}}
_ALPHA = re.compile(r"(?P<stem>.+)\.alpha")
# Names of tensors that change the update and are no part of a LoRA pair, and why they cannot be mined.
_CHANGES_UPDATE: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"lora_magnitude_vector|dora_scale"),
        "DoRA rescales the weight's columns, so its update is not low-rank",
    ),
    (
        re.compile(r"lora_(A|B|a|b|up|down)\.(.+\.)?bias$"),
        "lora_bias adds a bias to lora_B, which a basis cannot hold",
    ),
    (
        re.compile(r"lora_mid|lora_[A-Z]$|lora_E|hada_|lokr_|oft_|boft_|vera_|ia3_|glora|lora_(A|B)\b"),
        "it is not a pair of LoRA factors that this version reads",
    ),
)
# What PEFT and others save next to a LoRA.
_EXTRAS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"trainable_tokens_|token_adapter"), "trainable_token_indices"),
    (re.compile(r"(^|\.)modules_to_save\."), "modules_to_save"),
    (
        re.compile(r"(^|\.)(embed_tokens|lm_head|wte|wpe|shared|word_embeddings|embeddings?)\.weight$"),
        "saved embeddings",
    ),
    (re.compile(r"\.bias$"), "bias"),
)


@dataclass(frozen=True)
class Pair:
    """The factors of one module: their names, and that of its alpha where the file has it."""

    first: str
    second: str
    embedding: bool
    alpha: str | None = None


@dataclass
class AdapterKeys:
    """All tensors of an adapter file.

    pairs: stem (the module as the file calls it) -> its factors. extras: kinds of tensors that were trained too and
    that a LoRA is not made of. unknown: names that say nothing to this version. layout: PEFT, torchtune, kohya or
    diffusers.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    layout: str = "PEFT"

    @property
    def holds_alpha(self) -> bool:
        """Whether the file itself says how its factors are scaled, and no adapter_config.json is needed."""
        return self.layout in ("kohya", "diffusers")


def classify(keys: Iterable[str], source: str, saved_modules: Iterable[str] = ()) -> AdapterKeys:
    """Account for every name. saved_modules: the config's modules_to_save.

    Raises BasisError for half a pair, factors of several adapters or layouts, two pairs of one module, and tensors
    that change the update in another way than a LoRA.
    """
    found = AdapterKeys()
    sides: dict[str, dict[bool, str]] = {}
    embeddings: set[str] = set()
    layouts: dict[str, str] = {}
    adapters: dict[str | None, str] = {}
    alphas: dict[str, str] = {}
    partners: dict[str, str] = {}
    rest = []
    for key in sorted(keys, key=natural_key):
        for pattern, layout, embedding in _FACTORS:
            if (match := pattern.fullmatch(key)) is None:
                continue
            groups = match.groupdict()
            stem, side = _stem(groups), groups["side"] in _SIDES
            partners[stem] = key[: match.start("side")] + _OTHER[match["side"]] + key[match.end("side") :]
            if side in sides.setdefault(stem, {}):
                raise BasisError(
                    f"adapter {source!r} has two factors of one module: {sides[stem][side]!r} and {key!r}."
                )
            sides[stem][side] = key
            layouts.setdefault(layout, key)
            adapters.setdefault(groups.get("adapter"), key)
            embeddings |= {stem} if embedding else set()
            break
        else:
            if (match := _ALPHA.fullmatch(key)) is not None:
                alphas[match["stem"]] = key
            else:
                rest.append(key)
    if len(layouts) > 1:
        raise BasisError(
            f"adapter {source!r} mixes the layouts {' and '.join(layouts)} "
            f"({', '.join(map(repr, layouts.values()))}): save it again in one of them."
        )
    if len(adapters) > 1:
        raise BasisError(
            f"adapter {source!r} holds several adapters ({', '.join(map(repr, adapters.values()))}): save each into a "
            "file of its own."
        )
    found.layout = next(iter(layouts), "PEFT")
    for stem, pair in sides.items():
        if len(pair) < 2:
            raise BasisError(
                f"adapter {source!r} has {next(iter(pair.values()))!r} but lacks {partners[stem]!r}: copy or save the "
                "adapter again."
            )
        found.pairs[stem] = Pair(pair[True], pair[False], stem in embeddings, alphas.pop(stem, None))
    _account(found, [*rest, *alphas.values()], source, list(saved_modules))
    return found


def _stem(groups: dict[str, str | None]) -> str:
    """The module that a factor belongs to."""
    stem = str(groups["stem"])
    projection = groups.get("projection")
    if projection is None:
        return stem
    # diffusers' attention processors hold the LoRA of the projections of the attention around them.
    return f"{stem.removesuffix('.processor')}.{projection}" + (".0" if projection == "to_out" else "")


def _account(found: AdapterKeys, keys: list[str], source: str, saved_modules: list[str]) -> None:
    """Sort what is not a factor into extras and unknown names; refuse what changes the update."""
    extras: dict[str, None] = {}
    for key in keys:
        for pattern, reason in _CHANGES_UPDATE:
            if pattern.search(key):
                raise BasisError(f"adapter {source!r} holds the tensor {key!r}: {reason}.")
        if any(f".{name}." in f".{key}" for name in saved_modules):
            extras["modules_to_save"] = None
            continue
        kind = next((kind for pattern, kind in _EXTRAS if pattern.search(key)), None)
        if kind is None:
            found.unknown.append(key)
        else:
            extras[kind] = None
    found.extras = list(extras)


def told(found: AdapterKeys, declared: list[str], source: str) -> list[str]:
    """What to tell of the tensors of a file that are not mined. declared: extras that its config names."""
    lines = []
    extras = list(dict.fromkeys([*declared, *found.extras]))
    if extras:
        lines.append(
            f"adapter {source!r} also trained {', '.join(extras)}, which a basis does not hold; only its LoRA is "
            "mined."
        )
    if found.unknown:
        lines.append(
            f"adapter {source!r} holds tensors that are not part of a LoRA and are not read: {some(found.unknown)}."
        )
    return lines


__all__ = ["AdapterKeys", "Pair", "classify", "told"]
