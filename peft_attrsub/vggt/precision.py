"""Which precision a device computes in: bf16, fp16 or fp32, chosen from what the device does natively.

A device that lacks bf16 instructions still runs bf16 autocast, but by emulation: on a CPU with AVX2 only, a training
step of vggt-mini takes eleven times as long as in float32. `choose_precision` asks the device first.

    auto on          chooses
    CUDA >= 8.0      bf16
    CUDA >= 7.0      fp16, with a gradient scaler while training (not on GTX 16xx, which have no tensor cores)
    older CUDA       fp32
    ROCm             bf16 where torch reports it without emulation, else fp32
    CPU              bf16 with AVX512-BF16, AMX-BF16 or Arm's BF16 extension, else fp32
    anything else    fp32

What a precision means: parameters stay in float32; products in the aggregator run in the 16-bit type (autocast).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

AUTO = "auto"
#: Name -> the dtype of autocast.
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# YAML reads an unquoted `no` as false.
_SPELLINGS = {
    "auto": AUTO,
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("fp32", "float32", "float", "no", "none", "false"), "fp32"),
}
#: Device types for which torch has a gradient scaler.
SCALED = ("cuda", "cpu")
# Values of ONEDNN_MAX_CPU_ISA without bf16 products.
_ISA_BELOW_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
# Levels of ATen's own kernels below AVX-512.
_ATEN_BELOW_BF16 = ("DEFAULT", "NO AVX", "AVX2")


@dataclass(frozen=True)
class Precision:
    """A chosen precision.

    name: "bf16", "fp16" or "fp32". why: one clause for people. requested: "auto", or the name that was asked for.
    training: whether it was chosen for training.
    """

    name: str
    why: str
    requested: str = AUTO
    training: bool = True

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None for fp32, where there is none."""
        return None if self.name == "fp32" else DTYPES[self.name]

    @property
    def scaled(self) -> bool:
        """Whether training needs a gradient scaler: small gradients underflow in fp16."""
        return self.training and self.name == "fp16"

    def autocast(self, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
        """Autocast in this precision; for fp32 a context in which autocast is off."""
        kind = torch.device(device).type
        if not torch.amp.is_autocast_available(kind):
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=self.dtype, enabled=self.dtype is not None)

    def record(self) -> dict[str, str]:
        """JSON values for the record of a run; `Precision.of` reads them back."""
        return {"precision": self.name, "requested": self.requested, "why": self.why}

    @classmethod
    def of(cls, record: Mapping[str, str], training: bool = True) -> Precision:
        return cls(parse_precision(record["precision"]), record["why"], record["requested"], training)

    @classmethod
    def kept(cls, path: Path, older: str | None, training: bool = True) -> Precision:
        """That of a run which continues: the record in the JSON file `path`, or the bare name `older` that a run of
        an older version stored."""
        if path.exists():
            return cls.of(json.loads(path.read_text(encoding="utf-8")), training)
        return cls(parse_precision(older), "stored with the run", "unknown", training)

    def __str__(self) -> str:
        scaler = " with a gradient scaler" if self.scaled else ""
        return f"precision {self.name}{scaler}: {self.why}"


def parse_precision(value: str | torch.dtype | None, option: str = "precision") -> str:
    """ "auto", "bf16", "fp16" or "fp32" from any usual spelling: "bfloat16", torch.bfloat16, "half", "no", None.

    Raises: ValueError for anything else; `option` names the setting in the sentence.
    """
    word = str(value).lower().removeprefix("torch.")
    if word not in _SPELLINGS:
        raise ValueError(f"{option} is {value!r}: expected one of auto, bf16, fp16, fp32.")
    return _SPELLINGS[word]


