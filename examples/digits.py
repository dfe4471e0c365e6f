"""Attribute subspaces on real data, on a CPU, in a few minutes: the method is not tied to 3D.

    pip install peft-attrsub[demo]
    python examples/digits.py [--out demo-output] [--seeds 5] [--workers 2] [--quick]

1. A small transformers ViT learns plain handwritten digits (scikit-learn's, no download).
2. Per attribute (rotation, thickness, contrast, shift) stock PEFT trains a few LoRA adapters, each on data in which
   only that attribute varies.
3. `peft-attrsub build-basis` mines one subspace per attribute from the saved adapters; `report` shows what is in them.
4. On a new task with 20, 50 or 200 labels, in which all attributes vary at once, only the cores are trained: from
   zero, and from the consensus of the source adapters (`init_weights="consensus"`, scales by `calibrate_start`).
   Rivals: LoRA and full fine-tuning from the same two starts, and cores in principal singular vectors (PSV), in
   random directions, or in those of the task's gradient. Every method gets the same pictures, the same steps and the
   same sweep of the learning rate on a validation split.
5. The tuned cores are saved, reloaded, exported to LoRA, and loaded by stock PEFT without this package.

A summary table is printed; `summary.json` in the output folder holds all numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from digits_data import Digits
    from torch import Tensor, nn

    from peft_attrsub import AttrSubspaceConfig

# What learns is imported where it is used: --help does without it, and the process that checks the export must do
# without peft_attrsub.

MARKER = ".peft-attrsub-digits"  # in every folder made by this script: it may be written again
WRITTEN = ("base", "adapters", "basis", "report.html", "core", "lora", "summary.json")

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The size of everything."""

    seed: int = 0  # of the splits, the base model and the source adapters
    seeds: int = 5  # fine-tuning runs per method
    pretrain_steps: int = 800
    source_adapters: int = 4  # per attribute
    source_rank: int = 8
    source_steps: int = 200
    source_learning_rate: float = 5e-3
    dim: int = 8  # directions per attribute
    labels: tuple[int, ...] = (20, 50, 200)  # pictures of the new task; all methods with the most of them
    steps: int = 120  # of fine-tuning
    batch: int = 32
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)


FULL = Settings()
QUICK = Settings(
    seeds=1,
    pretrain_steps=50,
    source_adapters=2,
    source_rank=4,
    source_steps=4,
    dim=4,
    labels=(20, 40),
    steps=3,
    learning_rates=(3e-3,),
)


@dataclass(frozen=True)
class Method:
    """A row of the table: `kind` is base, full, lora, psv, random, gradient, dials or attrsub; `size` rank or side.

    start: it begins at the consensus of the source adapters, calibrated on the labels, and not at zero. few: it also
    runs with fewer labels than the most.
    """

    label: str
    kind: str
    size: int = 0
    start: bool = False
    few: bool = False


def list_methods(settings: Settings) -> list[Method]:
    from digits_data import ATTRIBUTES

    methods = [Method("base model, untuned", "base", few=True), Method("full fine-tuning", "full", few=True)]
    methods += [Method(f"LoRA, rank {rank}", "lora", rank, few=rank == 4) for rank in (1, 4)]
    side = settings.dim * len(ATTRIBUTES)
    methods.append(Method(f"cores {side} x {side}, random", "random", side))
    methods.append(Method(f"cores {side} x {side}, PSV", "psv", side))
    methods.append(Method(f"cores {side} x {side}, gradient", "gradient", side, few=True))
    methods.append(Method(f"cores {side} x {side}, attributes", "attrsub", side, few=True))
    methods.append(Method("consensus alone", "base", start=True, few=True))
    methods.append(Method("full, from the consensus", "full", start=True))
    methods.append(Method("LoRA, rank 4, from the consensus", "lora", 4, start=True))
    methods.append(Method("dials, from the consensus", "dials", start=True))
    methods.append(Method(f"cores {side} x {side}, gradient, from the consensus", "gradient", side, start=True))
    methods.append(Method(f"cores {side} x {side}, from the consensus", "attrsub", side, start=True, few=True))
    return methods


