"""Which base weights adapters and bases were made for: recorded, kept, and refused where they differ."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_attrsub import Basis, BasisError, build_basis, project_lora
from peft_attrsub.analysis.explain import captured_energy
from peft_attrsub.basis.identity import BaseIdentity, adapter_base, shared_base

from .helpers import SHAPES, edit_config, random_factors, save_lora

PRINTABLE = st.text(string.printable[:95], max_size=20)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
IDENTITIES = st.builds(
    BaseIdentity, PRINTABLE, DIGESTS, st.none() | PRINTABLE.filter(bool), st.none() | st.integers(0, 9)
)
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["training", "base", "name", "x"]), part)
    ),
)
TRAINED = BaseIdentity("vggt-mini", "a" * 64)
UNTRAINED = BaseIdentity("vggt-mini", "b" * 64, seed=0)


def adapter(folder: Path, base: BaseIdentity | None, seed: int = 0, **config: Any) -> str:
    save_lora(folder, random_factors(SHAPES, 3, torch.Generator().manual_seed(seed)), **config)
    training = {"attribute": "texture"} | ({} if base is None else {"base": base.to_dict()})
    return edit_config(folder, auto_mapping={"base_model_class": "M", "parent_library": "l", "training": training})


def mined(folder: Path, base: BaseIdentity | None, name: str = "texture") -> Basis:
    pair = [adapter(folder / f"{name}-{i}", base, i) for i in range(2)]
    basis = build_basis({name: pair}, dim=2, progress=False)
    basis.save_pretrained(folder / f"basis-{name}")
    return Basis.from_pretrained(folder / f"basis-{name}")


@given(IDENTITIES)
def test_what_is_written_is_read(base: BaseIdentity) -> None:
    record = json.loads(json.dumps(base.to_dict()))
    assert BaseIdentity.of(record) == base
    assert adapter_base({"auto_mapping": {"training": {"base": record}}}) == base
    assert base.digest[:12] in str(base) and ("untrained weights" in str(base)) == (base.seed is not None)


@given(JSON)
def test_what_others_wrote_in_that_place_is_no_record(found: Any) -> None:
    for config in ({"auto_mapping": found}, {"auto_mapping": {"training": found}}):
        assert adapter_base(config) is None
    assert BaseIdentity.of(found) is None
    for damage in ({"digest": "A" * 64}, {"digest": "a" * 63}, {"name": "x\x1b[31m"}, {"name": None}, {"seed": "0"}):
        assert BaseIdentity.of(TRAINED.to_dict() | damage) is None


@given(st.lists(st.none() | st.sampled_from([TRAINED, UNTRAINED, replace(TRAINED, name="other")]), max_size=5))
def test_the_digest_alone_decides(bases: list[BaseIdentity | None]) -> None:
    parts = [(f"part {number}", base) for number, base in enumerate(bases)]
    digests = {base.digest for base in bases if base is not None}
    if len(digests) < 2:
        assert shared_base(parts, "stop") == next((base for base in bases if base is not None), None)
        return
    with pytest.raises(BasisError, match="the base weights differ") as caught:
        shared_base(parts, "stop")
    assert str(TRAINED.digest[:12]) in str(caught.value) and str(UNTRAINED) in str(caught.value)


def test_a_basis_keeps_the_base_of_its_adapters(tmp_path: Path) -> None:
    basis = mined(tmp_path, TRAINED)
    assert basis.config.base == TRAINED
    assert basis.select(dim=1).config.base == Basis.combine([basis]).config.base == TRAINED
    assert str(TRAINED).replace("'", "") in (tmp_path / "basis-texture" / "README.md").read_text()
    # A file of an earlier version has no such key, and is the same basis.
    path = tmp_path / "basis-texture" / "basis_config.json"
    record = json.loads(path.read_text())
    assert record.pop("base") == TRAINED.to_dict() and record["format"] == 1
    path.write_text(json.dumps(record))
    with pytest.raises(BasisError, match="changed after it was saved"):
        Basis.from_pretrained(tmp_path / "basis-texture")
    del record["config_sha256"]
    path.write_text(json.dumps(record))
    old = Basis.from_pretrained(tmp_path / "basis-texture")
    assert old.config.base is None and old.digest == basis.digest
    path.write_text(json.dumps(record | {"base": {"name": "x"}}))
    with pytest.raises(BasisError, match="base lacks 'digest'"):
        Basis.from_pretrained(tmp_path / "basis-texture")


def test_adapters_of_two_bases_are_refused_by_name(tmp_path: Path) -> None:
    pair = [adapter(tmp_path / "one", TRAINED), adapter(tmp_path / "two", UNTRAINED, 1)]
    unknown = adapter(tmp_path / "three", None, 2)
    with pytest.raises(BasisError) as caught:
        build_basis([pair[0], unknown, pair[1]], dim=2, progress=False)
    for words in (pair[0], pair[1], str(TRAINED), str(UNTRAINED)):
        assert words in str(caught.value)
    assert unknown not in str(caught.value)
    # One without a record is mined as before, with the others or alone.
    assert build_basis([pair[1], unknown], dim=2, progress=False).config.base == UNTRAINED
    assert build_basis([unknown], dim=2, progress=False).config.base is None


def test_the_same_weights_may_have_two_names(tmp_path: Path) -> None:
    names = {"one": "/models/vggt", "two": "facebook/VGGT-1B"}
    pair = [adapter(tmp_path / key, TRAINED, i, base_model=name) for i, (key, name) in enumerate(names.items())]
    assert build_basis(pair, dim=2, progress=False).config.base == TRAINED
    pair[1] = adapter(tmp_path / "three", None, base_model="facebook/VGGT-1B")
    with pytest.raises(BasisError, match="different base models"):
        build_basis(pair, dim=2, progress=False)


def test_bases_of_two_bases_are_not_combined(tmp_path: Path) -> None:
    first, second = mined(tmp_path, TRAINED), mined(tmp_path, UNTRAINED, "geometry")
    free = mined(tmp_path, None, "light")
    with pytest.raises(BasisError, match=r"the base weights differ: basis .*basis-texture.* basis .*basis-geometry"):
        Basis.combine([free, first, second])
    assert Basis.combine([free, second]).config.base == UNTRAINED


def test_a_lora_of_another_base_is_not_held_against_a_basis(tmp_path: Path) -> None:
    basis = mined(tmp_path, TRAINED)
    other, own = adapter(tmp_path / "other", UNTRAINED), adapter(tmp_path / "own", TRAINED)
    for refuse in (project_lora, captured_energy):
        with pytest.raises(BasisError, match=r"the base weights differ: the basis has .*, adapter .*other"):
            refuse(other, basis)
    folder = project_lora(own, basis, tmp_path / "cores").folder
    assert folder is not None
    assert adapter_base(json.loads((Path(folder) / "adapter_config.json").read_text())) == TRAINED
