"""The demo as a list of commands: each is one that a person could type, with what it leaves and what it waits for."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peft_attrsub.datasets.writing import CAMERAS
from peft_attrsub.evaluation.files import write_atomically

from .scales import ATTRIBUTES, Scale

#: The three rows of the table: the model as it is, and the two ways to tune it.
METHODS = ("base", "lora", "cores")
TUNED = ("lora", "cores")
FOLDER = Path(__file__).resolve().parents[1]
SETTINGS, MEASURED, SPEED = "training.yaml", "measured.json", "speed.json"
SHEET = "contact_sheet.png"
#: Views of the scene that speed.py renders.
VIEWS = 6


@dataclass(frozen=True)
class Step:
    """One command. name: of its record and log. title: for people. words: as typed after `python examples/vggt/`, or
    after nothing for peft-attrsub. product: what is there once it is done. after: names of the steps it waits for.
    parts: how the command calls what it does one after the other, in its progress bars; each takes as long. effort:
    how much of each kind of work it is, by the names of `estimate.KINDS`."""

    name: str
    title: str
    words: tuple[str, ...]
    product: Path
    after: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    effort: Mapping[str, float] = field(default_factory=dict)

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


def opening(out: Path, model: str, image_size: int, scale: Scale) -> list[Step]:
    """The commands that come first: how fast the machine is, and the first scenes. They are the same for all scales
    among which `--scale auto` chooses, and so can be started before the choice."""
    words = ["demonstration/speed.py", "--out", out / "speed", "--config", out / SETTINGS, "--model", model]
    words += ["--size", image_size]
    effort = {"start": 1.2, "dataset": 1, "scene": 1, "step": 4}
    speed = _step("speed", "how fast this machine is", words, out / "speed" / SPEED, effort=effort)
    names = tuple(f"{attribute}_{index:02d}" for attribute in ATTRIBUTES for index in range(scale.datasets))
    words = ["generate_scenes.py", "--attribute", "all", "--datasets", scale.datasets, "--out", out / "data"]
    return [
        speed,
        _rendering("scenes", "scenes in which one attribute varies", words, names, scale.scenes, scale, image_size),
    ]


def plan(out: Path, model: str, image_size: int, scale: Scale) -> list[Step]:
    """All commands, in an order in which each one's predecessors stand before it.

    A free core takes the first that can be started: what shows something early stands early, and what only waits
    for a core stands late, to fill the time in which the long chain (adapters, basis, cores) leaves one free.
    """
    data = {step.name: step for step in _data(out, image_size, scale)}
    measuring = {step.name: step for step in _measuring(out, model, image_size, scale)}
    mining, tuning = _mining(out, model, scale), _tuning(out, model, scale)
    early = [data.pop("people-held-out"), measuring.pop("measure-people-base")]
    return [*opening(out, model, image_size, scale), *early, *mining, *data.values(), *tuning, *measuring.values()]


def _rendering(
    name: str, title: str, words: Sequence[Any], datasets: tuple[str, ...], scenes: int, scale: Scale, size: int
) -> Step:
    """generate_scenes.py for these datasets, on one core: the other ones are taken by other commands."""
    words = [*words, "--scenes", scenes, "--views", scale.views, "--size", size, "--workers", 1]
    place = Path(words[words.index("--out") + 1])
    effort = {"start": 1, "dataset": len(datasets), "scene": len(datasets) * scenes * scale.views / VIEWS}
    return _step(name, title, words, place / datasets[-1] / SHEET, parts=datasets, effort=effort)


def _data(out: Path, size: int, scale: Scale) -> list[Step]:
    made = []
    for seed, (name, rooms) in enumerate((("people", scale.people), ("people-held-out", scale.held_out))):
        words = ["prepare_rooms.py", "people", "--out", out / name, "--scenes", rooms, "--views", scale.shots]
        words += ["--size", size, "--detail", scale.detail, "--seed", seed]
        title = "rooms with people" + (" that nothing is trained on" if seed else "")
        effort = {"start": 1, "room": rooms * scale.shots / 8}
        parts = ("stand-in for THuman", "people in rooms")
        made.append(_step(name, title, words, out / name / _id(rooms - 1) / CAMERAS, parts=parts, effort=effort))
    words = ["generate_scenes.py", "--attribute", "mixed", "--datasets", 1, "--seed", 7, "--out", out / "generic"]
    made.append(_rendering("generic", "generic scenes", words, ("mixed_00",), scale.generic, scale, size))
    return made


def _mining(out: Path, model: str, scale: Scale) -> list[Step]:
    steps = []
    for number, attribute in enumerate(ATTRIBUTES):
        names = [f"{attribute}_{index:02d}" for index in range(scale.datasets)]
        words = ["train_lora_cluster.py", "--datasets", out / "data", "--only", *names, "--out", out / "adapters"]
        words += ["--model", model, "--rank", scale.rank, "--steps", scale.steps, "--lr", f"{scale.rate:g}"]
        # A LoRA's A starts at random. With one start for all attributes they would share it without having learned
        # it, and after a few slow steps A would still be that start.
        words += ["--lora-a-ratio", f"{scale.a_ratio:g}", "--seed", number, "--config", out / SETTINGS]
        product = out / "adapters" / names[-1] / "adapter_config.json"
        effort = {"start": 1, "adapter": len(names), "step": len(names) * scale.steps}
        title = f"adapters on {attribute}"
        steps.append(_step(f"adapters-{attribute}", title, words, product, ("scenes",), tuple(names), effort))
    before = tuple(step.name for step in steps)
    words = ["peft-attrsub", "build-basis", f"{out / 'adapters'}/*", "-o", out / "basis", "--dim", scale.dim]
    words += ["--overwrite"]
    product, effort = out / "basis" / "basis_config.json", {"start": 1, "mining": len(ATTRIBUTES) * scale.datasets / 8}
    steps.append(_step("basis", "the subspace of each attribute", words, product, before, effort=effort))
    words = ["peft-attrsub", "report", out / "basis", "-o", out / "report.html", "--json-file", out / "analysis.json"]
    words += ["--draws", scale.draws]
    product = out / "report.html"
    steps.append(_step("report", "the report of the basis", words, product, ("basis",), effort={"start": 1}))
    return steps


def _tuning(out: Path, model: str, scale: Scale) -> list[Step]:
    steps = []
    for method, options, rate, before in (
        ("cores", ["--method", "attrsub", "--basis", out / "basis"], scale.cores_rate, ("people", "basis")),
        ("lora", ["--method", "lora", "--rank", scale.lora_rank], scale.lora_rate, ("people",)),
    ):
        words = ["finetune.py", *options, "--benchmark", "human", "--data", out / "people", "--model", model]
        words += ["--steps", scale.tune_steps, "--lr", f"{rate:g}", "--config", out / SETTINGS]
        place = out / "tuned" / method
        title = f"{'a LoRA' if method == 'lora' else 'cores'} on the people"
        words, effort = [*words, "--out", place], {"start": 1, "adapter": 1, "step": scale.tune_steps}
        steps.append(_step(f"tune-{method}", title, words, place / "summary.json", before, (method,), effort))
    return steps


def _measuring(out: Path, model: str, size: int, scale: Scale) -> list[Step]:
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
            effort = {"start": 1, "sequence": scale.held_out if where == "people" else scale.generic}
            name, product = f"measure-{where}-{method}", place / "table.md"
            steps.append(_step(name, title, words, product, tuple(before), (benchmark,), effort))
    return steps


def _step(
    name: str,
    title: str,
    words: Sequence[Any],
    product: Path,
    after: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
    effort: Mapping[str, float] | None = None,
) -> Step:
    return Step(name, title, tuple(map(str, words)), product, after, parts, dict(effort or {}))


def _id(index: int) -> str:
    return f"{index:04d}"


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON that a step has left."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record
