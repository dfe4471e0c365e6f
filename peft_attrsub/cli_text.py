"""What the command prints: plans, summaries, tables."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from .basis.errors import BasisError
from .basis.identity import BaseIdentity
from .basis.naming import counted, natural_key, some

if TYPE_CHECKING:
    from .basis import Basis

__all__ = ["built", "described", "natural_key", "plan", "projected", "pushed", "reported", "summary"]


def plan(groups: dict[str, list[str]], output: Path, dim: int, allocation: str, alpha: float) -> str:
    """What build-basis is about to do."""
    lines = [f"{counted(sum(map(len, groups.values())), 'adapter')} in {counted(len(groups), 'attribute')}:"]
    width = max(map(len, groups))
    lines += [f"  {name:<{width}}  {len(members):>3}: {some(members)}" for name, members in groups.items()]
    lines.append(f"mining dim {dim} ({allocation}), alpha {alpha:g}, into {str(output)!r}")
    return "\n".join(lines)


def pushed(record: dict[str, Any]) -> str:
    """The whole of push."""
    at = f"pull request {record['pull_request']}" if record["pull_request"] else f"commit {record['commit']}"
    return f"the basis is at {record['url']}\n{at}, digest {record['digest'][:16]}"


def summary(basis: Basis) -> dict[str, Any]:
    """Everything about a basis that fits in a JSON object, from its config and its small tensors."""
    return {
        "source": basis.source,
        "revision": basis.revision,
        "base_model": basis.config.base_model,
        "base": None if basis.config.base is None else basis.config.base.to_dict(),
        "digest": basis.digest,
        "dtype": basis.config.dtype,
        "modules": len(basis.modules),
        "module_names": basis.modules,
        "attributes": [_attribute(basis, name) for name in basis.attributes],
    }


def _attribute(basis: Basis, name: str) -> dict[str, Any]:
    from .analysis.outliers import adapter_table

    config = next(a for a in basis.config.attributes if a.name == name)
    dims = [basis.dim(module, name) for module in basis.modules]
    record: dict[str, Any] = {
        "name": name,
        "kind": config.kind,
        "dtype": _dtype(basis, name),
        "modules": sum(d > 0 for d in dims),
        "dim_min": min(dims),
        "dim_max": max(dims),
        "dim_mean": fmean(dims),
    }
    if not config.sources:
        return record
    rows = [one for one in adapter_table(basis) if one.attribute == name]
    kept = [one for one in rows if not one.muted] or rows
    energies = [float(one.energies.mean()) for one in kept if one.energies is not None]
    record |= {
        "adapters": len(rows),
        "captured_energy": fmean(energies) if energies else None,
        "iterations_median": median(config.iterations.values()) if config.iterations else None,
        "muted": [{"adapter": one.adapter, "share_of_modules": one.muted_share} for one in rows if one.muted],
    }
    return record


def _dtype(basis: Basis, attribute: str) -> str:
    try:
        return str(basis.dtype(attribute)).removeprefix("torch.")
    except BasisError:  # only the headers of the basis are here
        return basis.config.dtype


def _table(record: dict[str, Any]) -> list[str]:
    mixed = len({a["dtype"] for a in record["attributes"]}) > 1
    rows = [("attribute", "adapters", "modules", "dim", "captured energy", "muted as outliers")]
    for a in record["attributes"]:
        dims = f"{a['dim_min']}" if a["dim_min"] == a["dim_max"] else f"{a['dim_min']}-{a['dim_max']}"
        energy = f"{100 * a['captured_energy']:.1f} %" if a.get("captured_energy") is not None else "-"
        muted = ", ".join(m["adapter"] for m in a.get("muted", [])) or "-"
        name = f"{a['name']} ({a['dtype']})" if mixed else a["name"]
        rows.append((name, str(a.get("adapters", a["kind"])), str(a["modules"]), dims, energy, muted))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def built(record: dict[str, Any], output: str) -> str:
    """The end of build-basis and combine."""
    return "\n".join(
        [*_table(record), f"wrote {output!r}: {counted(record['modules'], 'module')}, digest {record['digest'][:16]}"]
    )


def described(record: dict[str, Any]) -> str:
    """The whole of info."""
    head = [
        f"basis       {record['source']}" + (f" at {record['revision']}" if record["revision"] else ""),
        f"base model  {record['base_model'] or 'not recorded'}",
        *([f"its weights {BaseIdentity.of(record['base'])}"] if record["base"] else []),
        f"modules     {record['modules']}: {some(record['module_names'], 2)}",
        f"stored as   {record['dtype']}",
        f"digest      {record['digest']}",
        "",
    ]
    return "\n".join(head + _table(record))


def projected(record: dict[str, Any]) -> str:
    """The whole of project: worst modules first."""
    lines = [f"{100 * record['total_energy']:.2f} % of the LoRA's energy lies inside the basis"]
    worst = sorted(record["energy"].items(), key=lambda item: (item[1], natural_key(item[0])))[:5]
    width = max(len(name) for name, _ in worst)
    lines += [f"  {name:<{width}}  {100 * share:6.2f} %" for name, share in worst]
    if len(record["energy"]) > len(worst):
        lines.append(f"  ... {counted(len(record['energy']) - len(worst), 'module')} more, above those")
    lines.append(f"wrote {record['output']!r}")
    return "\n".join(lines)


def reported(written: list[Path], seconds: float) -> str:
    """The whole of report."""
    lines = [f"wrote {str(path)!r} ({path.stat().st_size / 1e6:.1f} MB)" for path in written]
    return "\n".join([*lines, f"in {seconds:.1f} s"])
