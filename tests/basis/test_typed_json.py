"""Values of other types, ranges and lengths in the JSON files of strangers: refused in a sentence, or of no effect."""

import json
import math
import warnings
from random import Random

import pytest
import torch

from peft_attrsub import Basis, BasisError, build_basis
from peft_attrsub.analysis import analyse
from peft_attrsub.basis import LoraAdapter
from peft_attrsub.basis.typed_json import read_json
from peft_attrsub.cli_text import summary

from .helpers import SHAPES, edit_config, make_basis, random_factors, save_lora
from .mutations import mutated

NAMES = list(SHAPES)


def one_sentence(error):
    text = str(error)
    assert len(text.splitlines()) == 1 and text.isprintable() and 20 < len(text) < 700, text


def shown(folder):
    """Everything that info and report say, and that info --verify agrees."""
    basis = Basis.from_pretrained(folder)
    found = summary(basis), analyse(basis, draws=1, mismatches=0).to_dict()
    basis.verify()
    return json.dumps(found)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("mutated") / "adapter"
    save_lora(
        folder,
        random_factors(SHAPES, 3, generator),
        lora_alpha=6,
        rank_pattern={NAMES[0]: 3},
        alpha_pattern={r"block\.1\..*": 5},
        use_rslora=True,
    )
    base = {"name": "toy", "digest": "a" * 64, "revision": "main", "seed": 3}
    edit_config(folder, auto_mapping={"base_model_class": "M", "training": {"base": base, "epochs": 3}})
    return folder


def opened(folder):
    lora = LoraAdapter(folder)
    return {m: (e.rank, e.layout) for m, e in lora.entries.items()}, lora.base, lora.base_model, scalings(lora)


def scalings(lora):
    return {module: entry.scaling for module, entry in lora.entries.items()}


def expected_scalings(config):
    """alpha / r or alpha / sqrt(r), by the words of PEFT's documentation."""
    alphas = dict.fromkeys(NAMES, config.get("lora_alpha", 8))
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if pattern == r"block\.1\..*":
            alphas[NAMES[1]] = alpha
    return {m: a / (math.sqrt(3) if config.get("use_rslora") else 3) for m, a in alphas.items()}


def test_mutated_adapter_configs(adapter):
    random, path = Random(4), adapter / "adapter_config.json"
    original = json.loads(path.read_text())
    before, refused, mined = opened(adapter), 0, 0
    partner = save_lora(adapter.parent / "partner", random_factors(SHAPES, 3, torch.Generator().manual_seed(1)))
    for _ in range(500):
        place, text = mutated(original, random)
        path.write_text(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                entries, base, base_model, scaling = opened(adapter)
                if scaling != before[3] or random.random() < 0.1:
                    basis = build_basis([adapter, partner], dim=2, base_model="toy/base", progress=False)
                    assert all(t.isfinite().all() for m in NAMES for t in basis.factors(m, "shared")), place
                    mined += 1
        except BasisError as error:
            one_sentence(error)
            refused += 1
            continue
        assert entries == before[0], place
        assert base == before[1] or "auto_mapping" in place, place
        assert base_model == before[2] or place[0] == "base_model_name_or_path", place
        if scaling != before[3]:
            assert place[0] in ("lora_alpha", "alpha_pattern", "use_rslora"), place
            assert scaling == pytest.approx(expected_scalings(json.loads(text))), place
    path.write_text(json.dumps(original))
    assert refused > 100 and mined > 20
