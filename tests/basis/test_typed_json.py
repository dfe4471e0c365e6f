"""Values of other types, ranges and lengths in the JSON files of strangers: refused in a sentence, or of no effect."""

import dataclasses
import json
import math
import shutil
import warnings
from random import Random

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from peft_attrsub import Basis, BasisError, build_basis, export_lora, project_lora
from peft_attrsub.analysis import analyse
from peft_attrsub.basis import LoraAdapter, lora_config
from peft_attrsub.basis.adapters import WEIGHTS
from peft_attrsub.basis.typed_json import Fields, read_json
from peft_attrsub.cli_text import summary

from .helpers import SHAPES, edit_config, random_factors, save_lora
from .mutations import flipped, mutated

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


@pytest.fixture
def sharded(basis, tmp_path):
    """A saved basis with all kinds of files: config, index, shards, records."""
    basis.select().save_pretrained(tmp_path / "sharded", max_shard_size=1000)
    return tmp_path / "sharded"


@pytest.mark.parametrize("sealed", [True, False])
def test_mutated_basis_configs(sharded, sealed):
    """With its sha256 a config is what was saved or refused; without one (earlier versions) it is at least sound."""
    random, path = Random(sealed), sharded / "basis_config.json"
    text = path.read_text()
    original, before, refused = json.loads(text), shown(sharded), 0
    if not sealed:
        del original["config_sha256"]
    for _ in range(500):
        place, mutation = mutated(original, random)
        path.write_text(mutation)
        try:
            after = shown(sharded)
            assert after == before or not sealed, place
        except BasisError as error:
            one_sentence(error)
            refused += 1
    path.write_text(text)
    assert refused > 300 and shown(sharded) == before


def test_mutated_indexes(sharded):
    random, path = Random(0), sharded / "basis.safetensors.index.json"
    text, before, refused = path.read_text(), shown(sharded), 0
    for _ in range(500):
        place, mutation = mutated(json.loads(text), random)
        path.write_text(mutation)
        try:
            assert shown(sharded) == before, place
        except BasisError as error:
            one_sentence(error)
            refused += 1
    path.write_text(text)
    assert refused > 100


def test_mutated_headers(sharded, adapter):
    """The JSON at the head of safetensors files, of a basis and of an adapter."""

    def deltas():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora = LoraAdapter(adapter)
            return {m: [t.tolist() for t in lora.read(m)] for m in lora.modules}

    random = Random(0)
    shard = next(sharded.glob("basis-*.safetensors"))
    for path, look in ((shard, shown), (sharded / "basis_records.safetensors", shown), (adapter / WEIGHTS, deltas)):
        data, before, refused = path.read_bytes(), look(*([sharded] if look is shown else [])), 0
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:size])
        for _ in range(500):
            place, text = mutated(
                header, random, renames=look is shown
            )  # what keys of adapters mean is tested elsewhere
            if random.random() < 0.1:
                text = json.dumps(header).replace("F32", random.choice(["I32", "U32", "BF16", "F64", "F4", "f32"]), 1)
            coded = text.encode()
            path.write_bytes(len(coded).to_bytes(8, "little") + coded + data[size:])
            try:
                assert look(*([sharded] if look is shown else [])) == before, place
            except BasisError as error:
                one_sentence(error)
                refused += 1
        path.write_bytes(data)
        assert refused > 300


def test_flipped_bits(sharded):
    """Any bit of any file that is read: the same numbers, or one sentence."""
    random, before = Random(0), shown(sharded)
    for path in (*sharded.glob("*.json"), sharded / "basis_records.safetensors", next(sharded.glob("basis-*"))):
        data = path.read_bytes()
        for _ in range(200):
            path.write_bytes(flipped(data, random))
            try:
                assert shown(sharded) == before, path.name
            except BasisError as error:
                one_sentence(error)
        path.write_bytes(data)


def test_unknown_keys_are_kept_at_every_level(sharded, tmp_path):
    """What a newer version wrote into basis_config.json is there again after it was read and saved."""
    folder = tmp_path / "newer"
    shutil.copytree(sharded, folder)
    path = folder / "basis_config.json"
    record = json.loads(path.read_text())
    digest = record["digest"]
    news = {"new": {"a": [1, None, {"b": "é"}]}, "newer": 1.5}
    base = {"name": "toy", "digest": "a" * 64}
    record = {**record, **news, "base": {**base, **news}}
    del record["config_sha256"]
    attribute, module = record["attributes"][0], next(iter(record["modules"].values()))
    for part in (attribute, attribute["sources"][1], module):
        part.update(news)
    path.write_text(json.dumps(record))
    basis = Basis.from_pretrained(folder)
    basis.select().save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "basis_config.json").read_text())
    assert again.pop("config_sha256") and again == record
    assert basis.digest == digest and Basis.from_pretrained(tmp_path / "again").digest == digest
    basis.select(basis.attributes[0], dim=1).save_pretrained(tmp_path / "part")
    part = json.loads((tmp_path / "part" / "basis_config.json").read_text())
    for level in (part, part["base"], part["attributes"][0], part["attributes"][0]["sources"][1]):
        assert {key: level.get(key) for key in news} == news


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "'x' twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 65 + b"]" * 65, "deeper than 64"),
        (b"[" * 10**6, "deeper than 64"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_texts_that_are_not_read(tmp_path, data, words):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(BasisError, match=words) as caught:
        read_json(path, "copy it again")
    one_sentence(caught.value)
    assert str(path) in str(caught.value)


def test_strange_settings_of_an_adapter_are_named(adapter, tmp_path):
    """A setting of a newer PEFT may change dW; one that is empty or that PEFT has always had does not."""
    shutil.copytree(adapter, tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraAdapter(edit_config(tmp_path / "new", future_thing=None, other_thing=False, lora_dropout=0.1))
    with pytest.warns(UserWarning, match="'future_thing'"):
        LoraAdapter(edit_config(tmp_path / "new", future_thing={"mode": 1}))


def test_no_field_of_peft_is_strange(adapter, tmp_path):
    """The list of settings that are not reported is complete for the PEFT installed."""
    told = Fields(dict.fromkeys(f.name for f in dataclasses.fields(LoraConfig)), "a config")
    told.record |= {"r": 8, "lora_alpha": 8, "bias": "none", "peft_type": "LORA"}
    lora_config.check_values(told)
    assert set(told.unknown()) - {"peft_type"} <= lora_config.NOT_REPORTED


def test_mutated_configs_of_our_own_adapters(adapter, sharded, tmp_path):
    """export-lora reads adapter_config.json: a mutation is refused in one sentence, or gives the same LoRA."""

    def exported(name):
        export_lora(folder, tmp_path / name)
        return {k: v.tolist() for k, v in load_file(tmp_path / name / WEIGHTS).items()}

    folder, random = tmp_path / "cores", Random(0)
    lora = save_lora(tmp_path / "lora", random_factors(SHAPES, 3, torch.Generator().manual_seed(5)))
    project_lora(lora, sharded, output=folder)
    path, before, refused = folder / "adapter_config.json", exported("before"), 0
    original = json.loads(path.read_text())
    for number in range(100):
        place, text = mutated(original, random, renames=False)
        path.write_text(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert exported(f"{number}") == before or place == ("scaling",), place
        except ValueError as error:  # of which the command makes a sentence and exit status 2
            assert str(error)
            refused += 1
    assert refused > 25
