"""vggt/precision.py: which precision each kind of device gets, spellings, and the warning about emulation."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_attrsub.vggt import choose_precision, precision
from peft_attrsub.vggt.precision import parse_dtype, parse_precision, slowdown

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
FLAGS = ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16", "bf16", "sve_bf16")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever caps this machine's own tests run under; and no measurement leaks into another test."""
    for variable in CAPS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "a GPU") -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    # What torch says of every one of them, emulation included.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def cpu(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """A CPU of which torch reports these flags, by the function of newer versions."""
    told = dict.fromkeys(FLAGS, False) | dict.fromkeys(flags, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)


def old_cpu(monkeypatch: pytest.MonkeyPatch, machine: str, **answers: bool) -> None:
    """A CPU asked by torch 2.6; functions that are not among the answers are missing."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in names:
        if name in answers:
            monkeypatch.setattr(torch.cpu, name, lambda found=answers[name]: found, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)

    class Ops:
        class mkldnn:
            pass

    if "arm" in answers:
        Ops.mkldnn._is_mkldnn_bf16_supported = staticmethod(lambda: answers["arm"])  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "ops", Ops)


@pytest.mark.parametrize(
    ("capability", "name", "expected"),
    [
        ((5, 2), "GeForce GTX 980", "fp32"),
        ((6, 1), "GeForce GTX 1080", "fp32"),
        ((7, 0), "Tesla V100", "fp16"),
        ((7, 5), "Tesla T4", "fp16"),
        ((7, 5), "NVIDIA GeForce GTX 1660", "fp32"),
        ((8, 0), "A100", "bf16"),
        ((8, 9), "L4", "bf16"),
        ((9, 0), "H100", "bf16"),
        ((12, 0), "RTX 5090", "bf16"),
    ],
)
def test_cuda_is_asked_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str, expected: str
) -> None:
    gpu(monkeypatch, capability, name)
    for training in (True, False):
        found = choose_precision("cuda:1", training=training)
        assert (found.name, found.scaled) == (expected, training and expected == "fp16")
        assert f"{capability[0]}.{capability[1]}" in found.why


@pytest.mark.parametrize("native", [True, False])
def test_rocm_as_torch_says_without_emulation(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert choose_precision("cuda").name == ("bf16" if native else "fp32")
    # A torch that cannot leave emulation out.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision("cuda").name == "fp32"


def test_every_set_of_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in itertools.product([False, True], repeat=len(FLAGS)):
        has = [name for name, on in zip(FLAGS, flags, strict=True) if on]
        cpu(monkeypatch, *has)
        native = bool({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"} & set(has))
        assert choose_precision("cpu").name == ("bf16" if native else "fp32"), has
        monkeypatch.setattr(sys, "platform", "darwin")
        native = bool({"avx512_bf16", "amx_bf16"} & set(has))
        assert choose_precision("cpu").name == ("bf16" if native else "fp32"), has
        monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.parametrize(
    ("machine", "answers", "expected"),
    [
        ("x86_64", {"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": False}, "bf16"),
        ("AMD64", {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, "bf16"),
        # On x86 the last question is answered with yes wherever there is AVX-512.
        ("x86_64", {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False, "arm": True}, "fp32"),
        ("x86_64", {}, "fp32"),
        ("aarch64", {"arm": True}, "bf16"),
        ("aarch64", {"arm": False}, "fp32"),
        ("arm64", {}, "fp32"),
    ],
)
def test_older_torch_and_missing_private_functions(
    monkeypatch: pytest.MonkeyPatch, machine: str, answers: dict[str, bool], expected: str
) -> None:
    old_cpu(monkeypatch, machine, **answers)
    assert choose_precision("cpu").name == expected


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "fp32"),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", "fp32"),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_VNNI", "fp32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "bf16"),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", "bf16"),
        ("ATEN_CPU_CAPABILITY", "avx2", "fp32"),
        ("ATEN_CPU_CAPABILITY", "default", "fp32"),
        ("ATEN_CPU_CAPABILITY", "avx512", "bf16"),
    ],
)
def test_a_cap_in_the_environment_is_respected(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    cpu(monkeypatch, "avx512_bf16")
    monkeypatch.setenv(variable, value)
    found = choose_precision("cpu")
    assert found.name == expected and (expected == "bf16" or f"{variable}={value}" in found.why)


def test_without_onednn_a_cpu_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_precision("cpu").name == "fp32"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_get_float32(device: str) -> None:
    assert choose_precision(device).name == "fp32"
    assert choose_precision(device, None).name == "fp32"


@pytest.mark.parametrize("training", [True, False])
def test_fp16_on_mps(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Autocast has it, but there is no gradient scaler."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)
    monkeypatch.setattr(precision, "slowdown", lambda device, name: 0.5)
    if training:
        with pytest.raises(ValueError, match="fp16 training needs a gradient scaler, which torch lacks on mps"):
            choose_precision("mps", "fp16")
    else:
        assert choose_precision("mps", "fp16", training=False).name == "fp16"


def test_a_device_without_autocast_refuses_16_bits() -> None:
    with pytest.raises(ValueError, match=r"precision bf16 is not available on meta: .* use fp32"):
        choose_precision("meta", "bf16")


@pytest.mark.parametrize("requested", ["bf16", "fp16"])
def test_a_requested_precision_that_is_emulated_warns_with_the_factor(
    monkeypatch: pytest.MonkeyPatch, requested: str
) -> None:
    cpu(monkeypatch)
    for factor in (7.31, 0.8):
        monkeypatch.setattr(precision, "slowdown", lambda device, name, factor=factor: factor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = choose_precision("cpu", requested)
        assert (found.name, found.requested) == (requested, requested) and f"{factor:.1f} times" in found.why
        texts = [str(one.message) for one in caught]
        assert len(texts) == (factor > 1)
        assert all("takes 7.3 times as long as in fp32" in text for text in texts)


@pytest.mark.parametrize("requested", ["auto", "bf16", "fp32"])
def test_a_native_precision_is_not_measured(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    cpu(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(precision, "slowdown", lambda device, name: pytest.fail("measured"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_precision("cpu", requested).name == ("fp32" if requested == "fp32" else "bf16")


def test_the_measured_step_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    slowdown.cache_clear()
    with torch.no_grad():
        assert slowdown("cpu", "fp16") > 0
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before) and not torch.is_autocast_enabled("cpu")
    misses = slowdown.cache_info().misses
    slowdown("cpu", "fp16")
    assert slowdown.cache_info().misses == misses == 1


SPELLINGS: dict[str, tuple[Any, ...]] = {
    "bf16": ("bf16", "bfloat16", "BF16", torch.bfloat16, "torch.bfloat16"),
    "fp16": ("fp16", "float16", "half", torch.float16, torch.half),
    "fp32": ("fp32", "float32", "no", None, torch.float32, False),
}


def test_spellings() -> None:
    for name, values in SPELLINGS.items():
        assert {parse_precision(value) for value in values} == {name}
        dtypes = {parse_dtype(value) for value in values if value not in (None, False, "no")}
        assert dtypes == {precision.DTYPES[name]}
    assert parse_precision("Auto") == parse_dtype("auto") == "auto"
    assert parse_dtype(None) is None and parse_dtype("float64") == torch.float64
    for value in ("int8", "fp8", torch.float64, 16, "", "nn"):
        with pytest.raises(ValueError, match=r"--precision is .*: expected one of auto, bf16, fp16, fp32"):
            parse_precision(value, "--precision")
    with pytest.raises(ValueError, match="dtype is 'nn': expected a torch dtype or its name"):
        parse_dtype("nn")


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_autocast_computes_in_the_precision(name: str) -> None:
    chosen = precision.Precision(name, "a test")
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), chosen.autocast("cpu"):
        assert (x @ x).dtype == precision.DTYPES[name]
    with chosen.autocast("meta"):
        pass
    assert chosen.record() == {"precision": name, "requested": "auto", "why": "a test"}


def test_in_a_process_of_its_own_with_a_cap() -> None:
    """The real question to the real torch: nothing faked but the environment."""
    code = (
        "from peft_attrsub.vggt import choose_precision, precision\n"
        "print(choose_precision('cpu').name, precision.slowdown('cpu', 'bf16') > 0)"
    )
    root = Path(__file__).parents[2]
    environment = {"PATH": "", "PYTHONPATH": str(root), "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.split() == ["fp32", "True"]
