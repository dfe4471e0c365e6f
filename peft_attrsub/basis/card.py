"""The model card of a basis: what it is, what it was made from, how to use it, what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .._lazy import provided
from .naming import counted

if TYPE_CHECKING:
    from .basis import Basis

#: Slot of `_lazy.provide` for functions of a basis and a folder. Each measures the basis when it is pushed to the Hub,
#: writes its figures into the folder, and returns a section of the card in Markdown.
SECTIONS = "sections of a basis' card"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_TEMPLATE = Template("""---
$header
---

# $name

A basis of attribute subspaces for [peft_attrsub](https://pypi.org/project/peft-attrsub/): frozen directions A, B
for every module of $model. Fine-tune by training only the small cores M of dW = A M B^T.

```python
# pip install peft-attrsub; `model` is $model, loaded as for the adapters named below.
from peft import get_peft_model
from peft_attrsub import AttrSubspaceConfig

model = get_peft_model(model, AttrSubspaceConfig(basis="$name"))
model.print_trainable_parameters()
```

$modules, stored as $dtype, digest `$digest`.

| attribute | dim | from | allocation | alpha |
|---|---|---|---|---|
$attributes
$sections$origin
## Limits

- It fits $model and nothing else: another model with modules of the same names and shapes
  would load it without an error, and the directions would mean nothing there.
- Only updates inside the span of A and B can be learnt. Shares of energy tell how much of the *source* adapters
  lies there, not how much of a new task.
- What the source adapters have in common is kept, their data's one-sidedness too.$license
""")


def full_card(basis: Basis, name: str, folder: Path, license: str | None) -> str:
    """README.md of a pushed basis, with the sections provided; figures are written into `folder`."""
    return model_card(basis, name, [section(basis, folder) for section in provided(SECTIONS)], license)


def model_card(basis: Basis, name: str, sections: Sequence[str] = (), license: str | None = None) -> str:
    """README.md of a saved basis."""
    from huggingface_hub import ModelCardData

    config = basis.config
    # Only a Hub id may stand here: the Hub rejects a local path.
    base_model = config.base_model if config.base_model and _REPO.fullmatch(config.base_model) else None
    header = ModelCardData(
        library_name="peft",
        base_model=base_model,
        license=license or "other",
        tags=["peft-attrsub", "attribute-subspace"],
    )
    return _TEMPLATE.substitute(
        header=header.to_yaml(),
        name=name,
        model=_plain(config.base_model) if config.base_model else "the model it was mined for",
        modules=counted(len(basis.modules), "module"),
        dtype=config.dtype,
        digest=basis.digest,
        attributes="\n".join(_attribute_row(basis, record.name) for record in config.attributes),
        sections="".join(f"\n{section}" for section in sections),
        origin=_origin(basis),
        license=_LICENSE if license is None else "",
    )


_LICENSE = (
    "\n- No licence was named when it was saved: the terms of the base model and of the source adapters' data apply."
)


def _attribute_row(basis: Basis, attribute: str) -> str:
    record = next(a for a in basis.config.attributes if a.name == attribute)
    dims = [basis.dim(module, attribute) for module in basis.modules]
    width = f"{min(dims)}" if min(dims) == max(dims) else f"{min(dims)} to {max(dims)}"
    origin = counted(len(record.sources), "adapter") if record.sources else record.kind
    return f"| {attribute} | {width} | {origin} | {record.allocation or '-'} | {record.alpha or '-'} |"


def _origin(basis: Basis) -> str:
    """The base weights, the command that made the basis, and its source adapters."""
    lines = ["", f"The source adapters were trained on {_plain(str(basis.config.base))}."] if basis.config.base else []
    if basis.config.command:
        lines += ["", "## Made by", "", "```bash", basis.config.command.replace("```", ""), "```"]
    sources = [(record.name, source) for record in basis.config.attributes for source in record.sources]
    if sources:
        lines += ["", "| attribute | source adapter | revision | sha256 |", "|---|---|---|---|"]
        lines += [
            f"| {a} | {_plain(s.id)} | {_plain(s.revision or '-')} | {(s.sha256 or '-')[:16]} |" for a, s in sources
        ]
    for record in basis.config.attributes:
        if record.untrained:
            listing = ", ".join(map(_plain, record.untrained))
            lines += ["", f"Left out of {record.name}, because they were never trained: {listing}."]
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    """A name as text in Markdown: it may come from a stranger's file."""
    return re.sub(r"[^\w./@:+, ()-]", "_", text)
