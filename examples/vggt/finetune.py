"""Fine-tune VGGT on a benchmark or on synthetic scenes, by any of the paper's methods.

    accelerate launch examples/vggt/finetune.py --method attrsub --basis my-basis --data data/mixed_00 --out runs/ours
    accelerate launch examples/vggt/finetune.py --method lora --rank 64 --benchmark human --data people --out runs/lora
    python examples/vggt/finetune.py --preset smoke --method random --data scenes --out runs/smoke  # a CPU, minutes
    python examples/vggt/finetune.py --config run.yaml --lr 1e-4            # the command line wins over the file

--preset paper (the default) and release are the published settings. What is trained on the camera and depth heads is
chosen apart: --heads cores|lora|full|frozen. In OUT: adapter/ (model/ with --method full), best/, checkpoints/,
log.jsonl, panels/, summary.json. Whatever stops a run, the same command continues it, to the same weights.

Exit status: 0 done; 1 --check found problems; 2 wrong arguments or data, a full disk, or a run that diverged; 128 + n
stopped by signal n.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(arguments: Sequence[str] | None = None) -> int:
    from training.settings import parse

    from peft_attrsub.interrupts import until_stopped

    try:
        model, data, train = parse(arguments, description=__doc__)
        if train.check:
            from training.checks import report_data

            return until_stopped("finetune", lambda: report_data(data), "stopped")
        from training.run import run

        return until_stopped("finetune", lambda: ended(run(model, data, train)))
    except (ImportError, OSError, ValueError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2


def ended(done: dict[str, Any]) -> int:
    """The exit status of a run that ended by itself, or after the step in which a signal came."""
    if "stopped" not in done:
        return 0
    from peft_attrsub.interrupts import say_stopped

    say_stopped("finetune")
    return 128 + int(done["stopped"])


if __name__ == "__main__":
    from _console import run

    run(main)
