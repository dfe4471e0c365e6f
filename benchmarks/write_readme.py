"""Make README.md and figures/*.png from results/*.json, by the pages in pages/: no number is written by hand.

    python benchmarks/write_readme.py [--check] [--results DIR] [--output README.md]

Running a benchmark replaces its JSON; this replaces the README. With --check nothing is written: exit status 1 when
README.md is not what the results give, or a figure it shows is missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pages
from _common import print_anything, write_figure

HERE = Path(__file__).resolve().parent
# The order of the sections; a page that is not named here comes after them.
ORDER = (
    "build_basis",
    "loading",
    "tuner",
    "mixed",
    "hotswap",
    "checkpoint_size",
    "vggt",
    "report",
    "metrics",
    "render",
    "startup",
    "mini_study",
    "digits",
)
# Minutes or hours of training each: `make bench` leaves them out.
APART = ("commands", "mini_study", "digits")
# Results of the same script elsewhere, which are named even while nobody has measured them.
ELSEWHERE = {"vggt-cuda": "python benchmarks/vggt.py --device cuda"}
WIDTH = 119
FIGURE = re.compile(r"\(figures/([\w.-]+)\.png\)")

OPENING = """\
<!-- Made by write_readme.py from results/*.json. To change a number, run its benchmark; to change a sentence, its page
in pages/. `python benchmarks/write_readme.py --check` says whether this file is what the results give. -->

# Benchmarks
"""

RUNNING = """\
`make bench` runs all but those that train or time whole commands in less than 20 minutes on two cores, replaces
each JSON by what it finds and makes this page anew. Each script also runs alone, and prints its tables. `--quick` runs
toy sizes and publishes nothing; `--output FILE` writes elsewhere; `--full`, where a script has it, measures more than
fits into those minutes.

```bash
make bench                                   # without the peers, commands.py and the two that train
python benchmarks/write_readme.py            # this page and its figures, from results/*.json

python -m venv peers && peers/bin/pip install -r benchmarks/requirements-peers.txt
python benchmarks/build_basis.py --peers-python peers/bin/python --work-dir adapters
python benchmarks/metrics.py --full                            # needs scipy; takes on open3d where it is installed
python benchmarks/render.py --full --cycles-python PYTHON      # one that has bpy
python benchmarks/report.py --full --work-dir bases
python benchmarks/vggt.py --device cuda                        # vggt-1b at 518 px in bf16; not yet run on a GPU
```

`--work-dir` keeps the adapters or the bases for the next run. A peer that is not installed is reported as such.

## How it is measured

- Contenders take turns round by round, so that a busy machine slows all of them; read ratios before seconds. The JSON
  records the machine with its vector instructions, the load when the run began, versions, seed and date.
- A contender whose memory is measured is a process of its own. The clock starts after the imports; memory is counted
  above its value then.
- The rules of each number (what is extrapolated, how a peer's dimension is matched, what counts as kept) are in the
  JSON under `rules`.
- Adapters are synthetic, written by stock PEFT around a planted subspace: `_adapters.py` says how, with kinder and
  harsher variants. Real adapters will differ in how much they share; times depend on shapes and iterations, not on
  that.
- `_common.py` has what all scripts share: machine, memory, child processes, tables, JSON. The other scripts with an
  underscore in front run one contender or one measurement in one process. `pages/` turns a result into its section.
"""


def wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def found_pages() -> dict[str, ModuleType | None]:
    """{name: page} in the order of the sections; None where the page of a named section is not there."""
    names = [module.name for module in pkgutil.iter_modules(pages.__path__) if not module.name.startswith("_")]
    ordered = [*ORDER, *sorted(set(names) - set(ORDER))]
    return {name: importlib.import_module(f"pages.{name}") if name in names else None for name in ordered}


def script(name: str, page: ModuleType) -> str:
    """Path of the script from this folder."""
    return getattr(page, "SCRIPT", f"{name}.py")


def command(name: str, page: ModuleType) -> str:
    """What writes results/<name>.json."""
    return getattr(page, "HOW", f"`python benchmarks/{script(name, page)}`")


def contents(found: dict[str, ModuleType | None], results: Path) -> str:
    """Scripts, their questions, links to section and to JSON that is there."""
    lines = ["| script | question | published |", "|---|---|---|"]
    for name, page in found.items():
        if page is None:
            continue
        anchor = re.sub(r"[^\w -]", "", page.TITLE.lower()).replace(" ", "-")
        published = f", [JSON](results/{name}.json)" if (results / f"{name}.json").exists() else ""
        link = f"[{page.TITLE}](#{anchor}){published}"
        lines.append(f"| `{Path(script(name, page)).name}` | {page.QUESTION} | {link} |")
    return "\n".join(lines) + "\n"


def circumstances(result: dict[str, Any]) -> str:
    """Machine, versions, date and load of a run, as far as it recorded them."""
    machine, versions = result["machine"], result["versions"]
    parts = [", ".join([f"{machine['cores']} cores", *(machine[key] for key in ("cpu", "gpu") if key in machine)])]
    if machine.get("cpu_flags"):
        caps = "".join(f", {name}={value}" for name, value in machine.get("cpu_caps", {}).items())
        parts[0] += f" ({' '.join(machine['cpu_flags'])}{caps})"
    parts += [", ".join(f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions)]
    load = machine.get("load_at_start")
    parts += (
        [result["date"] + (f", load {load} when it began" if load is not None else "")] if "date" in result else []
    )
    return wrap("Measured on " + "; ".join(parts) + ".")


def body(name: str, page: ModuleType, path: Path) -> str:
    """What one result says; a result that is not there, or that this page cannot read, is said instead."""
    if not path.exists():
        how = f"`{ELSEWHERE[path.stem]}`" if path.stem in ELSEWHERE else command(name, page)
        return wrap(f"Not measured yet: there is no results/{path.name}, which {how} writes.")
    result = json.loads(path.read_text(encoding="utf-8"))
    try:
        text = page.markdown(result)
    except KeyError as error:
        print(f"results/{path.name} has no {error}; run {command(name, page)} again.", file=sys.stderr)
        return wrap(
            f"results/{path.name} was written by an older form of the script (it has no {error}): run "
            f"{command(name, page)} again."
        )
    return f"{circumstances(result)}\n\n{text.strip()}"


def section(name: str, page: ModuleType, results: Path) -> str:
    """The section of a page: its own result, then those of the same script on other devices (`<name>-cuda.json`)."""
    parts = [f"## {page.TITLE}", wrap(page.QUESTION), body(name, page, results / f"{name}.json")]
    others = {path.stem for path in results.glob(f"{name}-*.json")}
    others |= {other for other in ELSEWHERE if other.startswith(f"{name}-")}
    for other in sorted(others):
        device = other.removeprefix(f"{name}-")
        parts += [f"### {page.TITLE}, {device}", body(name, page, results / f"{other}.json")]
    return "\n\n".join(parts) + "\n"


def readme(results: Path) -> str:
    """The whole README from the JSON files in `results`."""
    found = found_pages()
    sections = [section(name, page, results) for name, page in found.items() if page is not None]
    return "\n".join([OPENING, contents(found, results), RUNNING, *sections])


def shown(text: str) -> list[str]:
    """Stems of the figures that the README `text` shows."""
    return list(dict.fromkeys(FIGURE.findall(text)))


def draw(results: Path, folder: Path, wanted: Sequence[str]) -> None:
    """The figures that the README shows, and no others, into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    drawn: dict[str, Any] = {}
    for name, page in found_pages().items():
        for path in sorted([results / f"{name}.json", *results.glob(f"{name}-*.json")]):
            if page is None or not hasattr(page, "figures") or not path.exists():
                continue
            try:
                drawn |= page.figures(json.loads(path.read_text(encoding="utf-8")))
            except KeyError as error:
                print(f"results/{path.name} has no {error}: its figures are not drawn.", file=sys.stderr)
    if missing := set(wanted) - drawn.keys():
        raise SystemExit(f"The pages show figures that they do not draw: {', '.join(sorted(missing))}.")
    if unseen := drawn.keys() - set(wanted):
        raise SystemExit(f"The pages draw figures that they do not show: {', '.join(sorted(unseen))}.")
    folder.mkdir(parents=True, exist_ok=True)
    for stem, figure in drawn.items():
        write_figure(folder / f"{stem}.png", figure)
    for old in folder.glob("*.png"):
        if old.stem not in drawn:
            old.unlink()


def check(text: str, output: Path) -> list[str]:
    """What is wrong with the README at `output` and its figures; nothing if nothing is."""
    again = "run `python benchmarks/write_readme.py`"
    old = output.read_text(encoding="utf-8") if output.exists() else ""
    wrong = [] if old == text else [f"{output.name} is not what the results give: {again}."]
    missing = [stem for stem in shown(text) if not (output.parent / "figures" / f"{stem}.png").exists()]
    return wrong + [f"figures/{stem}.png is missing: {again}." for stem in missing]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=HERE / "README.md", help="figures/ is made beside it")
    args = parser.parse_args(arguments)
    text = readme(args.results)
    if args.check:
        wrong = check(text, args.output)
        print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
        return 1 if wrong else 0
    draw(args.results, args.output.parent / "figures", shown(text))
    beside = args.output.with_name(args.output.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(args.output)
    return 0


if __name__ == "__main__":
    print_anything()
    sys.exit(main())
