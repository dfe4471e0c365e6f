"""The paper's columns for any VGGT adapter: a benchmark on disk to numbers, per sequence and in total.

    python examples/vggt/evaluate.py --benchmark human --data THuman --out runs/base
    accelerate launch examples/vggt/evaluate.py --benchmark human --data THuman --adapter my-adapter --out runs/mine
    python examples/vggt/evaluate.py --table runs/base runs/mine            # one Markdown table of several runs
    python examples/vggt/evaluate.py --benchmark human --data THuman --out runs/base --launcher slurm --jobs 8 --gpus 1

In OUT: sequences.csv, summary.json (means, settings, precision, versions), table.md, and pictures/ of the first
sequences: PNG of prediction beside truth and error, PLY of both clouds. Whatever stops a run, the same command
continues it; several processes share the sequences.

Exit status: 0 all is measured; 1 sequences could not be read (they are named); 2 wrong arguments.
With --launcher: 0 all is measured, 1 jobs failed or were stopped, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training.launcher import Job, add_options, options_of, script_command, without_options
from training.launcher import launch as run_jobs
from training.options import number_or_none

BENCHMARKS = ("face", "face-real", "human", "clearpose", "scenes")
PRECISIONS = ("auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32")
PRECISION = "precision.json"


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    out = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = out.add_argument_group("what is measured")
    what.add_argument("--benchmark", choices=BENCHMARKS)
    what.add_argument("--data", type=Path, metavar="ROOT", help="folder of the benchmark, as it is published")
    what.add_argument("--sequences", type=Path, metavar="JSON", help="{sequence: [frames]}: these alone, these frames")
    what.add_argument("--split", help="clearpose: test (default), train, all; human: all (default), train, test")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N sequences")
    model = out.add_argument_group("the model")
    model.add_argument("--model", default="facebook/VGGT-1B", help="folder or Hub id (default: facebook/VGGT-1B)")
    model.add_argument("--adapter", help="folder or Hub id of a PEFT adapter; without one, the model as it is")
    model.add_argument("--merge", action="store_true", help="fold the adapter into the weights first")
    model.add_argument(
        "--random-weights",
        type=number_or_none(int),
        metavar="SEED",
        help="untrained; --model is then a preset: vggt-1b, vggt-mini (default: none)",
    )
    model.add_argument("--image-size", type=int, help="width in pixels that VGGT sees (default: its own, 518)")
    model.add_argument(
        "--precision",
        choices=PRECISIONS,
        metavar="{auto,bf16,fp16,fp32}",
        default="auto",
        help="of the aggregator (default: auto, what the device computes natively; a continued run keeps its own)",
    )
    model.add_argument(
        "--dtype", dest="precision", choices=PRECISIONS, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    how = out.add_argument_group("the protocol (defaults: the release's)")
    how.add_argument("--align", choices=("sim3+icp", "sim3", "scale", "median", "none"), help="of point maps")
    how.add_argument("--icp-threshold", type=float, help="in the truth's unit (default: 0.1)")
    how.add_argument("--depth-align", choices=("release", "video", "moge", "median", "none"), help="face-real")
    how.add_argument("--depth-solver", choices=("irls", "adam"), default="irls", help="irls: exact (default)")
    how.add_argument("--depth-scope", choices=("frame", "sequence"), help="one fit per frame or per sequence")
    how.add_argument("--max-queries", type=int, default=500_000, help="points that look for a neighbour")
    how.add_argument("--exact", action="store_true", help="all points do")
    how.add_argument("--seed", type=int, default=0)
    where = out.add_argument_group("what is written")
    where.add_argument("--out", type=Path, metavar="DIR")
    where.add_argument("--label", help="name of the run in tables (default: the adapter's run, or the model)")
    where.add_argument("--trainable-parameters", type=int, help="for a model that was tuned in full or merged")
    where.add_argument("--pictures", type=int, default=3, metavar="N", help="of the first N sequences (default: 3)")
    where.add_argument("--table", type=Path, nargs="+", metavar="RUN", help="join runs into a table, and no more")
    who = out.add_argument_group("who measures what")
    who.add_argument("--jobs", type=int, default=1, metavar="N", help="with --launcher: share the sequences among N")
    who.add_argument("--share", default="0/1", metavar="K/N", help="only every N-th sequence from the K-th, K < N")
    add_options(out)
    return out


def share(args: argparse.Namespace) -> tuple[int, int]:
    """K and N of --share K/N."""
    match = re.fullmatch(r"(\d+)/(\d+)", args.share)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"--share is {args.share}: give K/N with 0 <= K < N, such as 0/8 for the first of eight.")
    return int(match[1]), int(match[2])


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that do not fit."""
    for name in ("benchmark", "data", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: see --help.")
    if args.merge and not args.adapter:
        raise ValueError("--merge folds an adapter into the weights: give --adapter as well.")
    if args.split is not None and args.benchmark not in ("human", "clearpose"):
        raise ValueError(f"--split is for human and clearpose: {args.benchmark} has no splits.")
    share(args)
    for name in ("limit", "max_queries", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more.")


def join(runs: Sequence[Path]) -> str:
    """One Markdown table of finished runs of one benchmark."""
    from peft_attrsub.evaluation.labels import summary_labels
    from peft_attrsub.evaluation.markdown import markdown_table
    from peft_attrsub.evaluation.tables import read_summary

    summaries = [read_summary(run) for run in runs]
    names = {summary["settings"].get("benchmark") for summary in summaries}
    if len(names) > 1:
        raise ValueError(f"the runs are of several benchmarks ({', '.join(sorted(map(str, names)))}): one table each.")
    labels = summary_labels(summaries, runs)
    named = [summary | {"label": label} for summary, label in zip(summaries, labels, strict=True)]
    return markdown_table(named, columns(named))


def columns(summaries: Sequence[dict[str, Any]]) -> list[Any]:
    """The benchmark's columns, and those of its parts that any of the runs has measured."""
    from peft_attrsub.datasets import protocol
    from peft_attrsub.evaluation.markdown import depth_columns, point_columns, relief_columns

    rules = protocol(summaries[0]["settings"]["benchmark"])
    chosen = list(depth_columns() if rules.metrics == "depth" else point_columns(rules.scale))
    if rules.metrics == "depth":
        chosen += depth_columns("scale_")
    if rules.name == "clearpose":
        chosen += point_columns(rules.scale, "transparent_")
    if rules.name.startswith("face"):
        chosen += relief_columns()
    return [column for column in chosen if any(column.key in summary["metrics"] for summary in summaries)]


def evaluate(args: argparse.Namespace) -> int:
    import _model
    import torch
    from _measure import How
    from accelerate import PartialState

    from peft_attrsub.datasets import open_benchmark, protocol
    from peft_attrsub.evaluation.files import write_atomically
    from peft_attrsub.evaluation.tables import start_run
    from peft_attrsub.vggt.precision import DTYPES

    check(args)
    rules = protocol(args.benchmark)
    options = {key: getattr(args, key) for key in ("sequences", "split") if getattr(args, key) is not None}
    dataset = open_benchmark(args.benchmark, args.data, **options)
    names = dataset.names[: args.limit]
    # Without a device accelerate has to be told, or it would not see the other processes of torchrun.
    state = PartialState(cpu=not torch.accelerator.is_available())
    device = state.device
    precision, told = choose(args, device)
    patch, own = (
        getattr(_model.load_config(args.model, args.random_weights), k) for k in ("patch_size", "image_size")
    )
    width = own if args.image_size is None else args.image_size
    if width < patch or width % patch:
        raise ValueError(f"--image-size {width} is not a multiple of {patch}, the side of this VGGT's patches.")
    how = How(
        metrics=rules.metrics,
        transparent=rules.name == "clearpose",
        align=args.align or rules.align or rules.depth_align or "none",
        icp_threshold=args.icp_threshold or rules.icp_threshold or 0.1,
        depth_align=args.depth_align or rules.depth_align or "release",
        depth_solver=args.depth_solver,
        depth_scope=args.depth_scope,
        max_queries=args.max_queries,
        exact=args.exact,
        image_size=width,
        dtype=str(DTYPES[precision.name]).removeprefix("torch."),
        seed=args.seed,
        workers=-1 if state.num_processes == 1 else 1,
    )
    loaded = _model.load_model(
        args.model, args.adapter, merge=args.merge, random_weights=args.random_weights, device=device
    )
    with state.main_process_first():
        done = start_run(args.out, settings(args, how, loaded, rules.metrics))
        if not (args.out / PRECISION).exists():
            write_atomically(args.out / PRECISION, (json.dumps(precision.record(), indent=1) + "\n").encode())
    if told and state.is_main_process:
        print(told, file=sys.stderr)
    unreadable = work(args, how, loaded, dataset, names, done, state)
    summary = close(args, names, loaded, rules, _model.provenance(device) | {"processes": state.num_processes})
    if summary["n_missing"] == 0:
        text = join([args.out])
        write_atomically(args.out / "table.md", text.encode())
        print(text, end="")
        for name, reason in summary["skipped"].items():
            print(f"skipped: {name}: {reason}")
    return 1 if unreadable else 0


def choose(args: argparse.Namespace, device: Any) -> tuple[Any, str]:
    """The precision of the run in --out, and the line to print: a new run chooses for the device, one that is
    continued keeps what it began with, as its run.json has it."""
    from peft_attrsub.evaluation.tables import RUN
    from peft_attrsub.vggt.precision import AUTO, Precision, choose_precision, keep_precision, parse_precision

    run = args.out / RUN
    if parse_precision(args.precision) != AUTO or not run.exists():
        chosen = choose_precision(device, args.precision, training=False)
        return chosen, str(chosen)
    older = json.loads(run.read_text(encoding="utf-8")).get("dtype")
    kept = Precision.kept(args.out / PRECISION, older, training=False)
    return kept, keep_precision(kept, device)


def settings(args: argparse.Namespace, how: Any, loaded: Any, metrics: str) -> dict[str, Any]:
    """What a run may only be continued with: all that decides its numbers."""
    chosen = asdict(how) | {"benchmark": args.benchmark, "model": args.model, "adapter_digest": loaded.digest}
    chosen |= {"random_weights": args.random_weights, "base_digest": loaded.base.digest, "merge": args.merge}
    chosen["pixels"] = "centers"  # runs of before this key unprojected predictions half a pixel off
    chosen["split"] = args.split
    chosen["sequences"] = None if args.sequences is None else args.sequences.name
    if metrics == "depth":
        chosen["align"] = chosen["depth_align"]
        unused = ["depth_align", "icp_threshold", "max_queries", "exact"]
    else:
        unused = ["depth_align", "depth_solver", "depth_scope"]
    return {key: value for key, value in chosen.items() if key not in ("workers", "transparent", *unused)}


def work(
    args: argparse.Namespace, how: Any, loaded: Any, dataset: Any, names: Sequence[str], done: set[str], state: Any
) -> int:
    """Measure this process's share of what is not done; the number of sequences that could not be read."""
    from _measure import measure, run_model
    from tqdm import tqdm

    from peft_attrsub.evaluation.skipping import SkippedError
    from peft_attrsub.evaluation.tables import ok_row, skipped_row, write_row

    # By the place among all names: what others have finished meanwhile must not move the shares.
    first, shares = share(args)
    left = [(number, name) for number, name in enumerate(names) if number % shares == first and name not in done]
    mine = left[state.process_index :: state.num_processes]
    unreadable = 0
    # One bar, of the first process: the others' shares are as long.
    for number, name in tqdm(mine, desc=args.benchmark, unit="sequence", disable=not state.is_main_process):
        pictures = args.out / "pictures" if number < args.pictures else None
        try:
            sample = dataset.read(name)
        except (OSError, ValueError) as error:
            # Not stored: a run continues with it once the file is mended.
            print(f"{name} cannot be read: {error}", file=sys.stderr)
            unreadable += 1
            continue
        try:
            row = ok_row(name, measure(sample, run_model(loaded.model, sample, how), how, pictures))
        except SkippedError as error:
            row = skipped_row(name, error.reason)
        write_row(args.out, row)
    return unreadable


def close(
    args: argparse.Namespace, names: Sequence[str], loaded: Any, rules: Any, provenance: dict[str, Any]
) -> dict[str, Any]:
    """CSV and summary of what is there; whichever process comes last writes the whole."""
    from peft_attrsub.evaluation.labels import run_label
    from peft_attrsub.evaluation.tables import finish_run, read_rows

    # As in the release, real faces are weighted by their pixels.
    weights = {"abs_rel": "depth_pixels", "delta": "depth_pixels"} if rules.metrics == "depth" else None
    what = args.adapter or args.model
    trained = loaded.trainable if args.trainable_parameters is None else args.trainable_parameters
    facts = {
        "label": args.label or run_label(os.path.abspath(what) if os.path.isdir(what) else what),
        "trainable_parameters": trained,
        "unit": rules.unit,
        "frames": rules.frames,
        "data": args.data.name,
        "adapter": args.adapter,
        "base": loaded.base.to_dict(),
        "provenance": provenance,
        "precision": json.loads((args.out / PRECISION).read_text(encoding="utf-8")),
    }
    while True:
        summary = finish_run(args.out, names, weights, **facts)
        if len(set(read_rows(args.out)) & set(names)) == summary["n_evaluated"] + summary["n_skipped"]:
            return summary


def launch(args: argparse.Namespace, options: Any, arguments: Sequence[str]) -> int:
    """--jobs jobs, each this script with the same arguments and --share. OUT/.jobs holds logs and states."""
    check(args)
    if share(args)[1] > 1:
        raise ValueError("--share is what --launcher gives its jobs: say --jobs N instead.")
    place, jobs = args.out / ".jobs", []
    for number in range(args.jobs):
        chosen = ["--share", f"{number}/{args.jobs}"]
        command = script_command(__file__, [*without_options(arguments), *chosen], options)
        name = f"share-{number:0{len(str(args.jobs - 1))}}-of-{args.jobs}"
        jobs.append(Job(name, command, place / name))
    status = int(run_jobs(jobs, options, place, "evaluate"))
    if status == 0 and (args.out / "table.md").exists() and not (options.dry_run or options.states):
        print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        options = options_of(args)
        if options.launcher is not None:
            return launch(args, options, arguments)
        if args.table:
            print(join(args.table), end="")
            return 0
        from peft_attrsub.interrupts import until_stopped

        return until_stopped("evaluate", lambda: evaluate(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