def list_jobs(settings: Settings) -> list[tuple[Method, int]]:
    """Every method with every number of labels that it is run with."""
    methods, most = list_methods(settings), max(settings.labels)
    return [(method, labels) for labels in settings.labels for method in methods if method.few or labels == most]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The attribute-subspace method end to end, on scikit-learn's handwritten digits.",
        epilog="Six to nine minutes on two CPU cores; about one with --quick, whose numbers mean nothing.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="output folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help=f"fine-tuning runs per method (default: {FULL.seeds})")
    parser.add_argument("--seed", type=int, default=0, help="of splits, base model and source adapters (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny settings: shows that it runs, nothing more")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds other files")
    args = parser.parse_args(arguments)
    if find_spec("peft_attrsub") is None:  # now, and not after minutes of training
        parser.error("peft_attrsub is not installed: run pip install peft-attrsub[demo].")
    settings = replace(QUICK if args.quick else FULL, seed=args.seed)
    if args.seeds is not None:
        settings = replace(settings, seeds=args.seeds)
    if settings.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1.")
    try:
        prepare_folder(args.out, args.overwrite)
    except FileExistsError as error:
        parser.error(str(error))
    summary = {"quick": args.quick} | run_demo(args.out, settings, args.workers)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_summary(summary)
    print(f"All numbers: {args.out / 'summary.json'}; the basis to look at in a browser: {args.out / 'report.html'}")
    return 0


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Make `out` ready; of what is there, only what an earlier run wrote is removed."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a folder: give another --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file() and not overwrite:
        raise FileExistsError(f"{out} holds files that this script did not write: give another --out, or --overwrite.")
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (out / MARKER).touch()


def run_demo(out: Path, settings: Settings, workers: int) -> Result:
    """All five parts; returns the summary."""
    from digits_data import ATTRIBUTES
    from digits_model import Workers

    seconds: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[phase] = round(time.perf_counter() - start, 1)

    jobs = list_jobs(settings)
    with Workers(workers) as pool:
        with timed("base model"):
            base = pretrain(out, settings)
        with timed("source adapters"):
            wanted = [(out, settings, a, i) for a in ATTRIBUTES for i in range(settings.source_adapters)]
            sources = pool.run(train_source_adapter, wanted, "2/5 source adapters")
        with timed("build-basis"):
            build_basis(out, settings)
        with timed("calibration"):
            drawings = [(n, run) for n in settings.labels for run in (None, *range(settings.seeds))]
            found = pool.run(calibrate, [(out, settings, *drawing) for drawing in drawings], "4/5 calibration")
            scales = dict(zip(drawings, found, strict=True))
        with timed("learning rates"):
            rates = settings.learning_rates
            trials = [
                (out, settings, m, n, lr, None, scales[n, None]) for m, n in jobs if m.kind != "base" for lr in rates
            ]
            sweep = pool.run(fine_tune, trials, "4/5 learning rates")
        best = {(m, n): best_learning_rate(m, n, sweep) for m, n in jobs}
        with timed("comparison"):
            runs = [
                (out, settings, m, n, best[m, n], run, scales[n, run])
                for m, n in jobs
                for run in range(settings.seeds)
            ]
            results = pool.run(fine_tune, runs, "4/5 comparison")
    with timed("export"):
        export = reload_and_export(out, settings)
    seconds["total"] = round(sum(seconds.values()), 1)
    from peft_attrsub._machine import available_cores

    return {
        "versions": versions(),
        "machine": {"cores": available_cores(), "workers": workers},
        "settings": asdict(settings),
        "base": base,
        "source_adapters": sources,
        "methods": [table_row(m, n, best[m, n], results, sweep) for m, n in jobs],
        "export": export,
        "seconds": seconds,
    }


# --- 1. The base model -------------------------------------------------------------------------------------------