def parse_dtype(value: Any) -> Any:
    """A torch dtype for a string such as "bfloat16" or "bf16"; "auto", None and what is not a string are unchanged.

    Raises: ValueError for an unknown string.
    """
    if not isinstance(value, str) or value == AUTO:
        return value
    word = value.lower().removeprefix("torch.")
    if word in _SPELLINGS and word not in ("no", "none", "false"):
        return DTYPES[_SPELLINGS[word]]
    found = getattr(torch, word, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype is {value!r}: expected a torch dtype or its name, such as float32 or bfloat16.")
    return found


def choose_precision(
    device: torch.device | str, requested: str | torch.dtype | None = AUTO, *, training: bool = True
) -> Precision:
    """The precision to compute in on `device`.

    Args:
        device: where the model runs.
        requested: "auto" for the fastest native precision (see the table of this module), or one in any spelling that
            `parse_precision` takes. One that the device emulates is used, with a UserWarning that states how much
            slower a small step is, measured once per process.
        training: whether gradients are computed; decides whether fp16 needs a gradient scaler.

    Raises: ValueError for an unknown spelling, or for a precision that torch cannot run on the device.
    """
    device = torch.device(device)
    name = parse_precision(requested)
    if name == AUTO:
        name, why = _automatic(device)
        return Precision(name, why, AUTO, training)
    if name == "fp32":
        return Precision(name, "as requested", name, training)
    if not torch.amp.is_autocast_available(device.type):
        raise ValueError(f"precision {name} is not available on {device.type}: torch has no autocast there; use fp32.")
    if name == "fp16" and training and device.type not in SCALED:
        raise ValueError(f"fp16 training needs a gradient scaler, which torch lacks on {device.type}: use fp32.")
    native, reason = native_precision(device, name)
    why = "as requested"
    if not native:
        factor = slowdown(device.type, name)
        why = f"as requested; {reason}, a small step takes {factor:.1f} times as long as in fp32"
        if factor > 1:
            warnings.warn(
                f"precision {name} is emulated on this device ({reason}): a small training step takes {factor:.1f} "
                "times as long as in fp32. Use precision auto or fp32.",
                stacklevel=2,
            )
    return Precision(name, why, name, training)


def keep_precision(kept: Precision, device: torch.device | str) -> str:
    """For a run that continues in the precision it began with, on whatever device: the line to print, or "".

    The line says what "auto" would choose on this device; there is none where that is the same, or where the precision
    was requested by its name. Warns and raises like `choose_precision` where the device does not have the precision.
    """
    choose_precision(device, kept.name, training=kept.training)
    now = choose_precision(device)
    if now.name == kept.name or kept.requested == kept.name:
        return ""
    return f"precision {kept.name} is kept from the start of this run; auto would choose {now.name}: {now.why}"


def native_precision(device: torch.device | str, name: str) -> tuple[bool, str]:
    """Whether the device has instructions for the 16-bit precision `name`, and a clause that says why."""
    device = torch.device(device)
    if device.type == "cuda":
        return _rocm(name) if torch.version.hip else _cuda(device, name)
    if device.type == "cpu":
        return _cpu(name)
    return False, f"nothing is known about {name} on {device.type}"


def _automatic(device: torch.device) -> tuple[str, str]:
    native, why = native_precision(device, "bf16")
    if native:
        return "bf16", why
    if device.type == "cuda" and not torch.version.hip:
        native, half = native_precision(device, "fp16")
        return ("fp16", f"{why}; {half}") if native else ("fp32", f"{why}; {half}")
    return "fp32", why


def _cuda(device: torch.device, name: str) -> tuple[bool, str]:
    # By capability: torch.cuda.is_bf16_supported() counts emulation.
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"a GPU of CUDA capability {major}.{minor}"
    if name == "bf16":
        return (True, f"{gpu} has bf16") if major >= 8 else (False, f"{gpu} has no bf16 (8.0 and later have)")
    if major < 7:
        return False, f"{gpu} has no fp16 tensor cores (7.0 and later have)"
    if "GTX 16" in torch.cuda.get_device_name(device):
        return False, "a GTX 16xx has no tensor cores"
    return True, f"{gpu} has fp16 tensor cores"


def _rocm(name: str) -> tuple[bool, str]:
    if name == "fp16":
        return True, "ROCm has fp16"
    try:
        supported = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    except TypeError:  # older torch cannot leave emulation out
        supported = False
    return supported, f"torch reports {'' if supported else 'no '}native bf16 on ROCm"


def _cpu(name: str) -> tuple[bool, str]:
    if not torch.backends.mkldnn.is_available():
        return False, "this build of torch has no oneDNN, which computes 16-bit products on CPUs"
    flags = _cpu_flags()
    if name == "fp16":
        native = flags["avx512_fp16"] or flags["amx_fp16"]
        return native and _cap() is None, f"this CPU has {'' if native else 'no '}AVX512-FP16 or AMX-FP16"
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "arm_bf16": "Arm BF16"}
    found = [text for flag, text in names.items() if flags[flag]]
    if not found:
        return False, "this CPU has neither AVX512-BF16, AMX-BF16 nor Arm BF16"
    cap = _cap()
    if cap is not None:
        return False, f"this CPU has {' and '.join(found)}, but {cap} rules it out"
    return True, f"this CPU has {' and '.join(found)}"


