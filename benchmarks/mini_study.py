"""The paper's tables in miniature: a small VGGT, stand-in benchmarks drawn offline, seeds and error bars.

    python benchmarks/mini_study.py --plan                # jobs by stage and minutes, from measured speeds
    python benchmarks/mini_study.py                       # the whole study, less than three hours on two cores
    python benchmarks/mini_study.py --quick               # a check in a quarter of an hour; publishes nothing
    python benchmarks/mini_study.py --stage diagnosis     # no further than this, to look before it goes on
    python benchmarks/mini_study.py --page                # the result as Markdown, and its figures

Source adapters per attribute, bases mined from them, fine-tuning by every method on three benchmarks; in domain,
across, and on scenes like those that the base was trained on. Every job is a folder with a summary.json under --out;
whatever stops the study, the same command goes on. A finished one writes benchmarks/results/mini_study.json.

Exit status: 0 done; 1 jobs failed, named on stderr; 2 wrong arguments or data; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
from study.files import keep_study
from study.settings import FULL, QUICK, STAGES, Study


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    out = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=form, allow_abbrev=False)
    add = out.add_argument
    add("--out", type=Path, help="folder of the study (default: runs/mini-study, with --quick runs/mini-study-quick)")
    add("--model", default="vggt-mini", help="the base: folder or Hub id (default: vggt-mini)")
    add("--quick", action="store_true", help="fewer seeds, methods and scenes: a check")
    add("--seeds", type=int, help=f"of every row (default: {FULL.seeds}, with --quick {QUICK.seeds})")
    add("--workers", type=int, default=2, help="processes of one thread each; 0: this one alone (default: 2)")
    add("--stage", choices=STAGES, help="go no further than this one")
    add("--plan", action="store_true", help="print jobs and minutes by stage, and no more")
    add("--page", action="store_true", help="print the result as Markdown, write its figures, and no more")
    add("--output", help="result file (default: benchmarks/results/mini_study.json; none with --quick)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a number of study.settings.Study")
    return out


def study_of(args: argparse.Namespace) -> Study:
    """The settings, with the digest of the base: results of another one must not be mixed in."""
    from _model import state_digest
    from study.training import Base

    changes = [f"model={json.dumps(args.model)}"] + ([] if args.seeds is None else [f"seeds={args.seeds}"])
    model = Base.get(args.model)
    width = model.config.embed_dim
    study = (QUICK if args.quick else FULL).changed([*changes, *args.set])
    if (largest := max(*study.dims, *study.oracle_dims, study.ablation_dim)) > width:
        raise ValueError(f"D = {largest} is more than the model's width of {width}: give --set dims=[...] below it.")
    return study.changed([f"base={state_digest(model.state_dict())}"])


def run(args: argparse.Namespace) -> int:
    from study import collect, pool, precision, rates

    out = args.out or Path("runs/mini-study-quick" if args.quick else "runs/mini-study")
    study, chosen, told = precision.settle(study_of(args), out)
    if told:
        print(told, flush=True)
    if not args.plan:
        keep_study(out, study.record())
        precision.keep(out, chosen)
    measured = rates.rates(study, out, keep=not args.plan)
    print(rates.told(study, pool.found_on_disk(study, out), measured, args.workers), flush=True)
    if args.plan:
        return 0
    last = STAGES.index(args.stage or STAGES[-1])
    try:
        done = pool.work(study, out, args.workers, measured, STAGES[: last + 1])
    except pool.Failed as error:
        print(f"mini_study: {error}; see {out / 'logs'}, the same command tries again", file=sys.stderr)
        return 1
    if (found := done.get("diagnosis")) is not None:
        from study.sources import told

        print(told(found))
    if args.stage is not None:
        return 0
    result = _common.header("mini_study", 0, args.quick, **study.record())
    result["command"] = command(args)
    result["minutes"] = minutes(done)
    result["model"] = described(study)
    result["pixels"] = "centers"  # of predictions and truth alike; results without the key were half a pixel apart
    result["precision"] = chosen.record()
    result |= collect.collect(study, done)
    # A quick study writes beside its own jobs: it must not replace a published result.
    output = args.output or (str(out / "result.json") if args.quick else None)
    _common.write_result(result, "mini_study", output, quick=False)
    print(page().markdown(result))
    return 0


def command(args: argparse.Namespace) -> str:
    """How the study is started, without the folders of this machine."""
    words = ["python benchmarks/mini_study.py", "--quick" if args.quick else ""]
    words += [f"--seeds {args.seeds}" if args.seeds is not None else "", *(f"--set {pair}" for pair in args.set)]
    return " ".join(word for word in words if word)


def minutes(done: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Minutes of one core by stage, of all that was done, whenever that was."""
    sums: dict[str, float] = {}
    for name, summary in done.items():
        stage = {"bases": "mine", "tuning": "tune"}.get(name.split("/")[0], name.split("/")[0])
        sums[stage] = sums.get(stage, 0.0) + float(summary["seconds"]) / 60
    return {stage: round(value, 1) for stage, value in sums.items()}


def described(study: Study) -> dict[str, Any]:
    from study.training import Base, pixels

    model = Base.get(study.model)
    config = model.config
    return {
        "name": Path(study.model).name,
        "digest": study.base,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "aggregator": sum(
            p.numel() for n, p in model.aggregator.named_parameters() if not n.startswith("patch_embed")
        ),
        "width": config.embed_dim,
        "depth": config.depth,
        "pixels": pixels(study, config),
        "patch": config.patch_size,
    }


def page() -> Any:
    """The page of this benchmark."""
    from pages import mini_study as found

    return found


def show(args: argparse.Namespace) -> int:
    """--page: Markdown on standard output, figures beside the result."""
    quick = Path(args.out or "runs/mini-study-quick") / "result.json"
    path = Path(args.output) if args.output else quick if args.quick else _common.RESULTS / "mini_study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the study first.")
    result, made = json.loads(path.read_text(encoding="utf-8")), page()
    print(made.markdown(result))
    published = path.parent == _common.RESULTS  # whose figures are those of benchmarks/README.md
    folder = (args.out or (path.parent.parent if published else path.parent)) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, figure in made.figures(result).items():
        _common.write_figure(folder / f"{stem}.png", figure)
    print(f"figures are in {folder}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from peft_attrsub.interrupts import until_stopped

    try:
        if args.workers < 0:
            raise ValueError(f"--workers is {args.workers}: give 0 or more.")
        return until_stopped("mini_study", lambda: show(args) if args.page else run(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"mini_study: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    _common.print_anything()
    raise SystemExit(main())
