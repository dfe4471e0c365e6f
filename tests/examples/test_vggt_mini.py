"""The weights that are shipped as vggt-mini: small enough, and good on held-out scenes that are rendered here."""

from __future__ import annotations

import re

import numpy as np
import pytest

from peft_attrsub.vggt import VggtModel

from .training_tools import FOLDER, on_path

SCENES = 8
# A fifth above what the shipped weights reach on these eight scenes (0.070 and 4.4): to be lowered with better ones.
BARS = {"abs_rel": 0.084, "rotation_degrees": 5.4}


def test_the_shipped_weights_are_good() -> None:
    pytest.importorskip("open3d")
    on_path()
    from pretraining.batches import choose_views, make_batch
    from pretraining.evaluate import measure
    from pretraining.scenes import SEEDS, Scenes, render_scene

    model = VggtModel.from_pretrained("vggt-mini", heads=["camera", "depth"])
    scenes = Scenes(SEEDS["held-out"], SCENES, size=model.config.image_size)
    rows = [render_scene(scenes, number) for number in range(SCENES)]
    chosen = [choose_views(scenes.views, 4, 1.0, np.random.default_rng(number)) for number in range(SCENES)]
    found = measure(model, [make_batch(rows, chosen)])
    for name, bar in BARS.items():
        assert found[name] < bar < 0.8 * found["trivial"][name], (name, found)


def test_the_shipped_file_is_small_and_says_nothing_of_a_machine() -> None:
    folder = FOLDER / "vggt-mini"
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    for name in ("config.json", "training_log.json", "README.md"):
        text = (folder / name).read_text(encoding="utf-8")
        # Neither a home nor any other absolute path; those of this repository and of links have something before them.
        assert "/home/" not in text and "/root/" not in text and not re.search(r"(?<![\w.:/-])/\w+/", text), name
