"""What a run leaves: one row a sequence, a CSV of them, a summary, and a table that joins several runs.

    OUT/run.json                 the settings; a run continues only under the same ones
    OUT/sequences/<name>.json    one row each, written when its sequence is done, in one step, by whichever process
    OUT/sequences.csv            the rows in the dataset's order
    OUT/summary.json             means over evaluated sequences, counts of skipped ones, the settings

A row is {"sequence": name, "status": "ok", "reason": "", metric: number, ...}, or "skipped" with a reason and no
metrics. Whatever ends a run, no more is lost than the sequences in work.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .files import write_atomically

Row = dict[str, Any]
FIXED = ("sequence", "status", "reason")
RUN, ROWS, CSV, SUMMARY = "run.json", "sequences", "sequences.csv", "summary.json"


def check_row(row: Mapping[str, Any]) -> None:
    """ValueError unless the row has a name and a status, a reason where skipped, and finite numbers where not."""
    name, status = row.get("sequence"), row.get("status")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a row names no sequence: expected {{'sequence': name, ...}}, got {dict(row)!r}.")
    if status not in ("ok", "skipped"):
        raise ValueError(f"the row of {name} has status {status!r}: expected ok or skipped.")
    metrics = {key: value for key, value in row.items() if key not in FIXED}
    if status == "skipped":
        if not row.get("reason") or metrics:
            raise ValueError(f"the row of {name} is skipped: it needs a reason and no metrics, got {dict(row)!r}.")
        return
    if not metrics:
        raise ValueError(f"the row of {name} is ok but has no metrics.")
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{key} of {name} is {value!r}: a row holds finite numbers; else skip it with a reason.")


def ok_row(sequence: str, metrics: Mapping[str, Any]) -> Row:
    """The row of a measured sequence; metrics: numbers, also numpy's and torch's, as Python's."""
    numbers = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
    return {"sequence": sequence, "status": "ok", "reason": "", **numbers}


def skipped_row(sequence: str, reason: str) -> Row:
    """The row of a sequence that could not be measured, with the reason of its `SkippedError`."""
    return {"sequence": sequence, "status": "skipped", "reason": reason}


