"""examples/vggt/training/heldout.py: which sequences are held out, and what is measured on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peft_attrsub.datasets import MultiViewDataset, Sample
from peft_attrsub.vggt import VggtLoss, quaternion_to_matrix
from tests.datasets import world
from tests.examples.training_tools import on_path, tiny_model

on_path()
from training.heldout import HeldOut, evaluate, hold_out, merged, rotation_errors  # noqa: E402


class Worlds(MultiViewDataset):
    """Three copies of the small world under three names."""

    def _find(self) -> list[str]:
        return ["a", "b", "c"]

    def frames(self, name: str) -> list[str]:
        return ["0", "1", "2"]

    def _read(self, name: str, frames: list[str]) -> Sample:
        return world.make_sample().views([int(frame) for frame in frames])


def held(tmp_path: Path, views: int = 3) -> HeldOut:
    return HeldOut(Worlds(tmp_path), ("a", "b", "c"), views, 56, 14)


def test_every_nth_sequence_is_held_out() -> None:
    names = [f"s{index:02d}" for index in range(20)]
    learn, out = hold_out(names, 0.25, 16)
    assert out == ["s03", "s07", "s11", "s15", "s19"] and sorted(learn + out) == names
    assert hold_out(names, 0.25, 2)[1] == ["s03", "s07"]
    assert len(hold_out(names, 0.25, 2)[0]) == 18  # what is not needed is learnt from
    assert hold_out(names, 0, 4) == (names, [])
    assert hold_out(["a", "b"], 0.05, 4) == (["a"], ["b"])
    with pytest.raises(ValueError, match="one sequence, 'a': nothing can be held out"):
        hold_out(["a"], 0.05, 4)


@pytest.mark.parametrize("degrees", [0.0, 1e-4, 0.5, 90.0, 179.9])
def test_rotations_are_compared_relative_to_the_first_view(degrees: float) -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.cat([quaternion_to_matrix(torch.randn(4, 4, generator=draw).double()), torch.zeros(4, 3, 1)], -1)
    axis = torch.nn.functional.normalize(torch.randn(3, generator=draw).double(), dim=0)
    half = np.deg2rad(degrees) / 2
    turn = quaternion_to_matrix(torch.cat([axis * np.sin(half), torch.tensor([np.cos(half)])]))
    predicted = truth.clone()
    predicted[2, :, :3] = turn @ truth[2, :, :3]
    # Another world frame for the prediction changes nothing.
    predicted[..., :3] = predicted[..., :3] @ quaternion_to_matrix(torch.randn(4, generator=draw).double())
    torch.testing.assert_close(
        rotation_errors(predicted, truth), torch.tensor([0.0, degrees, 0.0]).double(), atol=1e-5, rtol=1e-6
    )


def test_a_sequence_is_seen_at_evenly_spaced_frames_and_the_size_of_the_model(tmp_path: Path) -> None:
    sample = held(tmp_path, views=2).sample("b")
    assert sample.frames == ("0", "1") and tuple(sample.images.shape) == (2, 3, 56, 56)
    assert held(tmp_path, views=9).sample("b").frames == ("0", "1", "2")


def test_processes_share_the_sequences_and_their_sums_are_the_whole(tmp_path: Path) -> None:
    model, loss = tiny_model().train(), VggtLoss(nonfinite="skip")
    alone = evaluate(model, held(tmp_path), loss, torch.device("cpu"), panel=tmp_path / "panel.png")
    shares = [evaluate(model, held(tmp_path), loss, torch.device("cpu"), rank, 2) for rank in range(2)]
    assert [share["n_loss"] for share in shares] == [2, 1]
    for key, value in alone.items():
        assert shares[0][key] + shares[1][key] == pytest.approx(value, rel=1e-6)
    means = merged(alone)
    assert set(means) == {"loss", "abs_rel", "rotation"} and all(np.isfinite(list(means.values())))
    assert means["loss"] == pytest.approx(alone["loss"] / 3) and means["abs_rel"] > 0 and 0 < means["rotation"] < 180
    assert model.training and (tmp_path / "panel.png").stat().st_size > 1000
