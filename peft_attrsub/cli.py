"""The peft-attrsub command: build, look at, share and combine bases, and convert adapters.

A command imports torch, PEFT and the rooms that need them once its arguments are known to be good: --help and wrong
arguments answer at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, cli_text
from ._files import readable
from .basis.config import CONFIG_NAME, DTYPE_NAMES
from .basis.errors import BasisError
from .basis.files import ADAPTER_CONFIG, check_file, check_writable
from .basis.hub import is_local
from .cli_words import check_word, group_adapters, split_attributes, split_dims, split_names, split_rules
from .interrupts import until_stopped

if TYPE_CHECKING:
    from .basis import Basis

app = typer.Typer(
    help="Attribute subspaces for PEFT: mine a basis from LoRA adapters, then train only small cores in it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; made in one step at the end.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder of the same kind.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Of the Hub; default HF_TOKEN or that of `hf auth login`.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the full traceback.")]


@app.command("build-basis")
def build(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Saved LoRA adapters, as folders, .safetensors files or Hub ids. A folder of adapters or runs is one "
            "attribute with the folder's name; 'texture=PATH' names the attribute; otherwise it is the adapter's name "
            "without its trailing number. A run's final adapter is taken, or its last checkpoint."
        ),
    ],
    output: Output,
    dim: Annotated[int, typer.Option(help="Directions per module and attribute.")] = 16,
    alpha: Annotated[float, typer.Option(help="Robustness in (0, 2]: 2 averages, 1 mutes outliers.")] = 1.0,
    eps: Annotated[float, typer.Option(help="Smoothing, relative to the adapters' norm.")] = 1e-6,
    max_iter: Annotated[int, typer.Option(help="Most IRLS iterations.")] = 50,
    tol: Annotated[float, typer.Option(help="Relative change of the objective at which to stop.")] = 1e-6,
    allocation: Annotated[
        str,
        typer.Option(help="Directions per module: uniform, importance, importance-literal, energy[:0.95] or gap."),
    ] = "uniform",
    base_model: Annotated[
        str | None, typer.Option(help="Base model to record, whatever the adapters' configs say.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--modules", help="Regex: mine modules whose name contains it; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Regex: leave such modules out; may be repeated.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="OLD=NEW", help="Rename modules: a regex and what replaces it; may be repeated."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="Of runs with checkpoints: last, or a step.")] = "last",
    device: Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda; default the CPU.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored basis: float32 or bfloat16.")] = "float32",
    missing: Annotated[
        str, typer.Option(help="When adapters cover different modules: error, or intersect.")
    ] = "error",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Mine a basis from saved LoRA adapters."""

    def work() -> None:
        if dtype not in DTYPE_NAMES:
            raise BasisError(f"--dtype {dtype} is unknown: use {' or '.join(DTYPE_NAMES)}.")
        check_writable(output, CONFIG_NAME, overwrite)
        groups = group_adapters(adapters, checkpoint)
        check_writable(output, CONFIG_NAME, overwrite, inputs=[one for row in groups.values() for one in row])
        rules = split_rules(rename or [])
        main = _is_main_process()
        if main and not as_json:
            print(cli_text.plan(groups, output, dim, allocation, alpha), flush=True)
        from .basis import build_basis
        from .basis.storage import DTYPES

        basis = build_basis(
            groups,
            dim=dim,
            alpha=alpha,
            eps=eps,
            max_iter=max_iter,
            tol=tol,
            allocation=allocation,
            base_model=base_model,
            modules=_any_of(modules),
            exclude=exclude or None,
            rename=rules,
            device=device,
            dtype=DTYPES[dtype],
            missing=missing,
            progress=not as_json,
        )
        if not main:
            return
        _write_basis(basis, output, overwrite, as_json)

    _run(work, debug)


