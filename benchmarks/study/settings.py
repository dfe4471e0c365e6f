"""All numbers of a study, and the full and the quick one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

ATTRIBUTES = ("texture", "geometry", "camera", "lighting")
BENCHMARKS = ("face", "human", "clearpose")
STAGES = ("data", "sources", "diagnosis", "mine", "tune")
#: Seeds of what is drawn for the study begin here, far from those that a base is trained with.
FIRST_SEED = 900_000
#: Learning rates that a sweep begins with, by family; factors of about 3.
RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    # Orthogonality is a part of its loss and its singular values start at 0: at a LoRA's rates it stays where it is.
    "adalora": (3e-3, 1e-2, 3e-2),
    "cores": (3e-3, 1e-2, 3e-2),
}
#: Times that a sweep is extended at each end, where the best rate lies on its border.
EXTENSIONS = 2
STEP = 10**0.5


@dataclass(frozen=True)
class Study:
    """What decides the numbers of a study; a folder of results belongs to one of these.

    model: folder or Hub id of the base. base: digest of its weights. size: longer side of pictures in pixels, None:
    that of the model's config. precision: of training and evaluation, bf16,
    fp16 or fp32; auto becomes what the CPU computes natively when the study begins.

    Data. attributes, datasets: source datasets are `datasets` for each attribute, of `scenes` x `views` pictures,
    of about `triangles` triangles and textures of `texture` pixels a scene, as many as such small pictures show.
    benchmarks; train, validation, test, cross, generic: sequences of each set. views_tuned: views per scene in
    training, and views of a test sequence. share: of the training set that a seed learns from.

    Sources. source_rank: of the LoRA adapters. source_steps, source_lr, source_images; lora_a_ratio: lora_A learns so
    many times as fast; same_start: all begin with the same lora_A, and agree on the input side before they have learnt
    anything. source_ranks, rank_datasets: further ranks, and the datasets per attribute for these.

    Fine-tuning. steps, images: of every method alike. dims: total D of cores. basis_dims: D of the PSV and the random
    basis. oracle_dims: D of cores in the update of full fine-tuning. ranks: of LoRA; rank: of PiSSA and AdaLoRA.
    ablated: benchmark of the ablations, at D = ablation_dim; ablations: which groups. sweep: how many rates of each
    family. queries: points that look for a neighbour.
    """

    name: str
    model: str = "vggt-mini"
    base: str = ""
    size: int | None = None
    precision: str = "auto"
    attributes: tuple[str, ...] = ATTRIBUTES
    datasets: int = 10
    scenes: int = 36
    views: int = 8
    triangles: int = 3_000
    texture: int = 64
    benchmarks: tuple[str, ...] = BENCHMARKS
    train: int = 40
    validation: int = 20
    test: int = 20
    cross: int = 20
    generic: int = 20
    views_tuned: int = 4
    share: float = 0.75
    source_rank: int = 8
    source_steps: int = 150
    source_lr: float = 1e-3
    source_images: int = 8
    lora_a_ratio: float = 8.0
    same_start: bool = False
    source_ranks: tuple[int, ...] = (4, 16)
    rank_datasets: int = 3
    steps: int = 100
    images: int = 8
    seeds: int = 3
    sweep: int = 3
    methods: tuple[str, ...] = ("full", "lora", "pissa", "adalora", "psv", "random", "attrsub")
    ranks: tuple[int, ...] = (1, 2, 4, 16)
    rank: int = 4
    dims: tuple[int, ...] = (8, 16, 24, 48)
    basis_dims: tuple[int, ...] = (8, 24)
    oracle_dims: tuple[int, ...] = ()
    ablated: str = "human"
    ablation_dim: int = 24
    ablations: tuple[str, ...] = ("columns", "core", "attributes", "alpha", "rank", "allocation", "shared")
    queries: int = 3000
    folds: int = 5
    shuffles: int = 200

    def __post_init__(self) -> None:
        for name in ("datasets", "scenes", "views", "train", "validation", "test", "seeds", "steps", "sweep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if self.views < self.views_tuned or self.images < self.views_tuned:
            raise ValueError(
                f"views {self.views} and images {self.images} cannot hold a scene of views_tuned {self.views_tuned}."
            )
        if "attributes" in self.ablations and self.ablation_dim % max(1, len(self.attributes) - 1):
            raise ValueError(
                f"ablation_dim {self.ablation_dim} cannot be shared by all attributes but one: give a multiple."
            )
        for dim in (*self.dims, self.ablation_dim):
            if dim % len(self.attributes):
                raise ValueError(f"D = {dim} cannot be shared by {len(self.attributes)} attributes: give a multiple.")
        if unknown := [name for name in self.benchmarks if name not in BENCHMARKS]:
            raise ValueError(f"there is no stand-in for {unknown[0]!r}: give some of {', '.join(BENCHMARKS)}.")
        if self.rank_datasets > self.datasets:
            raise ValueError(
                f"rank_datasets {self.rank_datasets} is more than the {self.datasets} datasets there are."
            )

    @property
    def adapters(self) -> int:
        """Source adapters of the main basis."""
        return len(self.attributes) * self.datasets

    @property
    def mined_dim(self) -> int:
        """Directions per attribute and module that are mined; smaller D take the first of them."""
        fewest = len(self.attributes) - ("attributes" in self.ablations and len(self.attributes) > 1)
        return max(max(self.dims) // len(self.attributes), self.ablation_dim // fewest)

    @property
    def ablated_on(self) -> str | None:
        return self.ablated if self.ablated in self.benchmarks else None

    def rates(self, family: str) -> tuple[float, ...]:
        """The first rates of a sweep: as many of the family's as `sweep` says, from its middle."""
        known = RATES[family]
        start = (len(known) - min(self.sweep, len(known)) + 1) // 2
        return known[start : start + self.sweep]

    def record(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def of(cls, record: dict[str, Any]) -> Study:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})

    def changed(self, pairs: list[str]) -> Study:
        """With KEY=VALUE pairs, VALUE as JSON or a plain word. ValueError for an unknown key."""
        known, values = {f.name for f in fields(self)}, {}
        for pair in pairs:
            key, mark, text = pair.partition("=")
            if not mark or key not in known:
                raise ValueError(f"--set {pair}: give KEY=VALUE with one of {', '.join(sorted(known))}.")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            values[key] = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(self, **values)


FULL = Study("full", oracle_dims=(8, 24))
QUICK = Study(
    "quick",
    datasets=3,
    scenes=6,
    benchmarks=("human",),
    train=20,
    validation=6,
    test=8,
    cross=8,
    generic=8,
    source_steps=60,
    source_ranks=(),
    rank_datasets=1,
    steps=40,
    seeds=2,
    sweep=2,
    methods=("full", "lora", "psv", "random", "attrsub"),
    ranks=(1, 4),
    dims=(8, 24),
    basis_dims=(24,),
    ablations=("alpha",),
    folds=2,
)
