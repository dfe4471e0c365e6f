"""The demo as a list of commands: each is one that a person could type, with what it leaves and what it waits for."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peft_attrsub.datasets.writing import CAMERAS
from peft_attrsub.evaluation.files import write_atomically

ATTRIBUTES = ("texture", "geometry", "camera", "lighting")
#: The three rows of the table: the model as it is, and the two ways to tune it.
METHODS = ("base", "lora", "cores")
TUNED = ("lora", "cores")
FOLDER = Path(__file__).resolve().parents[1]
SETTINGS, MEASURED = "training.yaml", "measured.json"


@dataclass(frozen=True)
class Scale:
    """How much of everything. datasets: per attribute, with `scenes` of `views` each. generic: held-out scenes in
    which everything varies, to see what is forgotten. people, held_out: rooms with people to learn from and to measure
    on, of `shots` views each, of which every second is measured. detail: cells per height of a person. rank, steps,
    rate, a_ratio: of an adapter on a dataset. lora_rank, dim: of the two ways to tune (dim: per attribute), with
    `tune_steps` and rates of their own. images: per step. draws: of random subspaces, for the report."""

    datasets: int
    scenes: int
    views: int
    generic: int
    people: int
    held_out: int
    shots: int
    detail: int
    rank: int
    steps: int
    rate: float
    dim: int
    lora_rank: int
    tune_steps: int
    lora_rate: float
    cores_rate: float
    a_ratio: float = 4.0
    images: int = 8
    draws: int = 200


SCALES = {
    "laptop": Scale(
        datasets=2,
        scenes=6,
        views=6,
        generic=6,
        people=24,
        held_out=8,
        shots=8,
        detail=40,
        rank=8,
        steps=30,
        rate=2e-3,
        dim=8,
        lora_rank=8,
        tune_steps=80,
        # The best of 1e-3, 3e-3, 1e-2 by (Acc + Comp) / 2 in eight rooms of seed 2, for both.
        lora_rate=1e-2,
        cores_rate=3e-3,
    ),
    # For tests: every step happens, nothing is learnt.
    "toy": Scale(
        datasets=2,
        scenes=1,
        views=4,
        generic=1,
        people=2,
        held_out=1,
        shots=4,
        detail=24,
        rank=2,
        steps=2,
        rate=1e-3,
        dim=2,
        lora_rank=2,
        tune_steps=2,
        lora_rate=1e-3,
        cores_rate=1e-3,
        images=4,
        draws=10,
    ),
}


@dataclass(frozen=True)
class Step:
    """One command. name: of its record and log. title: for people. words: as typed after `python examples/vggt/`, or
    after nothing for peft-attrsub. product: what is there once it is done. after: names of the steps it waits for."""

    name: str
    title: str
    words: tuple[str, ...]
    product: Path
    after: tuple[str, ...] = ()

    @property
    def typed(self) -> str:
        """The command for people to read, and to type where the demo was started."""
        quoted = " ".join(word if word.endswith("/*") else shlex.quote(word) for word in self.words)
        return quoted if self.words[0] == "peft-attrsub" else f"python examples/vggt/{quoted}"

    @property
    def command(self) -> list[str]:
        """What is started; `folder/*` becomes the folders, as a shell would have it. Made when all before is done."""
        words: list[str] = []
        for word in self.words[1:]:
            if word.endswith("/*"):
                words += sorted(str(path) for path in Path(word[:-2]).iterdir() if not path.name.startswith("."))
            else:
                words.append(word)
        if self.words[0] == "peft-attrsub":
            return [sys.executable, "-m", "peft_attrsub", *words]
        return [sys.executable, str(FOLDER / self.words[0]), *words]


def training_settings(image_size: int, scale: Scale) -> dict[str, Any]:
    """What all trainings of the demo share, for --config. The heads stay frozen, so that the methods differ in nothing
    but what they do to the aggregator."""
    return {
        "heads": "frozen",
        "image_size": image_size,
        "aspect_min": 1.0,
        "aspect_max": 1.0,
        "views_min": min(4, scale.views),
        "views_max": min(4, scale.views),
        "frames": "nearby",
        "window": 2.0,
        "images_per_step": scale.images,
        "gradient_checkpointing": ["none"],
        "workers": 0,
        "eval_share": 0.0,
        "eval_every": 0,
        "panel_every": 0,
        "checkpoint_every": 20,
        "keep": 1,
        "tracker": "none",
    }


def write_settings(out: Path, image_size: int, scale: Scale) -> None:
    """The files of `training_settings` and `measured_views`; not touched where they hold these already."""
    settings = yaml.safe_dump(training_settings(image_size, scale), sort_keys=False)
    for name, text in ((SETTINGS, settings), (MEASURED, json.dumps(measured_views(scale)) + "\n")):
        path = out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text.encode())


def measured_views(scale: Scale) -> dict[str, list[str]]:
    """Held-out room -> every second view."""
    return {_id(number): [f"{view:03d}" for view in range(0, scale.shots, 2)] for number in range(scale.held_out)}


def plan(out: Path, model: str, image_size: int, scale: Scale) -> list[Step]:
    """All commands, in an order in which each one's predecessors stand before it."""
    steps = [*_data(out, image_size, scale), *_mining(out, model, scale), *_tuning(out, model, scale)]
    return [*steps, *_measuring(out, model, image_size)]