@app.command()
def info(
    basis: Annotated[str, typer.Argument(help="Folder or Hub id of a basis.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every tensor and check the digest.")] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a basis holds: attributes, dimensions, captured energy, muted adapters, digest.

    Of a basis on the Hub only the small files are downloaded, unless --verify asks for all of it.
    """

    def work() -> None:
        check_word(basis, "basis")
        from huggingface_hub.constants import HF_HUB_OFFLINE

        from .basis import Basis
        from .basis.remote import open_header

        if verify or is_local(basis) or HF_HUB_OFFLINE:
            opened = Basis.from_pretrained(basis, revision, token=token)
        else:
            opened = open_header(basis, revision, token)
        if verify:
            opened.verify()
        _tell(cli_text.summary(opened), as_json, cli_text.described)

    _run(work, debug)


@app.command()
def convert(
    file: Annotated[str, typer.Argument(help="Subspace file (.safetensors) in the layout of the paper's authors.")],
    output: Output,
    attributes: Annotated[
        str,
        typer.Option(
            help="Names for its directions: one, or several that share them evenly in the file's order "
            "(light,camera,geometry,texture), or by size (light=4,texture=8)."
        ),
    ] = "shared",
    base_model: Annotated[str, typer.Option(help="Base model to record.")] = "facebook/VGGT-1B",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read a subspace file of the authors' release into a basis."""

    def work() -> None:
        check_writable(output, CONFIG_NAME, overwrite, inputs=[file])
        names = split_attributes(attributes)
        from .basis.convert import convert_release

        _write_basis(convert_release(file, attributes=names, base_model=base_model), output, overwrite, as_json)

    _run(work, debug)


@app.command()
def combine(
    bases: Annotated[list[str], typer.Argument(help="Folders or Hub ids of bases of one model.")],
    output: Output,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put the attributes of several bases into one."""

    def work() -> None:
        check_writable(output, CONFIG_NAME, overwrite, inputs=bases)
        for name in bases:
            check_word(name, "basis")
        from .basis import Basis

        _write_basis(Basis.combine([Basis.from_pretrained(name) for name in bases]), output, overwrite, as_json)

    _run(work, debug)


@app.command()
def select(
    basis: Annotated[str, typer.Argument(help="Folder or Hub id of a basis.")],
    output: Output,
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", help="Keep this attribute, in the order given; may be repeated.")
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="N|NAME=N", help="Keep so many directions, of all attributes or of one."),
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--modules", help="Regex: keep modules whose name contains it; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Regex: leave such modules out; may be repeated.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Keep a part of a basis: some attributes, directions or modules."""

    def work() -> None:
        check_writable(output, CONFIG_NAME, overwrite, inputs=[basis])
        check_word(basis, "basis")
        dims = split_dims(dim or [])
        from .basis import Basis
        from .basis.choosing import choose

        opened = Basis.from_pretrained(basis)
        kept = choose(opened.modules, _any_of(modules), exclude or None) if modules or exclude else None
        _write_basis(opened.select(attribute or None, dims, kept), output, overwrite, as_json)

    _run(work, debug)


@app.command()
def rename(
    basis: Annotated[str, typer.Argument(help="Folder or Hub id of a basis.")],
    names: Annotated[list[str], typer.Argument(metavar="OLD=NEW...", help="Attributes and their new names.")],
    output: Output,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Give attributes of a basis other names."""

    def work() -> None:
        check_writable(output, CONFIG_NAME, overwrite, inputs=[basis])
        check_word(basis, "basis")
        pairs = split_names(names)
        from .basis import Basis

        _write_basis(Basis.from_pretrained(basis).rename(pairs), output, overwrite, as_json)

    _run(work, debug)


@app.command()
def report(
    basis: Annotated[str, typer.Argument(help="Folder or Hub id of a basis.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write; opens without a network.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A LoRA to explain by the basis: folder or Hub id; may be repeated."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for static figures (needs matplotlib).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="File for every number, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="File for every number, as tidy CSV.")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the report; default the basis' name.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random subspaces per size, for the nulls.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed for the null distributions.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an HTML report: spectra and patterns, overlap of attributes beside chance, adapters and outliers."""

    def work() -> None:
        start = time.monotonic()
        check_word(basis, "basis")
        for name in adapter or []:
            check_word(name, "adapter", file_ending=".safetensors")
        files = [file for file in (output, json_file, csv_file) if file is not None]
        for file in files:
            check_file(file)
        if len({os.path.realpath(file) for file in files}) < len(files):
            raise BasisError("--output, --json-file and --csv must be different files.")
        from .analysis import analyse, save_figures, write_report

        found = analyse(basis, adapter or [], draws=draws, seed=seed)
        written = [write_report(found, output, title)]
        written += [found.save_json(json_file)] if json_file else []
        written += [found.save_csv(csv_file)] if csv_file else []
        written += save_figures(found, png) if png else []
        seconds = time.monotonic() - start
        record = {"written": [str(path) for path in written], "seconds": seconds}
        _tell(record, as_json, lambda _: cli_text.reported(written, seconds))

    _run(work, debug)


@app.command()
def push(
    basis: Annotated[str, typer.Argument(help="Folder of a basis.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, 'user/name'; made if it does not exist.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a repository that is made.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it does not exist.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="For the model card, e.g. apache-2.0.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: Token = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put a basis with its model card on the Hub, in one commit."""

    def work() -> None:
        from .basis import Basis

        opened = Basis.from_pretrained(basis, token=token)
        done = opened.push_to_hub(
            repo_id,
            private=private,
            revision=revision,
            commit_message=message,
            token=token,
            create_pr=create_pr,
            license=license,
        )
        record = {"url": str(done.repo_url), "commit": done.oid, "digest": opened.digest, "pull_request": done.pr_url}
        _tell(record, as_json, cli_text.pushed)

    _run(work, debug)


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="Hub id of a basis: 'user/name' or 'user/name@revision'.")],
    output: Output,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy a basis from the Hub into a folder, checked against its digest."""

    def work() -> None:
        check_writable(output, CONFIG_NAME, overwrite)
        from .basis.remote import pull_basis

        basis = pull_basis(repo_id, output, revision, token, overwrite)
        _tell(cli_text.summary(basis), as_json, lambda record: cli_text.built(record, str(output)))

    _run(work, debug)


@app.command("export-lora")
def export(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved attribute-subspace adapter.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Truncate to this rank; default exact.")] = None,
    basis: Annotated[
        list[str] | None,
        typer.Option(
            "--basis", help="Where its basis is now, if it has moved; may be repeated, in the adapter's order."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as a plain LoRA that stock PEFT loads; exact unless --rank is given."""

    def work() -> None:
        check_writable(output, ADAPTER_CONFIG, overwrite, kind="LORA", inputs=[adapter])
        check_word(adapter, "adapter")
        for name in basis or []:
            check_word(name, "basis")
        from .tuner import export_lora

        where = None if not basis else basis[0] if len(basis) == 1 else basis
        written = export_lora(adapter, output, rank=rank, overwrite=overwrite, basis=where)
        _tell({"output": written}, as_json, lambda record: f"wrote the LoRA to {record['output']}")

    _run(work, debug)


@app.command()
def project(
    adapter: Annotated[str, typer.Argument(help="Folder, Hub id or .safetensors of a LoRA.")],
    basis: Annotated[str, typer.Option("--basis", help="Folder or Hub id of the basis.")],
    output: Output,
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", help="Use only this attribute; may be repeated.")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Use only this many directions per attribute.")] = None,
    missing: Annotated[
        str, typer.Option(help="When the basis lacks modules of the LoRA: error, or intersect.")
    ] = "error",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn a LoRA into cores: its part inside the basis, and how much of it that is."""

    def work() -> None:
        check_writable(output, ADAPTER_CONFIG, overwrite, kind="ATTRSUB", inputs=[adapter, basis])
        check_word(adapter, "adapter", file_ending=".safetensors")
        check_word(basis, "basis")
        from .tuner import project_lora

        result = project_lora(adapter, basis, output, attribute or None, dim, missing, overwrite)
        record = {"output": str(output), "total_energy": result.total_energy, "energy": result.energy}
        _tell(record, as_json, cli_text.projected)

    _run(work, debug)


def _write_basis(basis: Basis, output: Path, overwrite: bool, as_json: bool) -> None:
    """Save a basis with the command that made it, and say what it holds."""
    basis.config.command = _command()
    basis.save_pretrained(output, overwrite=overwrite)
    _tell(cli_text.summary(basis), as_json, lambda record: cli_text.built(record, str(output)))


def _any_of(patterns: list[str] | None) -> str | None:
    """One regular expression that matches where any of several does."""
    from .basis.choosing import compiled

    return "|".join(f"(?:{compiled(x, '--modules').pattern})" for x in patterns) if patterns else None


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _command() -> str:
    """The command line that made a basis, for its card; absolute paths tell only their last part."""
    words = []
    for word in sys.argv[1:]:
        name, equals, path = word.partition("=")
        last = Path(path or word).name
        words.append(f"{name}={last}" if equals and os.path.isabs(path) else last if os.path.isabs(word) else word)
    return shlex.join(["peft-attrsub", *map(readable, words)]) if words else ""


def _tell(record: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    print(json.dumps(record, indent=1) if as_json else text(record))


def _run(work: Callable[[], None], debug: bool) -> None:
    """Errors are one sentence on standard error and exit code 2; --debug shows the traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            work()
    except (BasisError, ValueError, OSError) as error:
        if debug:
            raise
        print(f"peft-attrsub: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _note(message: Warning | str, category: type[Warning], *where: Any, **kwargs: Any) -> None:
    """A warning as one line; only those that are meant for users."""
    if issubclass(category, UserWarning):
        print(f"peft-attrsub: note: {message}", file=sys.stderr)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    from ._machine import print_anything

    print_anything()
    raise SystemExit(until_stopped("peft-attrsub", _whole, "stopped; nothing half-written is left"))


def _whole() -> int:
    app()  # ends by SystemExit
    return 0


if __name__ == "__main__":
    main()
