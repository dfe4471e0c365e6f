"""One name for a module: wrapped, compiled, inside another model, a part of one, or renamed by transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, build_basis, export_lora, hotswap_adapter
from peft_attrsub.tuner.names import ModuleNames
from tests import pairs

ROOT = Path(__file__).resolve().parents[2]


# Random trees


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


class Holder(nn.Module):
    """A user's class around a model, with a layer of its own."""

    def __init__(self, vggt: nn.Module) -> None:
        super().__init__()
        self.vggt = vggt
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.vggt(x)


class Pair(nn.Module):
    """Two models side by side, of the same or of other shapes."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


NAMES = st.sampled_from(["q", "v", "layers", "module", "encoder", "0"])
TREES = st.recursive(st.just({}), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=10)


def grown(tree: dict[str, Any]) -> nn.Module:
    """Modules named as the tree, with a Linear at every end."""
    if not tree:
        return nn.Linear(2, 2)
    module = nn.Module()
    for name, inner in tree.items():
        module.add_module(name, grown(inner))
    return module


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def wrap_some(model: nn.Module, draw: Callable[[Any], Any]) -> nn.Module:
    """The same modules, each in none, one or two wrappers."""
    for name, child in list(model.named_children()):
        setattr(model, name, wrap_some(child, draw))
    for wrapper in draw(
        st.lists(st.sampled_from([compiled, checkpoint_wrapper, nn.DataParallel]), max_size=2, unique=True)
    ):
        model = wrapper(model)
    return model


@settings(max_examples=60, deadline=None)
@given(TREES, st.data())
def test_wrappers_do_not_change_a_name(tree: dict[str, Any], data: Any) -> None:
    """Whatever is around them, the very same modules keep the names they had."""
    model = grown(tree)
    before = {id(module): name for name, module in linears(model).items()}
    wrapped = wrap_some(model, data.draw)
    names = ModuleNames(wrapped, before.values())
    assert {id(m): names.of(name) for name, m in linears(wrapped).items()} == before
    assert all(names.inside(name) for name in linears(wrapped)) and not names.prefixes


def explanations(names: set[str], known: set[str]) -> list[dict[str, str]]:
    """All ways to put one prefix before every name on one side, by trying every beginning there is."""

    def endings(name: str) -> set[str]:
        parts = name.split(".")
        return {".".join(parts[i:]) for i in range(1, len(parts))}

    def beginnings(pool: set[str]) -> set[str]:
        return {".".join(n.split(".")[:i]) for n in pool for i in range(1, n.count(".") + 1)}

    alike = {n for n in names if endings(n) & known}, {k for k in known if endings(k) & names}
    if all(alike):
        return []
    found = []
    for p in beginnings(names):
        explained = {n for n in names if n.startswith(p + ".") and n[len(p) + 1 :] in known}
        if {n[len(p) + 1 :] for n in explained} == known and alike[0] == explained:
            found.append({p: ""})
    for p in beginnings(known):
        below = {k for k in known if k.startswith(p + ".")}
        if below and {k[len(p) + 1 :] for k in below} <= names and alike[1] == below:
            found.append({"": p})
    return found


@settings(max_examples=300, deadline=None)
@given(TREES.filter(bool), TREES, st.lists(NAMES, max_size=2), st.data())
def test_a_basis_fits_at_one_place_or_nowhere(
    tree: dict[str, Any], other: dict[str, Any], where: list[str], data: Any
) -> None:
    """A base in another model, next to others; and a part of it. Never at a wrong place, and found where it can be."""
    model = grown(tree)
    known = set(linears(model))
    whole = model
    for name in reversed(where):
        outer = grown(other) if other else nn.Module()
        outer.add_module(name, whole)
        whole = outer
    part = data.draw(st.sampled_from([name for name, m in model.named_modules() if not isinstance(m, nn.Linear)]))
    for seen, prefixes in ((whole, {".".join(where): ""}), (model.get_submodule(part), {"": part})):
        true = {} if prefixes == {"": ""} else prefixes
        own = {name for name, _ in seen.named_modules() if name}
        names = ModuleNames(seen, known)
        found = [] if known & own else explanations(own, known)
        assert names.prefixes == (found[0] if len(found) == 1 else {})
        if len(found) == 1:
            assert names.prefixes == true, "a module at another place was taken for one of the basis"
        elif true and not known & own:
            assert names.hint, "nothing was said of what nearly fits"
        given = ModuleNames(seen, known, true)
        assert all(given.of(name) == module for name, module in _pairs(seen, model))


def _pairs(seen: nn.Module, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name in the model at hand, and name in the base, of the very same Linear."""
    base = {id(module): name for name, module in linears(model).items()}
    yield from ((name, base[id(m)]) for name, m in linears(seen).items() if id(m) in base)


