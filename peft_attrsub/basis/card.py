"""The model card of a basis: what it is, what it was made from, how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .basis import Basis


def model_card(basis: Basis, name: str) -> str:
    """README.md of a saved basis."""
    config = basis.config
    lines = ["---", "library_name: peft", "tags:", "- peft-attrsub", "- attribute-subspace"]
    # Only a Hub id may stand here: the Hub rejects a local path.
    if config.base_model and config.base_model.count("/") == 1 and not config.base_model.startswith((".", "/")):
        lines.append(f"base_model: {config.base_model}")
    lines += ["---", "", f"# {name}", ""]
    lines += [
        "A basis of attribute subspaces for [peft_attrsub](https://pypi.org/project/peft-attrsub/): fine-tune "
        f"{config.base_model or 'the model'} by training only the small cores M of dW = A M B^T.",
        "",
        "```python",
        "from peft import get_peft_model",
        "from peft_attrsub import AttrSubspaceConfig",
        "",
        f'model = get_peft_model(model, AttrSubspaceConfig(basis="{name}"))',
        "```",
        "",
        f"{len(basis.modules)} modules, digest `{basis.digest}`.",
        "",
        "| attribute | dim | from | allocation | alpha |",
        "|---|---|---|---|---|",
    ]
    for record in config.attributes:
        dims = [basis.dim(module, record.name) for module in basis.modules]
        width = f"{min(dims)}" if min(dims) == max(dims) else f"{min(dims)} to {max(dims)}"
        origin = f"{len(record.sources)} adapters" if record.sources else record.kind
        allocation, alpha = record.allocation or "-", "-" if record.alpha is None else record.alpha
        lines.append(f"| {record.name} | {width} | {origin} | {allocation} | {alpha} |")
    if config.command:
        lines += ["", "Made by:", "", "```bash", config.command, "```"]
    sources = [(r.name, s) for r in config.attributes for s in r.sources]
    if sources:
        lines += ["", "| attribute | source adapter | revision | sha256 |", "|---|---|---|---|"]
        lines += [f"| {a} | {s.id} | {s.revision or '-'} | {(s.sha256 or '-')[:16]} |" for a, s in sources]
    return "\n".join(lines) + "\n"
