"""The part of an adapter's model card that says which basis it needs and how it is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from ..basis.hub import is_local, split_revision

_BEGIN, _END = "<!-- peft_attrsub: which basis -->", "<!-- peft_attrsub: end -->"
_TAG = "peft-attrsub"


def update_card(folder: str | os.PathLike[str], config: Mapping[str, Any], repo_id: str | None = None) -> None:
    """Put the section into the README.md that PEFT has written for this adapter; without one, do nothing.

    PEFT saves an adapter that is not named "default" in a folder of its own, below its card. repo_id: where the
    adapter is going, if that is known.
    """
    from huggingface_hub import ModelCard

    here = Path(folder)
    path = here / "README.md"
    named = not path.is_file() and (here / "adapter_model.safetensors").is_file()
    if named:
        path = here.parent / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path)
    if card.data.library_name != "peft":
        return
    card.data.tags = sorted({*(card.data.tags or []), _TAG})
    begin, end = (f"{mark[:-4]} ({here.name}) -->" if named else mark for mark in (_BEGIN, _END))
    section = f"{begin}\n{_section(config, here.name if named else None, repo_id or 'this/repository')}\n{end}"
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), card.text, re.DOTALL)
    if found:
        card.text = card.text[: found.start()] + section + card.text[found.end() :]
    else:
        card.text = f"\n{section}\n\n{card.text.lstrip()}"
    card.save(path)


def keep_card_on_push(config_cls: type[PeftConfig]) -> None:
    """Have PeftModel.push_to_hub upload the card of an adapter of ours; calling it again changes nothing.

    transformers' push_to_hub, which PeftModel inherits, saves a blank card over the one that save_pretrained has
    written. Its last step, `_upload_modified_files`, is the only place where the right one can be put back.
    """
    inherited = PeftModel._upload_modified_files
    if getattr(inherited, "_keeps_card", False):
        return

    @wraps(inherited)
    def upload(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        ours = {name: config for name, config in self.peft_config.items() if isinstance(config, config_cls)}
        if ours:
            self.create_or_update_model_card(working_dir)
        for name, config in ours.items():
            folder = working_dir if name == "default" else os.path.join(working_dir, name)
            update_card(folder, config.saved_dict(), repo_id)
        return inherited(self, working_dir, repo_id, *args, **kwargs)

    upload._keeps_card = True  # type: ignore[attr-defined]
    PeftModel._upload_modified_files = upload


def _section(config: Mapping[str, Any], name: str | None, repo_id: str) -> str:
    subfolder = f', subfolder="{name}"' if name else ""
    title = f"## Attribute-subspace adapter{f' {name!r}' if name else ''}"
    return f"""{title}

This adapter holds only the cores M of dW = A M B^T; {_needs(config)}

```python
import peft_attrsub  # pip install peft-attrsub; teaches PEFT this kind of adapter
from peft import PeftConfig, PeftModel

model = PeftModel.from_pretrained(model, "{repo_id}"{subfolder})
```"""


def _needs(config: Mapping[str, Any]) -> str:
    """Where A and B come from, in words."""
    digest = f"digest `{config['basis_digest']}`"
    if config["basis_in_adapter"]:
        return "the frozen A and B are in its own file."
    if config["basis"] is None:
        return "it uses no basis (all its modules carry a plain LoRA)."
    if config["basis"] == "random":
        return f"A and B are drawn at random from seed {config['seed']}."
    from huggingface_hub.constants import ENDPOINT

    names = config["basis"] if isinstance(config["basis"], list) else [config["basis"]]
    parts = []
    for name in names:
        repo, own = split_revision(name)
        revision = own or config["basis_revision"]
        if is_local(name) or os.path.isabs(name):
            parts.append(f"`{Path(name).name}`, a folder of the machine it was trained on")
        else:
            link = f"[`{repo}`]({ENDPOINT}/{repo})"
            parts.append(f"{link} at revision `{revision}`" if revision else link)
    noun = "the basis" if len(parts) == 1 else "the bases"
    return f"A and B come from {noun} {', '.join(parts)} ({digest}), which PEFT fetches and checks by itself."