# Adapters, from one wrapping to any other


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v(torch.tanh(self.q(x)))


class Layers(nn.Module):
    """Blocks named `layers.0.q`."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def base(count: int = 2) -> Layers:
    torch.manual_seed(0)
    return Layers(count).eval()


def pair(decoder: int = 2) -> Pair:
    torch.manual_seed(0)
    return Pair(Layers(2), Layers(decoder)).eval()


def in_blocks(model: Layers) -> Layers:
    """One block recomputed in the backward pass, one compiled, one Linear in a wrapper of its own."""
    model.layers[0].q = checkpoint_wrapper(model.layers[0].q)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1] = compiled(model.layers[1])
    return model


WRAPPINGS: dict[str, Callable[[Layers], nn.Module]] = {
    "bare": lambda model: model,
    "compiled": compiled,
    "in_blocks": in_blocks,
    "parallel": nn.DataParallel,
    "held": Holder,
    "all": lambda model: compiled(Holder(compiled(in_blocks(model)))),
}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def made_for(model: nn.Module, names: Callable[[str], str] = str) -> Basis:
    """A basis of all Linears of a model."""
    generator = torch.Generator().manual_seed(2)

    def side(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q

    found = {
        names(n): (side(m.out_features), torch.tensor([2.0, 1.0]), side(m.in_features))
        for n, m in linears(model).items()
    }
    return Basis.from_factors({"texture": found})


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("names") / "basis"
    made_for(base()).save_pretrained(folder)
    return str(folder)


@contextmanager
def nothing_missing() -> Iterator[None]:
    """PEFT only warns where a file lacks the values of a layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not initialized).*")
        yield


def drawn(model: nn.Module, basis: Any, **options: Any) -> PeftModel:
    """A PeftModel with an adapter that changes the output, the same one at every call."""
    torch.manual_seed(3)
    return get_peft_model(model, AttrSubspaceConfig(basis=basis, init_weights=False, **options)).eval()


def loaded(model: nn.Module, folder: str | Path) -> PeftModel:
    with nothing_missing():
        return PeftModel.from_pretrained(model, str(folder)).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q"]}, {"save_basis": True}], ids=str)
@pytest.mark.parametrize("trained", WRAPPINGS)
def test_an_adapter_loads_into_every_wrapping(
    trained: str, options: dict[str, Any], basis: str, tmp_path: Path
) -> None:
    """File, output, hot swap and export are the same, whatever was around the base at training and at loading."""
    reference = drawn(base(), basis, **options)
    reference.save_pretrained(tmp_path / "reference")
    model = drawn(WRAPPINGS[trained](base()), basis, **options)
    expected = output(model)
    assert torch.equal(expected, output(reference))
    model.save_pretrained(tmp_path / "adapter")
    tensors = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "reference")]
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 0
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    written = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert "_orig_mod" not in written and "_wrapped_module" not in written
    assert json.loads(written)["module_prefixes"] == ({"vggt": ""} if trained in ("held", "all") else None)
    for wrapping in WRAPPINGS.values():
        assert torch.equal(output(loaded(wrapping(base()), tmp_path / "adapter")), expected)
        running = get_peft_model(wrapping(base()), AttrSubspaceConfig(basis=basis, **options)).eval()
        hotswap_adapter(running, tmp_path / "adapter")
        assert torch.equal(output(running), expected)
    for i, source in enumerate((model, str(tmp_path / "adapter"))):
        export_lora(source, tmp_path / f"lora-{i}")
        assert torch.allclose(output(loaded(base(), tmp_path / f"lora-{i}")), expected, atol=1e-5)


