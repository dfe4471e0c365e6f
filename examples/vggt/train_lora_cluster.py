"""One LoRA adapter per synthetic dataset: the source adapters that a basis is mined from.

    python examples/vggt/train_lora_cluster.py --datasets data/ --out adapters/            # one process
    python examples/vggt/train_lora_cluster.py --datasets data/ --out adapters/ --launcher slurm --gpus 1 --mem 64G
    python examples/vggt/train_lora_cluster.py --datasets data/ --out adapters/ --launcher local --parallel 2 --dry-run
    peft-attrsub build-basis adapters/* -o basis

Every folder below --datasets that holds a dataset of generate_scenes.py gives the adapter OUT/<its name>, such as
adapters/texture_00. Its adapter_config.json says what it was trained on (auto_mapping.training: attribute, digest and
seed of the dataset, seed and steps of the training, name and sha256 of the base). The frozen base is loaded once per
process. All settings of finetune.py hold, but for --method, --data and --out of a single run. Runs with their
checkpoints and logs are in OUT/.runs. Whatever stops a job, the same command continues it; what is done is not done
again. --check reads all datasets and reports what is wrong with them, before any training.

Exit status: 0 all adapters are there; 1 some are not (the table says why), or --check found problems; 2 wrong
arguments or data; 128 + n stopped by signal n.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

RUNS, DATASET, CONFIG = ".runs", "dataset.json", "adapter_config.json"


@dataclass
class ClusterSettings:
    """Which datasets, and how they are shared out."""

    _argument_group_name = "the cluster"

    datasets: str | None = field(default=None, metadata={"help": "folder of datasets, at any depth"})
    only: list[str] | None = field(default=None, metadata={"help": "these datasets alone, by their names"})
    per_job: int = field(default=1, metadata={"help": "with --launcher: adapters per job, on one load of the base"})

    def __post_init__(self) -> None:
        if self.per_job < 1:
            raise ValueError(f"--per-job is {self.per_job}: give 1 or more.")


def find_datasets(root: Path) -> dict[str, Path]:
    """Name of each dataset below a folder, its last part, to its path; sorted. ValueError for two of one name."""
    if not root.is_dir():
        raise FileNotFoundError(f"--datasets {root} is no folder: give the one that generate_scenes.py wrote to.")
    found: dict[str, Path] = {}
    for path in sorted(root.rglob(DATASET)):
        name = path.parent.resolve().name
        if name in found:
            raise ValueError(f"{found[name]} and {path.parent} would both be called {name}: rename one of them.")
        found[name] = path.parent
    if not found:
        raise ValueError(f"--datasets {root} holds no dataset: make some with generate_scenes.py --out {root}.")
    return found


def tags_of(folder: Path) -> dict[str, Any]:
    """What an adapter says of its dataset. ValueError for one that is not finished: its digest is not known yet."""
    record = json.loads((folder / DATASET).read_text(encoding="utf-8"))
    if record.get("digest") is None:
        raise ValueError(f"{folder} is not finished: run generate_scenes.py again, it continues.")
    return {
        "attribute": record.get("attribute"),
        "dataset": folder.resolve().name,
        "dataset_digest": record["digest"],
        "dataset_seed": (record.get("seeds") or {}).get("dataset"),
    }


def is_done(out: Path, name: str) -> bool:
    return (out / name / CONFIG).exists()


def check_done(out: Path, names: Sequence[str], random_weights: int | None) -> None:
    """ValueError where an adapter that is there was trained on untrained weights and now others are asked for, or the
    other way round: all of them are to be mined together. Told by the seed alone, so that no base is loaded for it."""
    from peft_attrsub.basis.identity import adapter_base

    for name in names:
        if not is_done(out, name):
            continue
        base = adapter_base(json.loads((out / name / CONFIG).read_text(encoding="utf-8")))
        if base is not None and base.seed != random_weights:
            asked = "trained weights" if random_weights is None else f"untrained weights, seed {random_weights}"
            raise ValueError(f"{out / name} was made on {base}, and this call asks for {asked}: give another --out.")


def publish(adapter: Path, final: Path) -> None:
    """Copy a finished adapter to its place in one step."""
    beside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(adapter, beside)
    beside.replace(final)


def train_all(chosen: dict[str, Path], out: Path, settings: tuple[Any, Any, Any]) -> int:
    """Train the adapters that are not there yet, one after the other on one base; 128 + n where signal n came."""
    from _model import identify
    from training.run import load_vggt, run

    from peft_attrsub.interrupts import say_stopped

    model, data, train = settings
    vggt = base = None
    for name, folder in chosen.items():
        if is_done(out, name):
            print(f"{name}: done already", flush=True)
            continue
        tags = tags_of(folder)
        # Heads that are trained in full cannot be taken off a base again.
        if vggt is None or model.heads == "full":
            vggt = load_vggt(model)
            base = base or identify(vggt, model.model, model.random_weights)
        place = out / RUNS / name
        done = run(
            model, replace(data, data=str(folder)), replace(train, out=str(place)), vggt=vggt, base=base, tags=tags
        )
        if "stopped" in done:
            say_stopped("train_lora_cluster")
            return 128 + int(done["stopped"])
        publish(place / "adapter", out / name)
        print(f"{name}: done", flush=True)
    return 0


def launch(chosen: dict[str, Path], out: Path, per_job: int, options: Any, arguments: Sequence[str]) -> int:
    """A job for every `per_job` datasets: this script with --only."""
    from training.launcher import Job, launch, script_command, without_options

    names, jobs = [name for name in chosen if not is_done(out, name)], []
    if len(names) < len(chosen):
        print(f"{len(chosen) - len(names)} of {len(chosen)} adapters are there already", flush=True)
    if not names:
        return 0
    for start in range(0, len(names), per_job):
        part = names[start : start + per_job]
        label = part[0] if len(part) == 1 else f"{part[0]}..{part[-1]}"
        command = script_command(__file__, [*without_options(arguments), "--only", *part], options)
        jobs.append(Job(label, command, out / RUNS / "jobs" / label, out / part[-1] / CONFIG))
    return int(launch(jobs, options, out / RUNS / "jobs", "lora-cluster"))


def main(arguments: Sequence[str] | None = None) -> int:
    from training.launcher import LauncherOptions
    from training.settings import DataSettings, ModelSettings, TrainSettings, parse_types

    from peft_attrsub.interrupts import until_stopped

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    kinds = (ClusterSettings, LauncherOptions, ModelSettings, DataSettings, TrainSettings)
    try:
        cluster, options, model, data, train = parse_types(
            kinds, ["--method", "lora", *arguments], required=("datasets", "out"), description=__doc__
        )
        if model.method != "lora" or data.data is not None:
            raise ValueError(
                "every adapter is a LoRA on a dataset of its own: --method and --data are not chosen here."
            )
        found, out = find_datasets(Path(cluster.datasets)), Path(train.out)
        if unknown := [name for name in cluster.only or () if name not in found]:
            raise ValueError(f"--only {unknown[0]}: there is no such dataset in {cluster.datasets}.")
        chosen = {name: path for name, path in found.items() if cluster.only is None or name in cluster.only}
        if train.check:
            from training.checks import report_data

            status = 0
            for name, path in chosen.items():
                print(f"{name}:", flush=True)
                status |= report_data(replace(data, data=str(path)))
            return status
        for path in chosen.values():
            tags_of(path)  # refuses what is not finished before the first hour is spent
        check_done(out, list(chosen), model.random_weights)
        if options.launcher is not None:
            return launch(chosen, out, cluster.per_job, options, arguments)
        return until_stopped("train_lora_cluster", lambda: train_all(chosen, out, (model, data, train)))
    except (ImportError, OSError, ValueError) as error:
        print(f"train_lora_cluster: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
