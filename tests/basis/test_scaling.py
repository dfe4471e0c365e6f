"""The update that is mined must be the update stock PEFT applies, whatever the LoRA variant."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_attrsub import build_basis

from .helpers import ZOO, low_rank, stock_deltas, train_zoo

VARIANTS = {
    "plain": {},
    "alpha": {"lora_alpha": 13},
    "alpha_below_one": {"lora_alpha": 0.5},
    "rslora": {"lora_alpha": 7, "use_rslora": True},
    "rank_pattern": {"lora_alpha": 6, "rank_pattern": {"fc": 2, "conv2": 6}},
    "alpha_pattern": {"lora_alpha": 6, "alpha_pattern": {"fc": 31, "embed": 2}},
    "both_patterns_rslora": {
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"gpt": 3, "conv1": 5},
        "alpha_pattern": {"gpt": 9, "conv3": 1},
    },
    "anchored_pattern": {"lora_alpha": 6, "rank_pattern": {"^fc": 2}, "alpha_pattern": {"^conv[12]$": 40}},
    "pattern_that_only_ends_alike": {"lora_alpha": 6, "alpha_pattern": {"c": 40, "conv": 50}},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_adapter_is_reproduced_exactly(tmp_path, variant):
    """With one adapter and d >= rank, U S V^T is that adapter's get_delta_weight in every layer type."""
    expected = train_zoo(tmp_path / "a", **VARIANTS[variant])
    basis = build_basis([str(tmp_path / "a")], dim=8, progress=False)
    assert sorted(basis.modules) == sorted(ZOO)
    for module, delta in expected.items():
        assert delta.norm() > 1e-3, "the test would be empty"
        torch.testing.assert_close(low_rank(basis, module, "shared"), delta.double(), rtol=1e-5, atol=1e-5)


def test_adapters_of_different_rank_alpha_and_rslora_are_averaged_as_updates(tmp_path):
    variants = [
        {"r": 2, "lora_alpha": 5},
        {"r": 6, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"fc": 1, "conv2": 7}, "alpha_pattern": {"fc": 9}},
    ]
    saved = [train_zoo(tmp_path / str(i), seed=i, **v) for i, v in enumerate(variants)]
    basis = build_basis([str(tmp_path / str(i)) for i in range(3)], dim=16, alpha=2.0, progress=False)
    for module in ZOO:  # alpha = 2 is the plain mean; its rank is at most 12 here, so d = 16 loses nothing
        mean = sum(s[module].double() for s in saved) / 3
        torch.testing.assert_close(low_rank(basis, module, "shared"), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_read_at_their_stored_values(tmp_path, dtype):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 10)).to(dtype)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.save_pretrained(str(tmp_path / "a"))
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == dtype
    B, A = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    basis = build_basis([str(tmp_path / "a")], dim=3, progress=False)
    torch.testing.assert_close(low_rank(basis, "0", "shared"), B @ A * 7 / 3, rtol=1e-5, atol=1e-5)


def test_a_safetensors_file_and_its_folder_are_the_same_adapter(tmp_path):
    train_zoo(tmp_path / "a", lora_alpha=9)
    from_folder = build_basis([str(tmp_path / "a")], dim=4, progress=False)
    from_file = build_basis([str(tmp_path / "a" / "adapter_model.safetensors")], dim=4, progress=False)
    for module in ZOO:
        torch.testing.assert_close(low_rank(from_file, module, "shared"), low_rank(from_folder, module, "shared"))


def test_a_path_object_is_accepted(tmp_path):
    train_zoo(tmp_path / "a", targets=["fc"])
    assert build_basis([tmp_path / "a"], dim=4, progress=False).modules == ["fc"]


def test_only_the_saved_adapter_counts_not_its_base_weights(tmp_path):
    """PEFT also stores the full embedding when `embed_tokens` is targeted; that is not part of the update."""

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(30, 12)
            self.fc = torch.nn.Linear(12, 8)
            self.head = torch.nn.Linear(8, 3)

        def get_input_embeddings(self):
            return self.embed_tokens

        def get_output_embeddings(self):
            return None

    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["embed_tokens", "fc"], modules_to_save=["head"], init_lora_weights=False)
    model = get_peft_model(Text(), config)
    model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    basis = build_basis([str(tmp_path / "a")], dim=3, progress=False)
    assert sorted(basis.modules) == ["embed_tokens", "fc"], "modules_to_save must not become basis modules"
    for module, delta in stock_deltas(model).items():
        torch.testing.assert_close(low_rank(basis, module, "shared"), delta.double(), rtol=1e-5, atol=1e-5)


def test_adapters_saved_under_another_name(tmp_path):
    """PEFT saves a named adapter into a subfolder, without the name in its keys."""
    adapter_name = "style"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(9, 7))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), adapter_name)
    model.save_pretrained(str(tmp_path / "a"))
    basis = build_basis([str(tmp_path / "a" / adapter_name)], dim=2, progress=False)
    expected = stock_deltas(model, adapter_name)["0"].double()
    torch.testing.assert_close(low_rank(basis, "0", "shared"), expected, rtol=1e-5, atol=1e-5)