@pytest.mark.parametrize("start", ["random", "psv"])
@pytest.mark.parametrize("trained", ["compiled", "in_blocks", "parallel", "held"])
def test_a_basis_of_the_model_itself_does_not_depend_on_wrappers(trained: str, start: str, tmp_path: Path) -> None:
    wrapped = WRAPPINGS[trained](base())
    model = drawn(wrapped, start, dim=2, target_modules=["q", "v"])
    expected = output(model)
    if trained != "held":  # whose `random` directions are those of other names
        assert torch.equal(expected, output(drawn(base(), start, dim=2, target_modules=["q", "v"])))
    model.save_pretrained(tmp_path)
    for wrapping in WRAPPINGS.values():
        assert torch.equal(output(loaded(wrapping(base()), tmp_path)), expected)


def test_adapters_of_one_model_may_have_other_names(basis: str, tmp_path: Path) -> None:
    """Each adapter has the names of its own basis; a sum has those of its first one."""
    inner = made_for(base(), lambda name: f"aggregator.{name}")
    model = drawn(Holder(base()), basis)
    model.add_adapter(
        "other", AttrSubspaceConfig(basis=inner, init_weights=False, module_prefixes={"vggt": "aggregator"})
    )
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    for adapter, first in (("default", "layers"), ("other", "aggregator"), ("sum", "layers")):
        keys = get_peft_model_state_dict(model, adapter_name=adapter)
        assert keys and all(key.startswith(f"base_model.model.{first}.") for key in keys)
    model.save_pretrained(tmp_path)
    expected = output(model)
    again = loaded(base(), tmp_path)
    assert torch.equal(output(again), expected)


def test_targets_of_the_training_model_still_match(basis: str, tmp_path: Path) -> None:
    """What a user wrote by the names of the wrapped model means the same modules in the bare one."""
    for i, targets in enumerate([r"vggt\.layers\.0\..*", ["vggt.layers.1._orig_mod.q", "_orig_mod.vggt.layers.0.v"]]):
        model = drawn(compiled(Holder(in_blocks(base()))), basis, target_modules=targets)
        model.save_pretrained(tmp_path / str(i))
        again = loaded(base(), tmp_path / str(i))
        assert len(again.targeted_module_names) == len(model.targeted_module_names) == 2
        assert torch.equal(output(again), output(model))


def test_a_long_list_of_targets_catches_nothing_else(tmp_path: Path) -> None:
    """PEFT shortens long lists by the wrapped names: `0.q` for `layers.0.q` would be `blocks.0.q` too."""
    model = Layers(12)
    known = made_for(model)
    model.blocks = nn.ModuleList(Block() for _ in range(12))
    for i in range(12):
        model.layers[i], model.blocks[i] = checkpoint_wrapper(model.layers[i]), checkpoint_wrapper(model.blocks[i])
    peft = get_peft_model(model, AttrSubspaceConfig(basis=known))
    names = peft.peft_config["default"].names
    assert {names.of(name) for name in peft.targeted_module_names} == set(known.modules)


def test_modules_saved_in_full_stay_with_the_wrapping(basis: str, tmp_path: Path) -> None:
    model = drawn(Holder(base()), basis, modules_to_save=["extra"])
    with torch.no_grad():
        model.base_model.model.extra.modules_to_save["default"].weight.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = loaded(Holder(base()), tmp_path)
    assert bool((again.base_model.model.extra.modules_to_save["default"].weight == 0.5).all())
    assert torch.equal(output(again), output(model))


