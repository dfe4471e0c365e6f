"""What a client does with a Hub, by name: each function runs in a process of its own (see worker.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.utils import build_hf_headers, get_session
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, build_basis, random_basis


def call(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The value, or the sentence of a BasisError; anything else is a failure of the process."""
    try:
        return {"value": globals()[name](**kwargs)}
    except BasisError as error:
        return {"error": str(error)}


def base() -> nn.Module:
    """The model that the test's adapters and bases are for: linear layers "0" (24 x 16) and "2" (4 x 24)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def outputs(model: nn.Module) -> list[Any]:
    """What the model says to a fixed input; floats survive JSON bit for bit."""
    with torch.no_grad():
        return model(torch.arange(32.0).reshape(2, 16) / 32).tolist()


# Bases


def push(folder: str, repo: str, part: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A basis from a folder, or the `part` of it that `select` gives; it stays readable after the push."""
    basis = Basis.from_pretrained(folder).select(**part or {})
    info = basis.push_to_hub(repo, **options)
    basis.verify()
    return {
        "digest": basis.digest,
        "oid": info.oid,
        "source": basis.source,
        "revision": basis.revision,
        "pr_url": info.pr_url,
    }


def push_built(adapters: Any, repo: str, **options: Any) -> dict[str, Any]:
    """A basis that was never saved to a folder."""
    basis = build_basis(adapters, dim=2, progress=False)
    info = basis.push_to_hub(repo, **options)
    return {"oid": info.oid, "digest": basis.digest, "source": basis.source, "revision": basis.revision}


def push_then_tune(adapters: list[str], repo: str, folder: str) -> dict[str, Any]:
    """One session from adapters to a tuned model; the basis is never saved to a folder."""
    basis = build_basis(adapters, dim=2, progress=False)
    basis.push_to_hub(repo)
    return {**tune(basis, folder), "revision": basis.revision}


def push_random(repo: str) -> str:
    """A basis that was not mined; returns its digest."""
    basis = random_basis(base(), dim=2)
    basis.push_to_hub(repo)
    return basis.digest


def load_digest(name: str) -> str:
    return Basis.from_pretrained(name).digest


def load(name: str, **options: Any) -> dict[str, Any]:
    """Open a basis and read all of it: tensors and records."""
    basis = Basis.from_pretrained(name, **options)
    basis.verify()
    module, attribute = basis.modules[0], basis.attributes[0]
    return {
        "digest": basis.digest,
        "attributes": basis.attributes,
        "source": basis.source,
        "revision": basis.revision,
        "weights": basis.weights(module, attribute).tolist(),
        "spectrum": [s.tolist() for s in basis.spectrum(module, attribute)],
    }


def build(adapters: Any, **options: Any) -> dict[str, Any]:
    basis = build_basis(adapters, dim=2, progress=False, **options)
    return {"digest": basis.digest, "revisions": [s.revision for s in basis.config.attributes[0].sources]}


# Adapters


def tune(basis: Any, folder: str, **config: Any) -> dict[str, Any]:
    """An adapter with random cores, as if trained."""
    model = get_peft_model(base(), AttrSubspaceConfig(basis=basis, init_weights=False, **config))
    model.save_pretrained(folder)
    record = json.loads((Path(folder) / "adapter_config.json").read_text())
    return {"outputs": outputs(model), "config": record}


def push_adapter(basis: Any, repo: str, **config: Any) -> dict[str, Any]:
    model = get_peft_model(base(), AttrSubspaceConfig(basis=basis, init_weights=False, **config))
    model.push_to_hub(repo)
    return {"outputs": outputs(model)}


def use(adapter: str, **options: Any) -> list[Any]:
    """The outputs of the base model with a saved adapter."""
    return outputs(PeftModel.from_pretrained(base(), adapter, **options))


def resave(adapter: str, folder: str) -> None:
    PeftModel.from_pretrained(base(), adapter).save_pretrained(folder)


def unadapted() -> list[Any]:
    return outputs(base())


def run_snippet(repo: str) -> list[Any]:
    """The outputs of the model that the card's own Python makes, where `model` stands for the base model."""
    text = ModelCard.load(repo).text
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    names: dict[str, Any] = {"model": base()}
    exec(compile(code, f"README.md of {repo}", "exec"), names)
    return [outputs(names["model"]), type(names["model"]).__name__, code]


def card(repo: str) -> dict[str, Any]:
    found = ModelCard.load(repo)
    return {"header": found.data.to_dict(), "text": found.text}


# The plain client, to look with


def commits(repo: str, revision: str = "main") -> list[str]:
    return [c.commit_id for c in HfApi().list_repo_commits(repo, revision=revision)]


def files(repo: str, revision: str = "main") -> dict[str, Any]:
    """path -> (size, sha256 of a large file or None)."""
    tree = HfApi().list_repo_tree(repo, revision=revision, recursive=True)
    return {f.path: [f.size, f.lfs and f.lfs.sha256] for f in tree if hasattr(f, "blob_id")}


def branches(repo: str) -> list[str]:
    return sorted(b.name for b in HfApi().list_repo_refs(repo).branches)


def is_private(repo: str) -> bool:
    return bool(HfApi().model_info(repo).private)


def me() -> str:
    return str(HfApi().whoami()["name"])


def delete(repo: str) -> None:
    HfApi().delete_repo(repo, missing_ok=True)


def commit(repo: str, contents: dict[str, str], **options: Any) -> str:
    """Upload texts by hand, as somebody else would."""
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    operations = [CommitOperationAdd(path, text.encode()) for path, text in contents.items()]
    return str(api.create_commit(repo, operations, commit_message="by hand", **options).oid)


def upload(folder: str, repo: str, **options: Any) -> str:
    """A whole folder in one commit; the title is "upload"."""
    HfApi().create_repo(repo, exist_ok=True)
    return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="upload", **options).oid)


def dangling_pointer(repo: str) -> int:
    """The status of a commit of a large file that nobody uploaded."""
    header = {"key": "header", "value": {"summary": "x"}}
    pointer = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    body = "".join(json.dumps(line) + "\n" for line in (header, pointer))
    url = f"{HfApi().endpoint}/api/models/{repo}/commit/main"
    return int(get_session().post(url, content=body.encode(), headers=build_hf_headers()).status_code)


def api(method: str, args: list[Any] | None = None, **kwargs: Any) -> Any:
    """A method of HfApi; what it raises by name."""
    try:
        answer = getattr(HfApi(), method)(*(args or []), **kwargs)
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return answer if isinstance(answer, (str, int, bool, dict, list, type(None))) else str(answer)


def download(repo: str, path: str, **options: Any) -> str:
    return hf_hub_download(repo, path, **options)


def snapshot(repo: str, **options: Any) -> str:
    return snapshot_download(repo, **options)