def pretrain(out: Path, settings: Settings) -> Result:
    """Train the ViT on plain digits and save it."""
    import torch
    from digits_data import plain
    from digits_model import accuracy, fit, new_vit, stream

    model = new_vit(settings.seed)
    source, test = splits(settings.seed)["source"], splits(settings.seed)["test"]
    generator = stream(settings.seed, "base")

    def batch() -> tuple[Tensor, Tensor]:
        digits = source.pick(torch.randint(len(source), (64,), generator=generator))
        return plain(digits, generator, half_width=0.15), digits.labels

    fit(model, batch, settings.pretrain_steps, lr=2e-3, weight_decay=0.05, title="1/5 base model")
    model.save_pretrained(out / "base")
    pictures = plain(test, stream(settings.seed, "plain test"))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "plain_accuracy": accuracy(model, pictures, test.labels)}


# --- 2. Source adapters ------------------------------------------------------------------------------------------


def train_source_adapter(out: Path, settings: Settings, attribute: str, index: int) -> Result:
    """One LoRA by stock PEFT on digits in which only `attribute` varies; saved as adapters/<attribute>-<index>."""
    import torch
    from digits_data import Digits, attribute_dataset
    from digits_model import TARGETS, accuracy, fit, load_vit, stream
    from peft import LoraConfig, get_peft_model

    name, rank = f"{attribute}-{index}", settings.source_rank
    generator = stream(settings.seed, "source", name)
    source, test = splits(settings.seed)["source"].repeat(2), splits(settings.seed)["test"]
    # Drawn in one go, so that the other attributes stand still at the same place in training and test.
    digits = Digits(torch.cat([source.images, test.images]), torch.cat([source.labels, test.labels]))
    pictures = attribute_dataset(digits, attribute, generator)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(source), (64,), generator=generator)
        return pictures[chosen], digits.labels[chosen]

    model = load_vit(out / "base")
    before = accuracy(model, pictures[len(source) :], test.labels)
    torch.manual_seed(settings.seed + index)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    fit(model, batch, settings.source_steps, settings.source_learning_rate)
    model.save_pretrained(out / "adapters" / name)
    return {"name": name, "before": before, "after": accuracy(model, pictures[len(source) :], test.labels)}


# --- 3. The basis ------------------------------------------------------------------------------------------------


def build_basis(out: Path, settings: Settings) -> None:
    """The command a user would type; attributes are named after the folders ("rotation-0" is of "rotation")."""
    print(f"3/5 peft-attrsub build-basis {out / 'adapters'}/* -o {out / 'basis'} --dim {settings.dim}", flush=True)
    folders = sorted(str(path) for path in (out / "adapters").iterdir())
    command = ["build-basis", *folders, "-o", str(out / "basis"), "--dim", str(settings.dim)]
    subprocess.run([sys.executable, "-m", "peft_attrsub", *command], check=True)
    print(f"3/5 peft-attrsub report {out / 'basis'} -o {out / 'report.html'}", flush=True)
    command = ["report", str(out / "basis"), "-o", str(out / "report.html"), "--title", "Digits: the mined basis"]
    subprocess.run([sys.executable, "-m", "peft_attrsub", *command], check=True)


# --- 4. The comparison -------------------------------------------------------------------------------------------


def drawing(settings: Settings, labels: int, run: int | None) -> tuple[Tensor, Tensor, torch.Generator]:
    """The labeled pictures of a run, the same for all methods, and the generator that drew them.

    `run=None` is the sweep, which has pictures of its own.
    """
    from digits_data import mixture
    from digits_model import stream

    generator = stream(settings.seed, "tune", run)
    few = splits(settings.seed)["tune"].take(labels, generator)
    return mixture(few, generator), few.labels, generator


def calibrate(out: Path, settings: Settings, labels: int, run: int | None) -> dict[str, float]:
    """The scales of the consensus that the labeled pictures of a run ask for."""
    from digits_model import load_vit
    from peft import get_peft_model

    from peft_attrsub import calibrate_start

    pictures, answers, _ = drawing(settings, labels, run)
    model = get_peft_model(load_vit(out / "base"), consensus(out, "full", {}))
    return calibrate_start(model, in_batches(pictures, answers), loss_of, max_steps=8, verbose=False)