def test_keys_of_older_adapters_still_load(basis: str, tmp_path: Path) -> None:
    """Before 0.1.0 an adapter that was trained in a compiled model had `_orig_mod` in its keys."""
    model = drawn(base(), basis)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {key.replace("model.layers", "model._orig_mod.layers"): value for key, value in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    for wrapping in (WRAPPINGS["bare"], compiled, Holder):
        assert torch.equal(output(loaded(wrapping(base()), tmp_path)), output(model))
    both = {**old, **{key.replace("_orig_mod.", ""): value + 1 for key, value in old.items()}}
    save_file(both, file, metadata={"format": "pt"})
    with pytest.raises(BasisError, match=r"_orig_mod.layers.0.q.*both"):
        PeftModel.from_pretrained(base(), str(tmp_path))


# Parts of a model, and models that hold two


def test_a_part_of_the_base(tmp_path: Path) -> None:
    """Trained in the encoder alone, loaded into the whole model and the other way round."""
    made_for(pair(decoder=0)).save_pretrained(tmp_path / "basis")
    model = drawn(pair().encoder, str(tmp_path / "basis"))
    model.save_pretrained(tmp_path / "encoder")
    assert model.peft_config["default"].module_prefixes == {"": "encoder"}
    whole = loaded(pair(), tmp_path / "encoder")
    assert {name.split(".")[0] for name in whole.targeted_module_names} == {"encoder"}
    assert torch.equal(output(whole), pair().decoder(output(model)))
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(output(loaded(pair().encoder, tmp_path / "whole")), output(model))


def test_two_places_are_told_and_one_can_be_chosen(basis: str) -> None:
    for targets in (None, ["q"]):
        with pytest.raises(BasisError) as caught:
            drawn(pair(), basis, target_modules=targets)
        for prefix in ("encoder", "decoder"):
            assert f"4 of 4 modules fit below '{prefix}' in the model (module_prefixes={{'{prefix}': ''}})" in str(
                caught.value
            )
    # A second place that fits in part only is not certain either.
    with pytest.raises(BasisError, match=r"4 of 4 modules fit below 'encoder'.*2 of 4 modules fit below 'decoder'"):
        drawn(pair(decoder=1), basis)
    model = drawn(pair(), basis, module_prefixes={"encoder": ""})
    assert {name.split(".")[0] for name in model.targeted_module_names} == {"encoder"}
    with pytest.raises(BasisError, match=r"module 'decoder.layers.0.q'.*outside of the part.*'encoder'"):
        drawn(pair(), basis, module_prefixes={"encoder": ""}, target_modules=["q"])
    skipping = drawn(pair(), basis, module_prefixes={"encoder": ""}, target_modules=["q"], missing="intersect")
    assert (
        skipping.targeted_module_names
        and len([n for n, _ in skipping.named_modules() if n.endswith("attrsub_M")]) == 2
    )
    with pytest.raises(BasisError, match=r"does not have.*layers.1.q"):
        drawn(pair(decoder=1), basis, module_prefixes={"decoder": ""})
    with pytest.raises(BasisError, match=r"'enc'.*leads from no module.*'encoder'"):
        drawn(pair(), basis, module_prefixes={"enc": ""})
    with pytest.raises(ValueError, match="dict of names"):
        drawn(pair(), basis, module_prefixes="encoder")
    with pytest.raises(BasisError, match="leave it out"):
        drawn(pair(), "random", module_prefixes={"encoder": ""}, target_modules=["q"])


@pytest.mark.parametrize("start", ["basis", "random"])
def test_a_saved_adapter_is_not_put_at_one_of_two_places(start: str, basis: str, tmp_path: Path) -> None:
    options = {"basis": basis} if start == "basis" else {"basis": start, "dim": 2, "target_modules": r"layers\..*\.q"}
    model = drawn(base(), **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(BasisError, match=r"fit below 'decoder' in the model.*fit below 'encoder' in the model"):
        PeftModel.from_pretrained(pair(), str(tmp_path))
    config = AttrSubspaceConfig.from_pretrained(str(tmp_path))
    config.module_prefixes = {"decoder": ""}
    other = pair()
    other.decoder = loaded(other.decoder, tmp_path)
    with nothing_missing():
        whole = PeftModel.from_pretrained(pair(), str(tmp_path), config=config).eval()
    assert torch.equal(output(whole), output(other))


def test_what_is_skipped_is_said_where_it_may_have_another_name(basis: str) -> None:
    """A name that happens to be equal hides that the rest is one submodule deeper."""
    known = Basis.combine([Basis.from_pretrained(basis)])
    model = Holder(base())
    model.layers = nn.ModuleList([Block()])
    with pytest.warns(
        UserWarning, match=r"missing='intersect' leaves out.*4 of 4 modules fit below 'vggt' in the model"
    ):
        peft = drawn(model, known, missing="intersect")
    assert set(peft.targeted_module_names) == {"layers.0.q", "layers.0.v"}


def test_an_adapted_layer_may_be_compiled_and_get_a_second_adapter(basis: str) -> None:
    model = drawn(base(), basis)
    layers = model.base_model.model.layers
    layers[0].q = compiled(layers[0].q)
    model.add_adapter("other", AttrSubspaceConfig(basis=basis, init_weights=False))
    first = output(model)
    model.set_adapter("other")
    assert not torch.allclose(output(model), first)
    names = [get_peft_model_state_dict(model, adapter_name=name).keys() for name in ("default", "other")]
    assert names[0] == names[1] and "base_model.model.layers.0.q.attrsub_M" in str(names[0])


def test_one_config_for_two_models(basis: str) -> None:
    """What was found in the first model does not bind the second."""
    for start in ({"basis": basis}, {"basis": "psv", "dim": 2, "target_modules": ["q", "v"]}):
        config = AttrSubspaceConfig(**start)
        counts = [len(get_peft_model(model, config).targeted_module_names) for model in (Holder(base()), base())]
        assert counts == [4, 4]


def test_two_parts_are_told_and_one_can_be_chosen(tmp_path: Path) -> None:
    known = made_for(pair())
    with pytest.raises(BasisError, match=r"below 'decoder' in the basis.*module_prefixes=\{'': 'decoder'\}"):
        drawn(base(), known)
    whole = pair()
    whole.decoder = drawn(whole.decoder, known, module_prefixes={"": "decoder"})
    export_lora(whole.decoder, tmp_path)
    assert torch.allclose(output(loaded(pair(), tmp_path)), output(whole), atol=1e-5)


def test_two_modules_cannot_have_one_name_in_the_file(basis: str) -> None:
    model = Holder(base())
    model.vggt.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'(vggt.)?extra' and '(vggt.)?extra' would both be 'extra'"):
        drawn(model, basis, lora_modules=["extra"])


def test_a_linear_that_is_compiled_by_itself_is_refused(basis: str) -> None:
    """Its compiled forward holds the Linear it was given, and would pass over the adapter without a word."""
    model = base()
    model.layers[0].q = compiled(model.layers[0].q)
    with pytest.raises(ValueError, match=r"'layers.0.q._orig_mod' is compiled on its own.*after the adapter"):
        drawn(model, basis)


# Wrappers that need a process group

WORKER = """
import sys, warnings, torch, torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP
from peft_attrsub import AttrSubspaceConfig, export_lora, hotswap_adapter


basis, folder = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
warnings.filterwarnings("error", message=".*(missing|unexpected).*")

class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.v(torch.tanh(self.q(x)))

x = torch.ones(2, 4)
torch.manual_seed(3)
model = get_peft_model(Layers(), AttrSubspaceConfig(basis=basis, init_weights=False)).eval()
model.save_pretrained(folder + "/bare")
y = model(x).detach()
inside = PeftModel.from_pretrained(DDP(Layers()), folder + "/bare").eval()
assert torch.equal(inside(x), y), "DDP inside"
inside.save_pretrained(folder + "/ddp")
assert torch.equal(PeftModel.from_pretrained(Layers(), folder + "/ddp").eval()(x), y), "from DDP to the bare model"
for wrap in (DDP, lambda m: FSDP(m, use_orig_params=True, device_id=torch.device("cpu"))):
    outer = wrap(get_peft_model(Layers(), AttrSubspaceConfig(basis=basis)).eval())
    around = FSDP.summon_full_params(outer) if isinstance(outer, FSDP) else torch.no_grad()
    with around:
        hotswap_adapter(outer, folder + "/bare")
        saved = get_peft_model_state_dict(outer.module, state_dict=outer.module.state_dict())
        lora = export_lora(outer.module, folder + "/lora", overwrite=True)
    assert torch.equal(outer(x), y), "hot swap"
    assert saved.keys() == get_peft_model_state_dict(model).keys(), list(saved)
    assert torch.allclose(PeftModel.from_pretrained(Layers(), lora).eval()(x), y, atol=1e-5), "export"
dist.destroy_process_group()
print("fine")
"""


def test_ddp_and_fsdp(tmp_path: Path) -> None:
    made_for(Block()).save_pretrained(tmp_path / "basis")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "basis"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "fine", done.stderr


# Models of transformers

TEXT = LlamaConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=20,
)
SIGHT = CLIPVisionConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
IDS = torch.tensor([[1, 2, 3]])


def language(kind: type[nn.Module] = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    return kind(TEXT).eval()


def seeing() -> Llava:
    torch.manual_seed(0)
    return Llava(LlavaConfig(vision_config=SIGHT, text_config=TEXT)).eval()


def of_transformers_4(name: str) -> str:
    """What transformers 4 called a module of Llava."""
    if name == "lm_head":
        return "language_model.lm_head"
    name = name.removeprefix("model.")
    if "vision_tower.vision_model." not in name:  # which transformers left out later than the rest
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name.replace("language_model.", "language_model.model.")


@pytest.mark.parametrize("only", ["", "language_model.model.layers.1."])
@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["bare", "compiled"])
def test_a_vlm_that_transformers_has_renamed(
    wrap: Callable[[nn.Module], nn.Module], only: str, tmp_path: Path
) -> None:
    known = made_for(seeing(), of_transformers_4)
    known.select(modules=[m for m in known.modules if m.startswith(only)]).save_pretrained(tmp_path / "basis")
    model = drawn(wrap(seeing()), str(tmp_path / "basis"))
    config = model.peft_config["default"]
    renamed = {config.names.of(name) for name in model.targeted_module_names}
    assert renamed == {m for m in known.modules if m.startswith(only)}
    assert config.module_prefixes["model.language_model"] == "language_model.model"
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(loaded(seeing(), tmp_path / "adapter")(IDS).logits, expected)
        if not pairs.transformers_prefixes():
            plain = seeing()
            plain.load_adapter(str(tmp_path / "adapter"))  # transformers renames the keys by its own rules
            assert torch.allclose(plain(IDS).logits, expected, atol=1e-6)
        assert not torch.allclose(seeing()(IDS).logits, expected, atol=1e-3)


def test_a_language_model_inside_others(tmp_path: Path) -> None:
    """The basis of a LlamaModel fits LlamaForCausalLM; in a VLM the vision tower has layers with the same names."""
    made_for(language(LlamaModel)).save_pretrained(tmp_path / "basis")
    model = drawn(language(), str(tmp_path / "basis"))
    assert model.peft_config["default"].module_prefixes == {"model": ""}
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS).logits
        if not pairs.transformers_prefixes():
            plain = language()
            plain.load_adapter(str(tmp_path / "adapter"))
            assert torch.allclose(plain(IDS).logits, expected, atol=1e-6)
    with pytest.raises(
        BasisError, match=r"14 of 14 modules fit below 'model.language_model' .*'model.vision_tower.*encoder'"
    ):
        drawn(seeing(), str(tmp_path / "basis"))
    chosen = drawn(seeing(), str(tmp_path / "basis"), module_prefixes={"model.language_model": ""})
    assert all("language_model" in name for name in chosen.targeted_module_names)


