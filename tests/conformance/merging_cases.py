"""The common cases of merging, unloading, deleting, disabling and combining adapters, by PEFT's names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import (
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..tuner.checks import has_tuner_layers, same
from .cases import adapter_parameters, clones, equal_states, saved_parameters
from .oracle import Judged, ours_alone
from .subjects import WAYS, Subject


def no_trace(model: nn.Module, adapter: str) -> None:
    """No module, parameter, buffer or wrapper knows the adapter any more."""
    for names in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        assert not [name for name, _ in names if adapter in name.split(".")]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for attribute in (*module.adapter_layer_names, *module.other_param_names):
                assert adapter not in getattr(module, attribute), attribute
        if isinstance(module, AuxiliaryTrainingWrapper):
            assert adapter not in module._adapters and adapter not in module.active_adapters


class Merging(Judged):
    """Merging, unmerging, unloading, deleting, disabling."""

    def test_merge_layers(self, subject: Subject, tmp_path: Path) -> None:
        base, model = subject.base(), subject.peft()
        before, adapted = subject.output(base), subject.output(model)
        assert not same(adapted, before, 1e-3)
        model.merge_adapter()
        assert same(subject.output(model), adapted, 1e-4)
        model.unmerge_adapter()
        assert same(subject.output(model), adapted, 1e-4)
        merged = model.merge_and_unload()
        assert same(subject.output(merged), adapted, 1e-4) and not has_tuner_layers(merged)
        assert type(merged) is type(base) and merged.state_dict().keys() == base.state_dict().keys()
        merged.save_pretrained(tmp_path)
        assert same(subject.output(type(base).from_pretrained(tmp_path).eval()), adapted, 1e-4)

    def test_merge_layers_multi(self, subject: Subject) -> None:
        def outputs() -> dict[str, Tensor]:
            model = subject.pair()
            found = {}
            for name in ("default", "other"):
                model.set_adapter(name)
                found[name] = subject.output(model)
            return found

        alone = outputs()
        assert not same(alone["default"], alone["other"], 1e-3)
        for names in (["default"], ["other"]):
            merged = subject.pair().merge_and_unload(adapter_names=names)
            assert same(subject.output(merged), alone[names[0]], 1e-4)
        if not saved_parameters(subject.peft()):  # two copies of one head cannot both be it
            together = subject.output(subject.pair().merge_and_unload(adapter_names=["default", "other"]))
            assert not any(same(together, output, 1e-3) for output in alone.values())

    def test_merge_layers_nan(self, subject: Subject) -> None:
        value = math.inf if "blocks" in subject.way else math.nan
        model = subject.peft()
        weights = clones(get_base_model_state_dict(model))
        with torch.no_grad():
            list(adapter_parameters(model).values())[-1].view(-1)[0] = value
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default"):
            model.merge_adapter(safe_merge=True)
        # Layers before the broken one were merged: taking them out again gives the base back.
        model.unmerge_adapter()
        assert all(same(w, weights[n], 1e-4) for n, w in get_base_model_state_dict(model).items())
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default"):
            model.merge_and_unload(safe_merge=True)

    def test_merge_layers_is_idempotent(self, subject: Subject) -> None:
        model = subject.peft()
        model.merge_adapter()
        once = subject.output(model)
        with pytest.warns(UserWarning, match="[Aa]lready"):
            model.merge_adapter()
        assert same(subject.output(model), once, 1e-6)
        assert same(subject.output(model.merge_and_unload()), once, 1e-6)

    def test_merge_layers_fp16(self, subject: Subject) -> None:
        model = subject.peft(dtype=torch.float16).to(torch.float16)
        adapted = subject.output(model)
        merged = model.merge_and_unload()
        assert all(p.dtype == torch.float16 for p in merged.parameters())
        assert (subject.output(merged) - adapted).abs().mean() < 0.1 * adapted.abs().mean()

    def test_safe_merge(self, subject: Subject) -> None:
        model = subject.peft()
        adapted = subject.output(model)
        assert same(subject.output(model.merge_and_unload(safe_merge=True)), adapted, 1e-4)

    def test_unload_adapter(self, subject: Subject) -> None:
        base, model = subject.base(), subject.peft()
        assert not same(subject.output(model), subject.output(base), 1e-3)
        unloaded = model.unload()
        assert not has_tuner_layers(unloaded) and not hasattr(unloaded, "peft_config")
        assert equal_states(unloaded.state_dict(), base.state_dict())
        assert same(subject.output(unloaded), subject.output(base), 1e-6)

    @pytest.mark.parametrize("was_active", [True, False], ids=["active", "inactive"])
    def test_delete_adapter(self, subject: Subject, was_active: bool) -> None:
        alone = subject.output(subject.peft())
        model = subject.pair(two="delete_me")
        if was_active:
            model.set_adapter("delete_me")
        model.delete_adapter("delete_me")
        no_trace(model, "delete_me")
        assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
        assert same(subject.output(model), alone, 1e-6)
        model.delete_adapter("default")
        no_trace(model, "default")
        assert not model.peft_config and model.active_adapters == []
        # A PeftModel needs an adapter to be called; what is under it does not.
        assert same(subject.output(model.base_model), subject.output(subject.base()), 1e-6)

    def test_delete_unknown_adapter_raises(self, subject: Subject) -> None:
        model = subject.peft()
        with pytest.raises(ValueError, match="unknown-adapter does not exist"):
            model.delete_adapter("unknown-adapter")
        assert same(subject.output(model), subject.output(subject.peft()), 1e-6)

    def test_disable_adapter(self, subject: Subject) -> None:
        before, model = subject.output(subject.base()), subject.peft()
        adapted = subject.output(model)
        assert not same(adapted, before, 1e-3)
        with model.disable_adapter():
            assert same(subject.output(model), before, 1e-6)
        assert same(subject.output(model), adapted, 1e-6)
        model.merge_adapter()
        with model.disable_adapter():
            assert same(subject.output(model), before, 1e-4)

    @ours_alone
    def test_weighted_combination_of_adapters(self, subject: Subject) -> None:
        # Half of the ways put the factors side by side, half add the cores: the sum is the same.
        side_by_side = list(WAYS).index(subject.way) % 2
        combination, weights = ("cat", [-0.5, -1.2]) if side_by_side else ("linear", [0.5, 1.5])
        if saved_parameters(subject.peft()):
            with pytest.raises(ValueError, match="modules_to_save"):
                subject.pair().add_weighted_adapter(["default", "other"], weights, "sum", combination_type=combination)
            return
        model = subject.pair()
        model.add_weighted_adapter(["default", "other"], weights, "sum", combination_type=combination)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                one, two, total = (module.get_delta_weight(name) for name in ("default", "other", "sum"))
                assert same(total, weights[0] * one + weights[1] * two)
        model.set_adapter("sum")
        assert not same(subject.output(model), subject.output(subject.base()), 1e-3)
        for unknown in ("svd", "ties", "dare_linear", "magnitude_prune"):
            with pytest.raises(ValueError, match="linear"):
                model.add_weighted_adapter(["default", "other"], weights, "no", combination_type=unknown)
        assert "no" not in model.peft_config

    def test_mixed_adapter_batches(self, subject: Subject) -> None:
        model = subject.pair("adapter0", "adapter1")
        alone = {}
        with model.disable_adapter():
            alone["__base__"] = subject.output(model)
        for name in ("adapter0", "adapter1"):
            model.set_adapter(name)
            alone[name] = subject.output(model)
        for names in (["__base__", "adapter1"], ["adapter1", "adapter0"], ["adapter0", "__base__"]):
            mixed = subject.output(model, adapter_names=names)
            for i, name in enumerate(names):
                assert same(mixed[i], alone[name][i], 1e-4)
                assert not any(same(mixed[i], alone[n][i], 1e-3) for n in alone if n != name)


class Converting(Judged):
    """PEFT's conversion of any adapter to LoRA, exact for a core: its update has at most the core's rank."""

    @ours_alone
    def test_lora_conversion(self, subject: Subject) -> None:
        model = subject.peft()
        assert model.supports_lora_conversion()
        config, state = convert_to_lora(model, rank=4)
        lora = get_peft_model(subject.base(), config).eval()
        assert not set_peft_model_state_dict(lora, state).unexpected_keys
        assert same(subject.output(lora), subject.output(model), 1e-3)