def _data(out: Path, size: int, scale: Scale) -> list[Step]:
    scenes = ["--scenes", str(scale.scenes), "--views", str(scale.views), "--size", str(size)]
    # One core per command: the others are taken by the commands beside it.
    scenes = ["generate_scenes.py", "--attribute", "all", "--datasets", str(scale.datasets), *scenes, "--workers", "1"]
    generic = ["--scenes", str(scale.generic), "--views", str(scale.views), "--size", str(size), "--workers", "1"]
    generic = ["generate_scenes.py", "--attribute", "mixed", "--datasets", "1", "--seed", "7", *generic]
    last = f"{ATTRIBUTES[-1]}_{scale.datasets - 1:02d}"
    made = [
        _step(
            "scenes",
            "scenes in which one attribute varies",
            [*scenes, "--out", out / "data"],
            out / "data" / last / "contact_sheet.png",
        ),
    ]
    for seed, (name, rooms) in enumerate((("people", scale.people), ("people-held-out", scale.held_out))):
        words = ["prepare_rooms.py", "people", "--out", out / name, "--scenes", rooms, "--views", scale.shots]
        words += ["--size", size, "--detail", scale.detail, "--seed", seed]
        title = "rooms with people" + (" that nothing is learnt from" if seed else "")
        made.append(_step(name, title, words, out / name / _id(rooms - 1) / CAMERAS))
    words = [*generic, "--out", out / "generic"]
    made.append(_step("generic", "generic scenes", words, out / "generic" / "mixed_00" / "contact_sheet.png"))
    return made


def _mining(out: Path, model: str, scale: Scale) -> list[Step]:
    steps = []
    for number, attribute in enumerate(ATTRIBUTES):
        names = [f"{attribute}_{index:02d}" for index in range(scale.datasets)]
        words = ["train_lora_cluster.py", "--datasets", out / "data", "--only", *names, "--out", out / "adapters"]
        words += ["--model", model, "--rank", scale.rank, "--steps", scale.steps, "--lr", f"{scale.rate:g}"]
        # A LoRA's A starts at random: one start for all attributes would be shared by them without having been learnt,
        # and after few steps a slow one would still be that start.
        words += ["--lora-a-ratio", f"{scale.a_ratio:g}", "--seed", number, "--config", out / SETTINGS]
        product = out / "adapters" / names[-1] / "adapter_config.json"
        steps.append(_step(f"adapters-{attribute}", f"adapters on {attribute}", words, product, ("scenes",)))
    before = tuple(step.name for step in steps)
    words = [
        "peft-attrsub",
        "build-basis",
        f"{out / 'adapters'}/*",
        "-o",
        out / "basis",
        "--dim",
        scale.dim,
        "--overwrite",
    ]
    steps.append(_step("basis", "the subspace of each attribute", words, out / "basis" / "basis_config.json", before))
    words = ["peft-attrsub", "report", out / "basis", "-o", out / "report.html", "--json", out / "analysis.json"]
    words += ["--draws", scale.draws]
    steps.append(_step("report", "the report of the basis", words, out / "report.html", ("basis",)))
    return steps


def _tuning(out: Path, model: str, scale: Scale) -> list[Step]:
    steps = []
    for method, options, rate, before in (
        ("lora", ["--method", "lora", "--rank", scale.lora_rank], scale.lora_rate, ("people",)),
        ("cores", ["--method", "attrsub", "--basis", out / "basis"], scale.cores_rate, ("people", "basis")),
    ):
        words = ["finetune.py", *options, "--benchmark", "human", "--data", out / "people", "--model", model]
        words += ["--steps", scale.tune_steps, "--lr", f"{rate:g}", "--config", out / SETTINGS]
        place = out / "tuned" / method
        title = f"{'a LoRA' if method == 'lora' else 'cores'} on the people"
        steps.append(_step(f"tune-{method}", title, [*words, "--out", place], place / "summary.json", before))
    return steps


def _measuring(out: Path, model: str, size: int) -> list[Step]:
    steps = []
    for method in METHODS:
        for where, benchmark, data in (("people", "human", "people-held-out"), ("scenes", "scenes", "generic")):
            words = ["evaluate.py", "--benchmark", benchmark, "--data", out / data, "--model", model]
            words += ["--image-size", size, "--label", method, "--pictures", "1"]
            if where == "people":
                words += ["--sequences", out / MEASURED]
            before = [data]
            if method != "base":
                words += ["--adapter", out / "tuned" / method / "adapter"]
                before.append(f"tune-{method}")
            place = out / "measured" / f"{where}-{method}"
            words += ["--out", place]
            title = f"{method} on {'held-out people' if where == 'people' else 'generic scenes'}"
            steps.append(_step(f"measure-{where}-{method}", title, words, place / "table.md", tuple(before)))
    return steps


def _step(name: str, title: str, words: Sequence[Any], product: Path, after: tuple[str, ...] = ()) -> Step:
    return Step(name, title, tuple(map(str, words)), product, after)


def _id(index: int) -> str:
    return f"{index:04d}"


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON that a step has left."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record