def _cpu_flags() -> dict[str, bool]:
    """What torch reports of the CPU. A function that this version of torch lacks reports nothing."""
    told = _ask(lambda: torch.cpu.get_capabilities())  # newer torch
    if told is not None:
        bf16 = told.get("bf16") or told.get("sve_bf16")
        return {
            # Apple's CPUs have the instructions, but torch has no kernels that use them.
            "arm_bf16": bool(bf16) and sys.platform != "darwin",
            **{flag: bool(told.get(flag)) for flag in ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16")},
        }
    private = torch.cpu
    return {
        "avx512_bf16": bool(_ask(lambda: private._is_avx512_bf16_supported())),
        # Every CPU with AMX tiles has AMX-BF16.
        "amx_bf16": bool(_ask(lambda: private._is_amx_tile_supported())),
        "avx512_fp16": False,
        "amx_fp16": bool(_ask(lambda: private._is_amx_fp16_supported())),
        # On x86 this counts AVX-512 without bf16 too.
        "arm_bf16": _is_arm()
        and sys.platform != "darwin"
        and bool(_ask(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported())),
    }


def _ask(question: Any) -> Any:
    """The answer of a private or newer function of torch; None where it is missing or fails."""
    try:
        return question()
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return None


def _is_arm() -> bool:
    import platform

    return platform.machine().lower() in ("aarch64", "arm64")


def _cap() -> str | None:
    """The environment variable that keeps torch from the CPU's 16-bit instructions, as NAME=VALUE, or None."""
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        value = os.environ.get(variable, "")
        if value.upper() in _ISA_BELOW_BF16:
            return f"{variable}={value}"
    level = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if level.upper() in _ATEN_BELOW_BF16:
        return f"ATEN_CPU_CAPABILITY={level}"
    return None


@functools.cache
def slowdown(device: str, name: str) -> float:
    """How many times as long as in float32 a small training step takes in the precision `name`: measured, a few ms.

    Two linear layers of width 128 and 512 on 64 rows, forward and backward; the fastest of five each, since other work
    on the machine only slows them down.
    """
    return _step_seconds(device, DTYPES[name]) / max(_step_seconds(device, None), 1e-9)


def _step_seconds(device: str, dtype: torch.dtype | None, width: int = 128, rows: int = 64) -> float:
    # Constant numbers: drawing random ones would change what the caller draws next.
    x = torch.full((rows, width), 0.5, device=device)
    up = torch.full((4 * width, width), 0.01, device=device, requires_grad=True)
    down = torch.full((width, 4 * width), 0.01, device=device, requires_grad=True)
    seconds = []
    with torch.enable_grad():
        for _ in range(6):
            start = time.perf_counter()
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                y = F.linear(F.gelu(F.linear(x, up)), down)
            gradient, _ = torch.autograd.grad(y.float().square().mean(), (up, down))
            gradient[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first one warms up


__all__ = [
    "AUTO",
    "DTYPES",
    "Precision",
    "choose_precision",
    "keep_precision",
    "native_precision",
    "parse_dtype",
    "parse_precision",
    "slowdown",
]