def start_run(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> set[str]:
    """Begin or continue a run; names of the sequences that are done already.

    settings: JSON-able, all that decides the numbers (alignment, threshold, model, data). Where the folder holds a
    run of other settings, a ValueError names the first that differs. One process calls it before the others start.
    """
    path = Path(folder) / RUN
    wanted = json.loads(_json(settings))
    if path.exists():
        there = _read(path)
        for key in sorted(set(there) | set(wanted)):
            if there.get(key) != wanted.get(key):
                raise ValueError(
                    f"{folder} holds a run with {key} = {there.get(key)!r}, and this one has {wanted.get(key)!r}: "
                    "give another folder, or remove that one."
                )
    else:
        if any((Path(folder) / ROWS).glob("*.json")):
            raise ValueError(f"{folder} holds rows but no {RUN}: what they were made with is unknown. Remove them.")
        write_atomically(path, _json(settings))
    return set(read_rows(folder))


def write_row(folder: str | os.PathLike[str], row: Mapping[str, Any]) -> Path:
    """Store one row under its sequence's name, replacing an older one."""
    check_row(row)
    return write_atomically(Path(folder) / ROWS / _file_name(row["sequence"]), _json(row, keep_order=True))


def read_rows(folder: str | os.PathLike[str]) -> dict[str, Row]:
    """All rows stored under a run's folder, by name of the sequence."""
    rows: dict[str, Row] = {}
    for path in sorted((Path(folder) / ROWS).glob("*.json")):
        row = _read(path)
        try:
            check_row(row)
        except ValueError as error:
            raise ValueError(f"{path} is no row: {error} Remove it, and its sequence is measured again.") from error
        rows[row["sequence"]] = row
    return rows


def ordered_rows(folder: str | os.PathLike[str], names: Sequence[str]) -> list[Row]:
    """The rows of these sequences in this order; those that are not there yet are left out."""
    rows = read_rows(folder)
    return [rows[name] for name in names if name in rows]


def _file_name(sequence: str) -> str:
    """A file name for any name of a sequence, different for different ones, also where case does not count."""
    safe = quote(sequence, safe=" ,=+()")
    if len(safe) > 150 or safe != safe.lower() or safe.startswith((".", " ")):
        safe = f"{safe[:150].lstrip('. ')}-{hashlib.sha256(sequence.encode()).hexdigest()[:12]}"
    return f"{safe}.json"


def _json(record: Mapping[str, Any], keep_order: bool = False) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=not keep_order, allow_nan=False) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): remove it and run again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no record: remove it and run again.")
    return record


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows to a CSV: sequence, status, reason, then every metric that some row has. Numbers in full."""
    rows = list(rows)
    columns = list(FIXED)
    for row in rows:
        check_row(row)
        columns += [key for key in row if key not in columns]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, text.getvalue().encode())


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """The rows that `write_csv` wrote; metrics that a row does not have are left out of it."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple((reader.fieldnames or ())[:3]) != FIXED:
            raise ValueError(f"{path} has columns {reader.fieldnames}: expected {', '.join(FIXED)} first.")
        try:
            return [
                {key: value if key in FIXED else _number(value) for key, value in row.items() if key in FIXED or value}
                for row in reader
            ]
        except ValueError as error:
            raise ValueError(f"{path} has a cell that is no number ({error}): make it again.") from error


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def summarise(
    rows: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    names: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Means of every numeric metric over the evaluated sequences, and what they are means of.

    settings: what was stated with the run; "align" must be among them, since no number means anything without.
    names: of all sequences that were asked for, so that those without a row are counted as missing.
    weights: metric -> the metric that weights its sequences ({"abs_rel": "depth_pixels"} is the release's mean over a
    dataset); what is not in it weighs all sequences alike.
    A metric that some sequences lack is the mean of those that have it; "counts" says how many.
    """
    rows = list(rows)
    for row in rows:
        check_row(row)
    if "align" not in settings:
        raise ValueError("settings have no 'align': every table says how the prediction was aligned.")
    seen = [row["sequence"] for row in rows]
    if twice := [name for name, count in Counter(seen).items() if count > 1]:
        raise ValueError(f"{twice[0]} has two rows: every sequence counts once.")
    done = [row for row in rows if row["status"] == "ok"]
    keys = list(dict.fromkeys(key for row in done for key in row if key not in FIXED))
    metrics, counts = {}, {}
    for key in keys:
        having = [row for row in done if key in row]
        by = (weights or {}).get(key)
        if lacking := [row["sequence"] for row in having if by is not None and not row.get(by, 0) > 0]:
            raise ValueError(f"{key} is to be weighted by {by}, which {lacking[0]} has not, or is not positive there.")
        w = [1.0 if by is None else float(row[by]) for row in having]
        metrics[key] = math.fsum(a * row[key] for a, row in zip(w, having, strict=True)) / math.fsum(w)
        counts[key] = len(having)
    skipped = [row for row in rows if row["status"] == "skipped"]
    return {
        "metrics": metrics,
        "counts": counts,
        "weights": dict(weights or {}),
        "n_sequences": len(rows) if names is None else len(names),
        "n_evaluated": len(done),
        "n_skipped": len(skipped),
        "n_missing": 0 if names is None else len(set(names) - set(seen)),
        "skipped_reasons": dict(sorted(Counter(row["reason"] for row in skipped).items())),
        "skipped": {row["sequence"]: row["reason"] for row in skipped},
        "settings": dict(settings),
    }


def finish_run(
    folder: str | os.PathLike[str], names: Sequence[str], weights: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """Write CSV and summary of a run from its rows in the order of names; the summary.

    more: what goes into the summary beside the means: label, trainable_parameters, provenance. weights: as in
    `summarise`.
    Settings are those of `start_run`. Safe to call again, also while sequences are missing.
    """
    path = Path(folder) / RUN
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: begin a run with start_run.")
    rows = ordered_rows(folder, names)
    summary = {**more, **summarise(rows, _read(path), names, weights)}
    write_csv(Path(folder) / CSV, rows)
    write_atomically(Path(folder) / SUMMARY, _json(summary, keep_order=True))
    return summary


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The summary in a file, or in the folder of a run."""
    path = Path(path) / SUMMARY if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a run that has ended, or the file of its summary.")
    record = _read(path)
    if "metrics" not in record or "n_evaluated" not in record:
        raise ValueError(f"{path} is no summary of a run: it has no metrics and n_evaluated.")
    return record


__all__ = [
    "check_row",
    "finish_run",
    "ok_row",
    "ordered_rows",
    "read_csv",
    "read_rows",
    "read_summary",
    "skipped_row",
    "start_run",
    "summarise",
    "write_csv",
    "write_row",
]