def in_batches(pictures: Tensor, answers: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pictures.chunk(4), answers.chunk(4), strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(model(pixel_values=batch[0]).logits, batch[1])


def fine_tune(
    out: Path,
    settings: Settings,
    method: Method,
    labels: int,
    lr: float,
    run: int | None,
    scales: dict[str, float],
) -> Result:
    """Tune by one method on the new task. `run=None` is the sweep: pictures of its own, scored on validation.

    The training pictures and their order differ between runs and are the same for all methods. The classifier's head
    is frozen in all but full fine-tuning, as it was for the source adapters. scales: of the consensus.
    """
    import torch
    from digits_model import accuracy, fit, load_vit

    pictures, answers, generator = drawing(settings, labels, run)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(answers), generator=generator)[: settings.batch]
        return pictures[chosen], answers[chosen]

    torch.manual_seed(run or 0)
    model = adapt(load_vit(out / "base"), out, method, scales, seed=run or 0, labeled=(pictures, answers))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method.kind == "base":
        trainable = len(scales) if method.start else 0
    else:
        fit(model, batch, settings.steps, lr)
    if run == 0 and (method, labels) == list_jobs(settings)[-1]:
        model.save_pretrained(out / "core")  # part 5 takes it from there
    score = accuracy(model, *held_out(settings, "validation" if run is None else "test"))
    result = {"label": method.label, "labels": labels, "lr": lr, "run": run, "trainable": trainable}
    return result | {"accuracy": score, "scales": scales if method.start else {}}


def consensus(out: Path, core: str, scales: dict[str, float]) -> AttrSubspaceConfig:
    """Cores in the mined basis that start at the consensus of its attributes."""
    from peft_attrsub import AttrSubspaceConfig

    return AttrSubspaceConfig(basis=str(out / "basis"), core=core, init_weights="consensus", init_scale=scales or None)


def adapt(
    model: nn.Module,
    out: Path,
    method: Method,
    scales: dict[str, float],
    seed: int,
    labeled: tuple[Tensor, Tensor],
) -> nn.Module:
    """The base model made ready for `method`; `scales` are of the consensus that it starts at."""
    from digits_data import ATTRIBUTES
    from digits_model import TARGETS
    from peft import LoraConfig, get_peft_model

    from peft_attrsub import AttrSubspaceConfig, gradient_basis

    if method.start:
        started = get_peft_model(model, consensus(out, "dials" if method.kind == "dials" else "full", scales))
        if method.kind in ("attrsub", "dials"):
            return started
        model = started.merge_and_unload().requires_grad_(True)  # others train the base, or a LoRA, from there
    if method.kind == "base":
        return model.requires_grad_(False)
    if method.kind == "full":
        return model
    if method.kind == "lora":
        config = LoraConfig(r=method.size, lora_alpha=2 * method.size, target_modules=TARGETS)
    elif method.kind == "attrsub":
        config = AttrSubspaceConfig(basis=str(out / "basis"), dim=method.size // len(ATTRIBUTES))
    elif method.kind == "gradient":
        found = gradient_basis(model.eval(), in_batches(*labeled), method.size, loss_fn=loss_of, modules=TARGETS)
        config = AttrSubspaceConfig(basis=found)
    else:
        config = AttrSubspaceConfig(basis=method.kind, dim=method.size, target_modules=TARGETS, seed=seed)
    return get_peft_model(model, config)


def held_out(settings: Settings, split: str) -> tuple[Tensor, Tensor]:
    """Three drawings of every digit of the split, the same for all methods and runs."""
    from digits_data import mixture
    from digits_model import stream

    digits = splits(settings.seed)[split].repeat(3)
    return mixture(digits, stream(settings.seed, split)), digits.labels


def best_learning_rate(method: Method, labels: int, sweep: list[Result]) -> float:
    """The rate with the best validation accuracy, the smaller one of equals; 0 where nothing is trained."""
    trials = [r for r in sweep if (r["label"], r["labels"]) == (method.label, labels)]
    return max(trials, key=lambda r: (r["accuracy"], -r["lr"]))["lr"] if trials else 0.0


def table_row(method: Method, labels: int, lr: float, results: list[Result], sweep: list[Result]) -> Result:
    runs, trials = (
        [r for r in rows if (r["label"], r["labels"]) == (method.label, labels)] for rows in (results, sweep)
    )
    scores = [r["accuracy"] for r in runs]
    return {
        "label": method.label,
        "labels": labels,
        "kind": method.kind,
        "size": method.size,
        "start": method.start,
        "trainable": runs[0]["trainable"],
        "learning_rate": lr,
        "accuracy": statistics.mean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "accuracies": scores,
        "scales": [r["scales"] for r in runs] if method.start else [],
        "validation": {str(r["lr"]): r["accuracy"] for r in trials},
    }


# --- 5. Reload and export ----------------------------------------------------------------------------------------


def reload_and_export(out: Path, settings: Settings) -> Result:
    """Load the saved cores, export them to LoRA, and compare the logits in a process that has stock PEFT only."""
    import torch
    from digits_model import accuracy, load_vit, logits
    from peft import PeftModel

    from peft_attrsub import export_lora

    pictures, labels = held_out(settings, "test")
    model = PeftModel.from_pretrained(load_vit(out / "base"), out / "core")
    expected = logits(model, pictures)
    print(f"5/5 export_lora(model, {str(out / 'lora')!r})", flush=True)
    export_lora(model, out / "lora")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        exported, alone = fresh.submit(stock_peft_logits, out, pictures.numpy()).result()
    return {
        "reloaded_accuracy": accuracy(model, pictures, labels),
        "largest_logit": expected.abs().max().item(),
        "max_abs_difference": (torch.from_numpy(exported) - expected).abs().max().item(),
        "without_peft_attrsub": alone,
    }


def stock_peft_logits(out: Path, pictures: Any) -> tuple[Any, bool]:
    """Logits of the exported LoRA, and whether peft_attrsub stayed out of this process."""
    import torch
    from digits_model import load_vit, logits
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_vit(out / "base"), out / "lora")
    return logits(model, torch.from_numpy(pictures)).numpy(), "peft_attrsub" not in sys.modules


