"""Who takes part in the mining: copies, near-copies and adapters that were never trained, among random honest ones."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_attrsub import Basis, BasisError, build_basis
from peft_attrsub.basis.roll_call import inner_products

from .helpers import SHAPES, random_factors, save_lora

WEIGHTS = "adapter_model.safetensors"


def honest(root, count, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [save_lora(root / f"run-{i}", random_factors(SHAPES, 3, generator), **options) for i in range(count)]


def resaved(source, target, change=lambda tensors: tensors, **config):
    """A copy whose file has other bytes: other metadata, and what `change` and `config` do."""
    shutil.copytree(source, target)
    save_file(change(load_file(Path(source) / WEIGHTS)), target / WEIGHTS, metadata={"format": "pt", "step": "7"})
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(target)


def noted(adapters, **options):
    """The basis, and what was said."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        basis = build_basis(adapters, progress=False, **options)
    return basis, [str(one.message) for one in seen]


def link(source, target):
    os.symlink(source, target)
    return str(target)


def other_prefix(tensors):
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


COPIES = {
    "again": lambda s, t: s,
    "other spelling": lambda s, t: f"{Path(s).parent}/./{Path(s).name}/",
    "copy": lambda s, t: str(shutil.copytree(s, t)),
    "link": link,
    "saved again": resaved,
    "names without prefix": lambda s, t: resaved(s, t, other_prefix),
    "other words in the config": lambda s, t: resaved(s, t, inference_mode=False, lora_dropout=0.3),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("place", [0, 2])
def test_a_copy_is_refused_by_name_within_an_attribute_and_noted_across(tmp_path, how, place):
    rows = honest(tmp_path, 3)
    copy = COPIES[how](rows[place], tmp_path / "copy")
    with pytest.raises(BasisError, match="is a copy of") as caught:
        build_basis({"a": rows[:1], "b": [*rows, copy]}, progress=False)
    assert repr(copy) in str(caught.value) and repr(rows[place]) in str(caught.value) and "'b'" in str(caught.value)
    alone = build_basis({"a": rows, "b": honest(tmp_path / "b", 2, seed=9)}, progress=False)
    both, notes = noted({"a": rows, "b": [*honest(tmp_path / "b", 2, seed=9), copy]})
    assert len(notes) == 1 and "are copies" in notes[0] and "'a'" in notes[0] and "'b'" in notes[0]
    for module in alone.modules:
        assert torch.equal(both.factors(module, "a")[0], alone.factors(module, "a")[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), live=st.integers(1, 4), dead=st.integers(1, 5), side=st.sampled_from("AB"),
       rule=st.sampled_from(["uniform", "energy", "gap", "importance"]), data=st.data())  # fmt: skip
def test_untrained_adapters_change_nothing(tmp_path_factory, seed, live, dead, side, rule, data):
    root = tmp_path_factory.mktemp("dead")
    rows = honest(root, live, seed)

    def zeroed(tensors):
        return {k: torch.zeros_like(v) if f"lora_{side}" in k else v for k, v in tensors.items()}

    others = [resaved(row, root / f"dead-{i}", zeroed) for i, row in enumerate(honest(root / "more", dead, seed + 1))]
    mixed = data.draw(st.permutations(others + rows))
    expected = build_basis([row for row in mixed if row in rows], allocation=rule, dim=4, progress=False)
    found, notes = noted(mixed, allocation=rule, dim=4)
    assert found.digest == expected.digest
    assert sorted(notes) == sorted(note for note in notes if "was never trained" in note) and len(notes) == dead
    assert all(any(repr(other) in note for note in notes) for other in others)
    for module in expected.modules:
        for part in ("first", "last", "weights", "residuals", "energy", "ranks"):
            assert torch.equal(found.record(module, "shared", part), expected.record(module, "shared", part))
    # Who was left out is recorded, and said by the card.
    found.save_pretrained(root / "basis")
    assert len(Basis.from_pretrained(root / "basis").config.attributes[0].untrained) == dead
    assert "never trained" in (root / "basis" / "README.md").read_text()


def test_an_attribute_that_was_never_trained_is_an_error(tmp_path):
    rows = honest(tmp_path, 2)

    def zeroed(tensors):
        return {k: v * ("lora_B" not in k) for k, v in tensors.items()}

    dead = [resaved(row, tmp_path / f"dead-{i}", zeroed) for i, row in enumerate(rows)]
    with pytest.raises(BasisError, match=r"'b'.*never trained") as caught:
        build_basis({"a": rows, "b": dead}, progress=False)
    assert all(repr(one) in str(caught.value) for one in dead)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), size=st.sampled_from([0.0, 1e-4, 1e-2, 0.2, 1.0]), factor=st.sampled_from([1.0, 3.0])
)
def test_a_near_copy_is_noted_by_its_cosine(tmp_path_factory, seed, size, factor):
    root = tmp_path_factory.mktemp("near")
    rows = honest(root, 3, seed)
    generator = torch.Generator().manual_seed(seed)

    def nudged(tensors):
        return {k: v + size * v.std() * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}

    near = resaved(rows[1], root / "near", nudged, lora_alpha=3 * factor)

    def flat(path):
        tensors = load_file(Path(path) / WEIGHTS)
        stems = sorted({k.partition(".lora_")[0] for k in tensors})
        return torch.cat([(tensors[f"{s}.lora_B.weight"].double() @ tensors[f"{s}.lora_A.weight"].double()).flatten()
                          for s in stems])  # fmt: skip

    cosine = float(torch.nn.functional.cosine_similarity(flat(near), flat(rows[1]), dim=0))
    if size == 0 and factor == 1:
        with pytest.raises(BasisError, match="is a copy of"):
            build_basis([*rows, near], progress=False)
        return
    _, notes = noted([*rows, near])
    assert [f"{cosine:.5f}" in note and "nearly a copy" in note for note in notes] == [True] * (cosine > 0.999)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_inner_products_are_those_of_the_dense_updates(seed, ranks):
    generator = torch.Generator().manual_seed(seed)
    lefts, rights = ([torch.randn(n, r, generator=generator, dtype=torch.float64) for r in ranks] for n in (9, 7))
    dense = torch.stack([(p @ q.T).flatten() for p, q in zip(lefts, rights, strict=True)])
    torch.testing.assert_close(inner_products(lefts, rights), dense @ dense.T)
