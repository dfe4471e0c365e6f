"""BasisConfig: everything about a basis but its tensors, as JSON (basis_config.json)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import BasisError
from .identity import BaseIdentity
from .layout import ModuleLayout
from .naming import check_attribute

FORMAT = 1
CONFIG_NAME = "basis_config.json"
#: Dtypes in which a basis can be stored, by their names in torch.
DTYPE_NAMES = ("float32", "bfloat16")


@dataclass
class SourceRecord:
    """One adapter that an attribute was mined from."""

    id: str
    revision: str | None = None
    sha256: str | None = None


@dataclass
class AttributeRecord:
    """How one attribute's subspaces came about.

    kind: "adapters" (mined), "psv", "random", "gradient" or "factors" (given in memory). sources: the adapters in the
    order of the weight tensors. untrained: adapters that were given too and left out, because they were never
    trained. dim, allocation, alpha, eps, max_iter, tol: the settings of `build_basis`. iterations: of IRLS, by
    module. hashes: of U, S, V by module, one sha256 for every 16 directions; record_hashes: one for the spectra,
    weights, residuals and energies.
    """

    name: str
    kind: str = "factors"
    sources: list[SourceRecord] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    dim: int | None = None
    allocation: str | None = None
    alpha: float | None = None
    eps: float | None = None
    max_iter: int | None = None
    tol: float | None = None
    seed: int | None = None
    iterations: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, list[str]] = field(default_factory=dict)
    record_hashes: dict[str, str] = field(default_factory=dict)


@dataclass
class BasisConfig:
    """Format version, base model, attributes in order, layout of every module, and the digest.

    base: the weights that the adapters were trained on, where they record them; absent from the JSON where unknown.
    """

    attributes: list[AttributeRecord] = field(default_factory=list)
    modules: dict[str, ModuleLayout] = field(default_factory=dict)
    base_model: str | None = None
    base_model_revision: str | None = None
    base: BaseIdentity | None = None
    dtype: str = "float32"
    digest: str | None = None
    library_version: str | None = None
    command: str | None = None
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        record = {k: v for k, v in self.__dict__.items() if k not in ("attributes", "modules", "base")}
        if self.base is not None:
            record["base"] = self.base.to_dict()
        record["attributes"] = [
            {k: v for k, v in asdict(a).items() if v not in (None, {}, [])} for a in self.attributes
        ]
        record["modules"] = {name: layout.to_dict() for name, layout in self.modules.items()}
        return record

    @classmethod
    def from_dict(cls, record: object, where: str) -> BasisConfig:
        """Read what `to_dict` wrote; `where` is named in the error."""
        if not isinstance(record, dict) or "attributes" not in record or "modules" not in record:
            raise BasisError(f"{where!r} is no {CONFIG_NAME} of a basis: it lacks 'attributes' or 'modules'.")
        version = record.get("format")
        if not isinstance(version, int) or version > FORMAT or version < 1:
            raise BasisError(
                f"{where!r} has format {version!r}, this version of peft_attrsub reads up to {FORMAT}: upgrade it."
            )
        try:
            attributes = []
            for entry in record["attributes"]:
                known = {k: v for k, v in entry.items() if k in AttributeRecord.__dataclass_fields__}
                sources = [SourceRecord(**source) for source in known.pop("sources", [])]
                attributes.append(AttributeRecord(**known, sources=sources))
            modules = {str(name): ModuleLayout.from_dict(layout) for name, layout in record["modules"].items()}
            plain = ("base_model", "base_model_revision", "dtype", "digest", "library_version", "command")
            config = cls(attributes, modules, **{k: record[k] for k in plain if k in record}, format=version)
            config.base = BaseIdentity.of(record.get("base"))
            if config.base is None and record.get("base") is not None:
                raise ValueError(
                    f"base = {record['base']!r} does not describe base weights: expected a name and a digest"
                )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, BasisError):
                raise
            raise BasisError(f"{where!r} is damaged: {error!r} while reading it.") from error
        for attribute in config.attributes:
            check_attribute(attribute.name)
        return config


def read_config(folder: Path, name: str | os.PathLike[str]) -> BasisConfig:
    """The config of the basis in `folder`; `name` is what the user called it."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = " (it holds a PEFT adapter)" if (folder / "adapter_config.json").is_file() else ""
        raise BasisError(f"{os.fspath(name)!r} has no {CONFIG_NAME}, so it is no basis{hint}.")
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise BasisError(f"{str(path)!r} is not valid JSON ({error}): copy or build the basis again.") from error
    return BasisConfig.from_dict(record, str(path))