# --- The summary -------------------------------------------------------------------------------------------------


@cache
def splits(seed: int) -> dict[str, Digits]:
    from digits_data import load_splits

    return load_splits(seed)


def versions() -> dict[str, str]:
    import peft_attrsub

    libraries = {name: version(name) for name in ("peft", "transformers", "torch", "scikit-learn")}
    return {"peft_attrsub": peft_attrsub.__version__, "python": platform.python_version()} | libraries


def print_summary(summary: Result) -> None:
    from digits_data import ATTRIBUTES

    settings, base, export = summary["settings"], summary["base"], summary["export"]
    print(f"\nThe base model: {base['parameters']:,} parameters, {base['plain_accuracy']:.1f} % on plain digits.")
    print("\nSource adapters: % right on unseen digits of their own dataset, base model -> adapter")
    for attribute in ATTRIBUTES:
        mine = [s for s in summary["source_adapters"] if s["name"].startswith(attribute)]
        print(f"  {attribute:<10}" + "".join(f"  {s['before']:5.1f} -> {s['after']:5.1f}" for s in mine))
    for labels in settings["labels"]:
        print(f"\nThe new task, all attributes at once: {labels} labels, {settings['seeds']} runs")
        print(f"  {'method':<34}{'trainable':>10}{'rate':>9}{'accuracy %':>12}{'std':>6}")
        for row in (row for row in summary["methods"] if row["labels"] == labels):
            rate = f"{row['learning_rate']:g}" if row["learning_rate"] else "-"
            print(f"  {row['label']:<34}{row['trainable']:>10,}{rate:>9}{row['accuracy']:>12.1f}{row['std']:>6.1f}")
    print(
        f"\nThe last row exported to LoRA and loaded by stock PEFT: logits up to {export['largest_logit']:.1f}, "
        f"largest difference {export['max_abs_difference']:.1e}"
    )
    print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a "?" for what the console's encoding lacks
    sys.exit(main())
