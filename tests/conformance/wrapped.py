"""A tiny Llama, the adapters that every trainer and wrapper must treat alike, and a runner for two processes.

The adapters are stock LoRA, the oracle, and ours on each kind of basis: drawn ("random"), computed from the base
("psv"), mined and pointed to by a folder, mined and stored with the adapter.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_attrsub import AttrSubspaceConfig, build_basis

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(3, 11)[None]
KINDS = ["lora", "random", "psv", "pointer", "stored"]

every_kind = pytest.mark.parametrize("kind", KINDS)


def llama(tokens: int = 128) -> LlamaForCausalLM:
    """Two layers, 16 wide; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def mine(folder: Path, seed: int = 10) -> str:
    """Mine a basis from two LoRAs of the tiny Llama into `folder`/basis; another seed gives another basis."""
    for i in range(2):
        base = llama()
        torch.manual_seed(seed + i)
        lora = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
        lora.save_pretrained(folder / f"lora-{seed}-{i}")
    mined = build_basis({"texture": [folder / f"lora-{seed}-{i}" for i in range(2)]}, dim=4, progress=False)
    mined.save_pretrained(folder / "basis", overwrite=True)
    return str(folder / "basis")


def config(kind: str, folder: Path, trained: bool = False, **more: object) -> PeftConfig:
    """The config of one of KINDS; `trained` draws the adapter's weights instead of starting as a no-op."""
    if kind == "lora":
        return LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=not trained, **more)
    arguments = {"target_modules": TARGETS, "init_weights": not trained, **more}
    if kind in ("random", "psv"):
        return AttrSubspaceConfig(basis=kind, dim=4, **arguments)
    basis = str(folder / "basis") if (folder / "basis").exists() else mine(folder)
    return AttrSubspaceConfig(basis=basis, save_basis=kind == "stored", **arguments)


def adapted(kind: str, folder: Path, trained: bool = True, base: nn.Module | None = None, **more: object) -> PeftModel:
    """The tiny Llama (or `base`) with one adapter; equal calls give equal weights."""
    chosen = config(kind, folder, trained, **more)
    base = llama() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, chosen).eval()


def logits(model: nn.Module) -> Tensor:
    """The logits of one fixed sentence."""
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each of a few words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat"]
    words += ["ran", "to", "some", "far", "hill"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, **special)


def run_twice(script: str, *arguments: str) -> list[str]:
    """Run `script` in two processes that can form a gloo group; their standard outputs, or an error with both.

    A process that has run the script to its end leaves without Python's teardown, in which threads of gloo that are
    still running may abort it ("terminate called without an active exception").
    """
    script += "\nimport os, sys\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [error for process, (_, error) in zip(running, results, strict=True) if process.returncode != 0]
    assert not failed, "\n\n".join(text[-3000:] for text in failed)
    return [out for out, _ in results]
