"""Train vggt-mini, a VGGT of about 5 M parameters, from scratch on generic ray-cast scenes, on a CPU.

    python examples/vggt/pretrain_mini.py --out runs/pretrain-mini --threads 2 --minutes 60   # as often as it takes
    python examples/vggt/pretrain_mini.py --out runs/pretrain-mini --evaluate
    python examples/vggt/pretrain_mini.py --out runs/pretrain-mini --export examples/vggt/vggt-mini

The first call renders the scenes into OUT/scenes; a call that is stopped, by --minutes, a signal or a power cut, is
continued by the same command from the last checkpoint. In OUT: checkpoint.pt, log.jsonl (losses), held-out.jsonl
(measures). --evaluate and --export take the running mean of the weights and train nothing.

Exit status: 0 done or out of minutes; 2 wrong arguments or data; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    try:
        return _run(given)
    except (ImportError, OSError, ValueError) as error:
        print(f"pretrain_mini: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain-mini"), help="folder of the run")
    parser.add_argument("--scenes", type=int, default=8000, help="scenes to learn from, 8 views each")
    parser.add_argument("--held-out", type=int, default=128, help="scenes to measure on")
    parser.add_argument("--steps", type=int, help="of the whole run; may change until the rate falls")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="PART=W",
        help="of parts of the loss, from here on: camera, depth, relative, match, attend, points",
    )
    parser.add_argument("--threads", type=int, default=1, help="of the training, and processes that render")
    parser.add_argument(
        "--precision",
        default="auto",
        help="auto (the default: what this CPU computes natively), bf16, fp16 or fp32; a run that is continued keeps "
        "what it began with",
    )
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--evaluate", action="store_true", help="measure on the held-out scenes and stop")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the model there and stop")
    parser.add_argument("--note", default="", help="with --export: what else is to be said of the run on its card")
    parser.add_argument("--toy", action="store_true", help="everything tiny, to try the script in seconds")
    return parser.parse_args(arguments)


def _weights(pairs: Sequence[str]) -> dict[str, float]:
    """PART=W of --weights, as fields of a plan."""
    from pretraining.run import WEIGHTS

    known = [key.removesuffix("_weight") for key in WEIGHTS]
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if name not in known or value < 0:
            raise ValueError(f"--weights {pair}: expected PART=W with a number W >= 0 and one of {', '.join(known)}.")
        found[f"{name}_weight"] = value
    return found


def _run(given: argparse.Namespace) -> int:
    import torch
    from pretraining.batches import heldout_batches
    from pretraining.evaluate import measure
    from pretraining.export import export
    from pretraining.run import HELD_OUT, Run, train
    from pretraining.scenes import SEEDS, Scenes, Shards, make_scenes
    from pretraining.sizes import sizes

    if given.threads < 1 or given.scenes < 1 or given.held_out < 1:
        raise ValueError(
            f"--threads {given.threads}, --scenes {given.scenes}, --held-out {given.held_out}: expected 1 or more."
        )
    torch.set_num_threads(given.threads)
    config, plan = sizes(toy=given.toy, steps=given.steps)
    plan = replace(plan, **_weights(given.weights))
    only = given.evaluate or given.export is not None
    given.out.mkdir(parents=True, exist_ok=True)
    kinds = {"held-out": Scenes(SEEDS["held-out"], given.held_out, size=config.image_size)}
    if not only:
        kinds["train"] = Scenes(SEEDS["train"], given.scenes, size=config.image_size)
    for scenes in kinds.values():
        make_scenes(scenes, given.out / "scenes", given.threads)
    shards = {name: Shards(scenes, given.out / "scenes") for name, scenes in kinds.items()}

    run = Run(config, plan, shards.get("train"), given.out, given.precision)
    if not only and run.told:
        print(run.told, file=sys.stderr, flush=True)
    if only and run.step == 0:
        raise ValueError(f"{given.out} holds no trained model yet: train first, without --evaluate or --export.")

    def heldout() -> dict:
        with run.ema.applied(run.model):
            found = {"step": run.step, "seconds": round(run.seconds)}
            found |= measure(run.model, heldout_batches(shards["held-out"], plan.views))
        with (given.out / HELD_OUT).open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
        return found

    if not only:
        return train(run, given.minutes, heldout)
    found = heldout()
    if given.export is not None:
        export(run, found, given.export, scenes=given.scenes, note=given.note)
    return 0


if __name__ == "__main__":
    from _console import run

    run(main)
