"""AttrSubspaceConfig: which basis, which part of it, where the cores go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

from ..basis import Basis, BasisError
from ..basis.hub import split_revision
from ..basis.joint import check_columns
from .adapter_card import update_card
from .config_types import check_types
from .names import ModuleNames, check_prefixes
from .registration import SAVED_TYPE, peft_type
from .start import CONSENSUS, check_scale

#: Bases that are made from the model itself instead of being loaded.
GENERATED = ("psv", "random")
_GENERATED_DIM = 16
#: Kinds of cores; each one can hold what those after it can.
CORES = ("full", "block_diagonal", "diagonal", "dials")
#: The columns of "diagonal" and "dials": see `basis.joint.scaled_columns`.
SCALED = "scaled"
FORWARD_MODES = ("auto", "factored", "folded")


@dataclass
class AttrSubspaceConfig(PeftConfig):
    """Fine-tune by small cores in frozen bases: y = W x + scaling * A M B^T x (paper, section 3.4).

    A (n x D_A) and B (m x D_B) come from a basis of attribute subspaces, mined by
    `peft_attrsub.build_basis` from LoRA adapters; only the core M (D_A x D_B) of each module is trained.

    Args:
        basis: where A and B come from. A folder or a Hub id of a saved basis, a list of them (their
            attributes are put side by side), a `Basis`, or one of two baselines: "psv", the principal
            singular vectors of each base weight, and "random", seeded orthonormal directions. A relative
            folder in the config of a saved adapter is looked for next to that adapter first, then in the
            working directory.
        basis_revision: branch, tag or commit of a Hub basis. A saved adapter pins the commit.
        attributes: which attributes of the basis to use, in this order. Default: all.
        dim: directions per attribute, an int or a dict by attribute. Default: all that the basis holds
            (16 for "psv" and "random").
        core: "full" trains all of M, so attributes may mix; "block_diagonal" only the blocks that map an
            attribute's inputs to its own outputs (fewer parameters); "diagonal" one number per direction,
            dW = sum_j m_j S_j u_j v_j^T over the triplets of the basis; "dials" one number per attribute and module,
            dW = sum_a s_a U_a S_a V_a^T.
        columns: "orthonormal" columns, or "spectral": the same directions weighted by
            sqrt(singular value / largest), so that strong directions learn faster.
        scaling: constant factor of the update. 1 is right for almost everyone; the learning rate does
            the same job.
        dropout: probability of dropping entries of x on the way into B.
        init_weights: True starts from M = 0, which leaves the model as it is. "consensus" starts where the source
            adapters agree, at the core of sum_a s_a U_a S_a V_a^T: it changes the model before the first step, and
            pays where the sources know something of the task (see `calibrate_start`). Attributes that were not
            mined from adapters start at 0. False draws M at random: for tests only.
        init_scale: s_a for "consensus", a number or a dict by attribute (attributes that it does not name start at 0).
            Default: 1 / number of attributes, which is the mean of their consensus updates.
        save_basis: whether A and B are saved in the adapter. "auto" saves them when they could not be
            loaded from elsewhere (a basis in memory, "psv", "random"), else only the pointer to the basis
            and its digest. True makes a file that stands alone.
        seed: of the "random" basis.
        forward_mode: how linear layers compute the update, which changes speed and not results. "factored":
            three thin products beside the base; "folded": A M B^T is added to W on the fly, which pays with
            many tokens; "auto": each pass as is cheaper by token count, and never folded where W is
            narrower than float32 (see `peft_attrsub.explain_forward`). Not saved with the adapter.
        fan_in_fan_out: True for layers that store W as (in, out), such as GPT-2's Conv1D; found out by
            itself for those.
        missing: "error" refuses a targeted module that the basis lacks, "intersect" leaves it unadapted.
        target_modules: modules that get a core, as in PEFT: a list of names or endings, a regex, or
            "all-linear": all linear layers but output embeddings, the head of task_type (SEQ_CLS, TOKEN_CLS,
            QUESTION_ANS), poolers (unless the task is SEQ_CLS) and what is inside of nn.MultiheadAttention. Default:
            every module the basis covers; for "psv" and "random" those of "all-linear".
        exclude_modules: modules that get neither core nor LoRA; a list or a regex.
        layers_to_transform, layers_pattern: restrict the default, or a list of target_modules, to these layer
            indices, as in PEFT.
        modules_to_save: modules trained and saved in full beside the adapter.
        trainable_token_indices: ids of tokens whose embeddings are trained, as in LoRA: a list for the input
            embedding, or a dict from a module's name to its list. Only these rows are saved.
        ensure_weight_tying: train an input embedding in target_modules or modules_to_save, or its
            trainable_token_indices, as one with the layers that share its weight (such as lm_head), as in LoRA.
            With a core the update of all of them is dW = A M B^T of the embedding.
        target_parameters: not supported; refused with a sentence. Weights that are no module of their own, such
            as the experts of a mixture that are stored as one 3-d parameter, cannot be adapted.
        lora_modules: modules that get a plain trainable LoRA instead of a core (the paper does so on
            VGGT's heads); a list or a regex. They need no basis.
        lora_rank, lora_alpha: of those; the LoRA is scaled by lora_alpha / lora_rank.
        module_prefixes: how the names of the model's modules differ from those in the basis: prefix in the
            model -> prefix in the basis, "" for none. {"vggt": ""} where the model holds the base as its
            submodule `vggt`, {"": "encoder"} where the model is the `encoder` of the base. Filled in by the
            library where one answer is certain; give it where the error says that several are possible.
            Wrappers (torch.compile, DDP, FSDP, activation checkpointing) need none. A saved adapter has the
            names of the basis, so that it loads into the base, its parts, and models around it.
        basis_digest, module_layouts, basis_in_adapter, basis_widths: filled in by the library when an
            adapter is made: the digest of the basis that the cores belong to, the shapes of adapted modules
            that are not linear, whether A and B are in the adapter's own file, and then their widths in each
            module, attribute by attribute ("16x16 8x12": 16 and 8 columns of A, 16 and 12 of B).
    """

    basis: Any = None
    basis_revision: str | None = None
    attributes: list[str] | None = None
    dim: int | dict[str, int] | None = None
    core: Literal["full", "block_diagonal", "diagonal", "dials"] = "full"
    columns: Literal["orthonormal", "spectral"] = "orthonormal"
    scaling: float = 1.0
    dropout: float = 0.0
    init_weights: bool | Literal["consensus"] = True
    init_scale: float | dict[str, float] | None = None
    save_basis: bool | Literal["auto"] = "auto"
    seed: int = 0
    forward_mode: Literal["auto", "factored", "folded"] = "auto"
    fan_in_fan_out: bool = False
    missing: Literal["error", "intersect"] = "error"
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    target_parameters: list[str] | None = None
    lora_modules: list[str] | str | None = None
    lora_rank: int = 16
    lora_alpha: float = 16
    module_prefixes: dict[str, str] | None = None
    # Filled in when an adapter is made or saved:
    basis_digest: str | None = None
    module_layouts: dict[str, Any] | None = None
    basis_in_adapter: bool = False
    basis_widths: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self)
        self.peft_type = peft_type()
        # Set by `tying`, read by PEFT; not part of the saved config.
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None
        # How the adapter itself was reached on the Hub; no part of the saved config.
        self._hub: dict[str, Any] = {}
        # The folder that the config was read from.
        self._folder: Path | None = None
        self._names: ModuleNames | None = None
        for name in ("target_modules", "exclude_modules", "lora_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        attributes: Any = self.attributes
        if isinstance(attributes, str):
            self.attributes = [attributes]
        self._check()

    def _check(self) -> None:
        check_columns(self.columns)
        self.module_prefixes = check_prefixes(self.module_prefixes)
        self._one_of("core", CORES)
        self._one_of("init_weights", (True, False, CONSENSUS))
        check_scale(self.init_scale, self.init_weights)
        if self.core in ("diagonal", "dials") and self.columns != "orthonormal":
            raise ValueError(
                f"columns={self.columns!r} does not go with core={self.core!r}, which weighs the triplets of the "
                "basis as they are: leave columns out."
            )
        if str(self.missing) == "skip":  # the older name, in saved adapters
            self.missing = "intersect"
        self._one_of("missing", ("error", "intersect"))
        self._one_of("save_basis", ("auto", True, False))
        self._one_of("forward_mode", FORWARD_MODES)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is outside [0, 1).")
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters!r} is not supported: only modules can be adapted (Linear, "
                "Conv, Embedding), not bare parameters such as experts stored as one 3-d weight. Name modules in "
                "target_modules, or train these parameters with peft.LoraConfig(target_parameters=...)."
            )
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank!r} is no positive whole number.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given but layers_to_transform is not: name the layer indices too.")
        for option in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, option) is not None:
                raise ValueError(
                    f"{option} needs target_modules as a list, but it is the string {self.target_modules!r}."
                )
        self._check_basis()

    def _check_basis(self) -> None:
        if self.basis is None and not self.basis_in_adapter and not self.lora_modules:
            raise ValueError(
                "basis is missing: give a folder or Hub id of a saved basis, a Basis, 'psv' or 'random', "
                "e.g. AttrSubspaceConfig(basis='basis')."
            )
        parts = self._parts
        for part in parts:
            if part is not None and not isinstance(part, (str, os.PathLike, Basis)):
                raise ValueError(f"basis={part!r} is neither a name nor a Basis: give a folder, a Hub id or a Basis.")
            if len(parts) > 1 and part in GENERATED:
                raise ValueError(f"{part!r} cannot be combined with other bases: give it alone.")
        if self.generated and self.attributes not in (None, [self.basis]):
            raise ValueError(f"attributes={self.attributes!r} does not fit basis={self.basis!r}, which has none.")
        if self.generated and isinstance(self.dim, Mapping):
            raise ValueError(f"dim={self.dim!r} is by attribute, but basis={self.basis!r} has none: give an int.")
        if self.generated and self.init_weights == CONSENSUS:
            raise ValueError(
                f"init_weights='consensus' needs a basis that was mined from adapters, got basis={self.basis!r}: "
                "build one with build_basis, or leave init_weights=True to start at zero."
            )
        if self.save_basis is False and self.basis == "psv":
            raise ValueError(
                "save_basis=False with basis='psv' would recompute singular vectors at every load, which is not exact "
                "across machines: leave save_basis='auto'."
            )

    def _one_of(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}.")

    @property
    def names(self) -> ModuleNames | None:
        """The modules of the model that the adapter is in; no part of the saved config."""
        return self._names

    @names.setter
    def names(self, names: ModuleNames) -> None:
        self._names = names

    @property
    def _parts(self) -> list[Any]:
        return list(self.basis) if isinstance(self.basis, (list, tuple)) else [self.basis]

    @property
    def generated(self) -> bool:
        """The basis is made from the model: "psv" or "random"."""
        return isinstance(self.basis, str) and self.basis in GENERATED

    @property
    def basis_columns(self) -> str:
        """The rule by which columns of A and B come from the basis: `columns`, or "scaled"."""
        return SCALED if self.core in ("diagonal", "dials") else self.columns

    @property
    def generated_dim(self) -> int:
        if self.dim is None:
            return _GENERATED_DIM
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"dim={self.dim!r} is no positive whole number.")
        return self.dim

    @property
    def stores_basis(self) -> bool:
        """Whether A and B go into the saved adapter (see `save_basis`)."""
        if self.basis_in_adapter or self.save_basis is True:
            return True
        if self.save_basis is False:
            return False
        return self.generated or self.basis_pointer() is None

    def open_basis(self) -> Basis:
        """The whole basis that the config names, read lazily, its digest checked.

        Raises BasisError if it is missing or has another digest than the adapter was trained with.
        """
        if self.generated or self.basis is None:
            raise BasisError(f"basis={self.basis!r} is not a saved basis.")
        parts = self._parts
        opened = [p if isinstance(p, Basis) else self._load(p) for p in parts]
        whole = opened[0] if len(opened) == 1 else Basis.combine(opened)
        if self.basis_digest and whole.digest != self.basis_digest:
            raise BasisError(
                f"the adapter was trained in the basis with digest {self.basis_digest}, but "
                f"{self.basis_pointer() or 'the basis given'!r} has digest {whole.digest}: "
                "point config.basis to the basis it was trained with."
            )
        return whole

    def _load(self, name: str | os.PathLike[str]) -> Basis:
        listed = isinstance(self.basis, (list, tuple))
        bare, own = split_revision(os.fspath(name)) if listed else (os.fspath(name), None)
        near = None if self._folder is None or os.path.isabs(bare) else Path(os.path.normpath(self._folder / bare))
        try:
            place = bare if near is None or not near.is_dir() else near
            return Basis.from_pretrained(place, revision=own or self.basis_revision, **self._hub)
        except BasisError as error:
            if self.basis_digest is None and near is None:
                raise
            looked = "" if near is None or near.is_dir() else f"There is no folder {str(near)!r} next to it; "
            raise BasisError(
                f"the adapter needs the basis {bare!r} (digest {self.basis_digest}). {looked}{error} "
                "If it has moved: config = PeftConfig.from_pretrained(adapter); config.basis = 'new/place'; "
                "PeftModel.from_pretrained(model, adapter, config=config)."
            ) from error

    def pinned_list(self, whole: Basis) -> list[Any]:
        """The list `basis` with the commit behind each Hub id (`user/name@commit`); `whole` was opened from it."""
        names = whole.source if isinstance(whole.source, list) else [whole.pinned_source]
        if len(names) != len(self._parts):
            return self._parts
        return [p if isinstance(p, Basis) else name for p, name in zip(self._parts, names, strict=True)]

    def basis_pointer(self) -> str | list[str] | None:
        """The basis as JSON can hold it: names, or None for a basis that exists only in memory."""
        parts, listed = self._parts, isinstance(self.basis, (list, tuple))
        names = []
        for part in parts:
            name = part if not isinstance(part, Basis) else part.pinned_source if listed else part.source
            if name is None or isinstance(name, list):
                return name if len(parts) == 1 else None
            names.append(os.fspath(name))
        return names if listed else names[0]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict; a Basis in memory is told by its name only."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["basis"] = self.basis_pointer()
        return json.loads(json.dumps(record, default=_plain))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, pinned to the basis by revision and digest; name the basis in the card."""
        PeftConfig.save_pretrained(_Saved(self), save_directory, **kwargs)
        update_card(save_directory, self.saved_dict())

    def saved_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        # A config that has not made an adapter yet is saved without weights, so it starts a new one.
        alone = self.basis_widths is None and self.basis_pointer() is not None
        inside = self.basis_in_adapter or (self.stores_basis and not alone)
        record = {**self.to_dict(), "peft_type": SAVED_TYPE, "basis_in_adapter": inside}
        del record["forward_mode"]  # a matter of the machine that runs the adapter, not of the adapter
        return record

    @classmethod
    def from_pretrained(cls, name: str, subfolder: str | None = None, **kwargs: Any) -> AttrSubspaceConfig:
        """Read adapter_config.json from a folder or the Hub; token and cache_dir serve for the basis too."""
        config: AttrSubspaceConfig = super().from_pretrained(name, subfolder, **kwargs)
        config._hub = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if kwargs.get(key)}
        folder = Path(name, subfolder or "")
        config._folder = folder.resolve() if folder.is_dir() else None
        return config


class _Saved:
    """The config as it goes to disk; PEFT's writer asks only for `to_dict`."""

    def __init__(self, config: AttrSubspaceConfig) -> None:
        self._config = config

    def to_dict(self) -> dict[str, Any]:
        return self._config.saved_dict()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value)