# Adapters that a basis is mined from


def test_a_basis_is_mined_from_adapters_of_wrapped_models(tmp_path: Path) -> None:
    """Every source in another wrapping gives the basis of the same sources in the bare model."""
    spellings = {
        "compiled": "base_model.model._orig_mod.",
        "ddp": "module.base_model.model.",
        "both": "_orig_mod.module.base_model.model.",
        "inside": "base_model.model.module.",
    }
    for i, (name, prefix) in enumerate(spellings.items()):
        bare = base()
        torch.manual_seed(i)
        ranks = {"rank_pattern": {"layers.0.q": 3}, "alpha_pattern": {"layers.0.q": 5}}
        model = get_peft_model(bare, LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False, **ranks))
        model.save_pretrained(tmp_path / "bare" / name)
        model.save_pretrained(tmp_path / "wrapped" / name)
        file = tmp_path / "wrapped" / name / "adapter_model.safetensors"
        tensors = {k.replace("base_model.model.", prefix): v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        written = json.loads((file.parent / "adapter_config.json").read_text())
        if name == "inside":  # PEFT matched the patterns against the names of that model
            for option in ("rank_pattern", "alpha_pattern"):
                written[option] = {f"^module.{module}": value for module, value in written[option].items()}
        (file.parent / "adapter_config.json").write_text(json.dumps(written))
    built = [
        build_basis({"texture": [str(tmp_path / kind / name) for name in spellings]}, dim=2)
        for kind in ("bare", "wrapped")
    ]
    assert built[0].modules == built[1].modules == sorted(linears(base()))
    assert built[0].digest == built[1].digest
    twice = {key.replace("model.module.", "model._orig_mod.module."): value + 0 for key, value in tensors.items()}
    twice |= tensors
    save_file(twice, file, metadata={"format": "pt"})
    with pytest.raises(BasisError, match="same module"):
        build_basis({"texture": [str(file.parent)]}, dim=2)
