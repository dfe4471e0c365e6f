"""BasisConfig: everything about a basis but its tensors, as JSON (basis_config.json)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import BasisError
from .identity import BaseIdentity
from .layout import ModuleLayout
from .naming import check_attribute
from .typed_json import Fields, canonical, is_sha256, is_whole, read_json, short

FORMAT = 1
CONFIG_NAME = "basis_config.json"
#: Dtypes in which a basis can be stored, by their names in torch.
DTYPE_NAMES = ("float32", "bfloat16")
#: The sha256 over everything else in the file.
_SEAL = "config_sha256"
_ADVICE = "copy or build the basis again"


def _filled(record: object) -> dict[str, Any]:
    """The fields of a record that are not empty, without `unknown`, whose keys stand next to them."""
    known = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "unknown"}  # type: ignore[arg-type]
    return {k: v for k, v in known.items() if v not in (None, {}, [])}


@dataclass
class SourceRecord:
    """One adapter that an attribute was mined from."""

    id: str
    revision: str | None = None
    sha256: str | None = None
    #: Keys of a newer version, kept as they are.
    unknown: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "revision": self.revision, "sha256": self.sha256, **self.unknown}

    @classmethod
    def read(cls, told: Fields) -> SourceRecord:
        known = told.text("id"), told.text("revision", None), told.sha256("sha256", None)
        return cls(*known, told.unknown())


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
    #: Keys of a newer version, kept as they are.
    unknown: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        record = {**_filled(self), **self.unknown}
        return record | ({"sources": [source.to_dict() for source in self.sources]} if self.sources else {})

    @classmethod
    def read(cls, told: Fields) -> AttributeRecord:
        try:
            name = check_attribute(told.text("name"))
        except BasisError as error:
            raise BasisError(f"{told.where}: {error}") from None
        return cls(
            name=name,
            kind=told.text("kind", "factors"),
            sources=[SourceRecord.read(source) for source in told.objects("sources", None)],
            untrained=told.row("untrained", "strings", lambda x: isinstance(x, str), None),
            dim=told.whole("dim", 0, None),
            allocation=told.text("allocation", None),
            alpha=told.number("alpha", default=None),
            eps=told.number("eps", default=None),
            max_iter=told.whole("max_iter", 0, None),
            tol=told.number("tol", default=None),
            seed=told.whole("seed", None, None),
            iterations=told.table("iterations", "whole numbers from 0 up", lambda x: is_whole(x, 0), None),
            hashes=told.table("hashes", "lists of sha256", _are_hashes, None),
            record_hashes=told.table("record_hashes", "sha256 of 64 hex digits", is_sha256, None),
            unknown=told.unknown(),
        )


def _are_hashes(value: object) -> bool:
    return isinstance(value, list) and all(map(is_sha256, value))


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
    #: Keys of a newer version, kept as they are.
    unknown: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        apart = ("attributes", "modules", "base", "unknown")
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart} | self.unknown
        if self.base is not None:
            record["base"] = self.base.to_dict()
        record["attributes"] = [attribute.to_dict() for attribute in self.attributes]
        record["modules"] = {name: {**layout.unknown, **layout.to_dict()} for name, layout in self.modules.items()}
        return record

    def to_json(self) -> str:
        """The text of basis_config.json: `to_dict` and its sha256, which `from_dict` checks."""
        record = self.to_dict()
        return json.dumps({**record, _SEAL: _sha256(record)}, indent=1) + "\n"

    @classmethod
    def from_dict(cls, record: object, where: str) -> BasisConfig:
        """Read what `to_dict` or `to_json` wrote; `where` is named in the error.

        Raises BasisError for a newer format, for values of the wrong type or range, and for a record that was changed
        after its sha256 was taken. One without a sha256 is of an earlier version.
        """
        if not isinstance(record, dict) or "attributes" not in record or "modules" not in record:
            raise BasisError(f"{where!r} is no {CONFIG_NAME} of a basis: it lacks 'attributes' or 'modules'.")
        told = Fields(record, repr(where))
        version = record.get("format")
        if not isinstance(version, int) or not is_whole(version, 1) or version > FORMAT:
            raise BasisError(
                f"{where!r} has format {short(version)}, this version of peft_attrsub reads up to {FORMAT}: "
                "upgrade it."
            )
        config = cls(
            attributes=[AttributeRecord.read(entry) for entry in told.objects("attributes")],
            modules={
                name: ModuleLayout.from_dict(layout, f"{where!r}, modules[{short(name)}]")
                for name, layout in told.table("modules", "objects", lambda x: isinstance(x, dict)).items()
            },
            base_model=told.text("base_model", None),
            base_model_revision=told.text("base_model_revision", None),
            dtype=told.one_of("dtype", DTYPE_NAMES, "float32"),
            digest=told.sha256("digest", None),
            library_version=told.text("library_version", None),
            command=told.text("command", None),
            format=told.whole("format", 1),
        )
        seal, base = told.sha256(_SEAL, None), record.get("base")
        if base is not None:
            config.base = BaseIdentity.read(base, f"{where!r}, base")
        config.unknown = {key: value for key, value in told.unknown().items() if key != "base"}
        names = [attribute.name for attribute in config.attributes]
        if not names or not config.modules or len(set(names)) != len(names):
            raise told.wrong("attributes", names, "at least one, each once, and at least one module")
        if seal is not None and seal != _sha256({k: v for k, v in record.items() if k != _SEAL}):
            raise BasisError(
                f"{where!r} was changed after it was saved ({_SEAL} does not match): {_ADVICE}, or remove {_SEAL} "
                "from it if you made the change."
            )
        return config


def _sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(record)).hexdigest()


def read_config(folder: Path, name: str | os.PathLike[str]) -> BasisConfig:
    """The config of the basis in `folder`; `name` is what the user called it."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = " (it holds a PEFT adapter)" if (folder / "adapter_config.json").is_file() else ""
        raise BasisError(f"{os.fspath(name)!r} has no {CONFIG_NAME}, so it is no basis{hint}.")
    return BasisConfig.from_dict(read_json(path, _ADVICE), str(path))
