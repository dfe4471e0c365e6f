"""pretrain_mini.py: scenes, hints and measures against slow references; a run killed and continued; the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from peft_attrsub.vggt import VggtConfig, VggtImageProcessor, VggtModel, decode_pose, encode_pose, project, unproject
from peft_attrsub.vggt import shipped as shipped_module
from peft_attrsub.vggt.batch import normalise_scene
from peft_attrsub.vggt.blocks import rope_tables, rotate

from .training_tools import FOLDER, fake_cpu, on_path

SCRIPT = FOLDER / "pretrain_mini.py"
TOY = ["--toy", "--scenes", "8", "--held-out", "3"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    on_path()
    import pretrain_mini

    return pretrain_mini


@pytest.fixture(scope="module")
def finished(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run from start to end, undisturbed."""
    pytest.importorskip("open3d")
    out = tmp_path_factory.mktemp("toy")
    assert script.main([*TOY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def batch(finished: Path) -> dict[str, torch.Tensor]:
    from pretraining.batches import heldout_batches
    from pretraining.scenes import SEEDS, Scenes, Shards

    scenes = Scenes(SEEDS["held-out"], 3, size=32)
    return next(iter(heldout_batches(Shards(scenes, finished / "scenes"), views=4)))


def state(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------- the run


def test_a_killed_run_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    """SIGKILL after the checkpoint of step 4, then the same command again."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "scenes").symlink_to(finished / "scenes")
    command = [sys.executable, str(SCRIPT), *TOY, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.kill()
    assert first["step"] == 4 and process.returncode == -9 and state(out)["step"] < 8
    assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode == 0
    killed, whole = state(out), state(finished)
    assert killed["step"] == whole["step"] == 8
    for part in ("model", "hints", "ema"):
        assert all(torch.equal(tensor, killed[part][name]) for name, tensor in whole[part].items()), part
    assert any(
        not torch.equal(value, whole["ema"].get(f"shadow.{name}", value)) for name, value in whole["model"].items()
    )


def test_out_of_minutes_it_saves_and_another_plan_is_refused(
    script: ModuleType, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from pretraining.run import Run
    from pretraining.sizes import sizes

    (tmp_path / "scenes").symlink_to(finished / "scenes")
    assert script.main([*TOY, "--out", str(tmp_path), "--minutes", "0"]) == 0
    assert state(tmp_path)["step"] == 0
    assert script.main([*TOY, "--out", str(tmp_path), "--evaluate"]) == 2
    assert "no trained model yet" in capsys.readouterr().err
    config, plan = sizes(toy=True)
    with pytest.raises(ValueError, match=r"batch=2, not 3"):
        Run(config, type(plan)(batch=3), None, tmp_path)


def test_a_precision_is_chosen_once_and_kept(
    script: ModuleType,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for flags, auto, other in (([], "fp32", "bf16"), (["avx512_bf16"], "bf16", "fp32")):
        fake_cpu(monkeypatch, *flags)
        for requested, name in (("auto", auto), ("float32", "fp32"), ("fp16", "fp16")):
            out = tmp_path / f"{auto}-{requested}"
            out.mkdir()
            (out / "scenes").symlink_to(finished / "scenes")
            run = [*TOY, "--out", str(out)]
            assert script.main([*run, "--precision", requested, "--steps", "2"]) == 0
            assert f"precision {name}" in capsys.readouterr().err
            assert state(out)["precision"]["precision"] == name
            assert (state(out)["scaler"] != {}) == (name == "fp16")
            fake_cpu(monkeypatch, *([] if flags else ["avx512_bf16"]))
            assert script.main([*run, "--steps", "4"]) == 0
            kept = f"precision {auto} is kept from the start of this run; auto would choose {other}"
            assert (kept in capsys.readouterr().err) == (requested == "auto")
            assert (state(out)["precision"]["precision"], state(out)["step"]) == (name, 4)
            assert script.main([*run, "--precision", "bf16" if name != "bf16" else "fp32"]) == 2
            assert f"is of a run with precision='{name}'" in capsys.readouterr().err
            fake_cpu(monkeypatch, *flags)
    # A checkpoint of an older version has no record: it is of bf16.
    old = state(out)
    del old["precision"], old["scaler"]
    torch.save(old, out / "checkpoint.pt")
    assert script.main([*run, "--steps", "6"]) == 0
    assert state(out)["precision"]["precision"] == "bf16"


def test_weights_change_on_the_way_and_are_recorded(script: ModuleType, finished: Path, tmp_path: Path) -> None:
    """From where the run is on; an export says so, and is not itself such a change."""
    (tmp_path / "scenes").symlink_to(finished / "scenes")
    run = [*TOY, "--out", str(tmp_path)]
    assert script.main([*run, "--minutes", "0"]) == 0
    before = {name: tensor.clone() for name, tensor in state(tmp_path)["model"].items()}
    assert script.main([*run, "--weights", "depth=6", "match=0.1"]) == 0
    changed = state(tmp_path)
    assert changed["step"] == 8 and any(not torch.equal(before[k], v) for k, v in changed["model"].items())
    assert any(not torch.equal(changed["model"][k], v) for k, v in state(finished)["model"].items())
    assert script.main([*run, "--export", str(tmp_path / "made")]) == 0
    log = json.loads((tmp_path / "made" / "training_log.json").read_text())
    first, second = log["weights"]
    assert (first["from_step"], first["depth_weight"], first["match_weight"]) == (0, 3.0, 0.3)
    assert second == first | {"depth_weight": 6.0, "match_weight": 0.1}
    assert log["plan"]["depth_weight"] == 6.0


@pytest.mark.parametrize("pair", ["depth=much", "depth", "light=1", "depth=-1"])
def test_weights_that_are_none_are_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, pair: str
) -> None:
    assert script.main([*TOY, "--out", str(tmp_path), "--weights", pair]) == 2
    assert f"--weights {pair}: expected PART=W" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_rates_and_windows_of_a_plan(script: ModuleType) -> None:
    from pretraining.run import Plan

    plan = Plan(steps=1000, lr=1.0, warmup=10, cool=0.2, near_share=0.5, reach=0.2)
    assert [plan.rate(step) for step in (0, 4, 9, 500, 800, 900, 999)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 0.5, 0.005]
    )
    assert [plan.window(step) for step in (0, 250, 500, 900)] == pytest.approx([0.2, 0.6, 1, 1])


def test_one_step_learns_from_every_part(finished: Path) -> None:
    """Every weight of model and hints has a gradient; a gradient that is not finite changes nothing."""
    from pretraining.run import Run
    from pretraining.scenes import SEEDS, Scenes, Shards
    from pretraining.sizes import sizes

    config, plan = sizes(toy=True)
    shards = Shards(Scenes(SEEDS["train"], 8, size=32), finished / "scenes")
    run = Run(config, plan, shards, finished / "nowhere")
    run.one_step()
    still = [
        name
        for part in (run.model, run.hints)
        for name, p in part.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    assert still == []
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.hints.locate.register_forward_hook(lambda module, given, found: found * float("inf"))
    run.one_step()
    assert run.step == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


# ------------------------------------------------------------------------------------------------------- the scenes


def test_the_cache_has_cameras_that_fit_its_depths(batch: dict[str, torch.Tensor]) -> None:
    """Points of view 0 fall on pixels of the other views whose depth agrees: most of what is inside is not hidden."""
    points = unproject(batch["depths"], batch["intrinsics"], batch["extrinsics"])[:, :1].flatten(1, 3)
    pixels, depth = project(points[:, None], batch["intrinsics"], batch["extrinsics"])
    side = batch["depths"].shape[-1]
    agree = inside = 0
    for scene in range(len(points)):
        known = batch["depths"][scene, 0].flatten() > 0
        for view in range(1, 4):
            at = pixels[scene, view].round()
            seen = known & (at >= 0).all(-1) & (at < side).all(-1) & (depth[scene, view] > 0)
            column, row = at[seen].long().T
            there = batch["depths"][scene, view, row, column]
            agree += int(((there - depth[scene, view][seen]).abs() < 0.05 * there).sum())
            inside += int(seen.sum())
    assert inside > 1000 and agree > 0.7 * inside


def test_mirrored_scenes_are_scenes(batch: dict[str, torch.Tensor]) -> None:
    from pretraining.batches import mirror

    turned = mirror(batch)
    flip = torch.tensor([-1.0, 1, 1])
    world = unproject(batch["depths"], batch["intrinsics"], batch["extrinsics"])
    mirrored = unproject(turned["depths"], turned["intrinsics"], turned["extrinsics"])
    torch.testing.assert_close(mirrored, (world * flip).flip(-2), atol=1e-4, rtol=1e-4)
    assert torch.linalg.det(turned["extrinsics"][..., :3]) == pytest.approx(1, abs=1e-5)
    again = mirror(turned)
    assert all(torch.equal(again[key], batch[key]) for key in batch)


def test_smaller_pictures_show_the_same_scene(batch: dict[str, torch.Tensor]) -> None:
    from pretraining.run import shrink

    small = shrink(batch, 16)
    assert small["images"].shape[-2:] == small["depths"].shape[-2:] == (16, 16)
    full, half = (encode_pose(x["extrinsics"], x["intrinsics"], x["depths"].shape[-2:]) for x in (batch, small))
    torch.testing.assert_close(full, half)
    assert shrink(batch, 32) is batch


def test_views_come_from_a_window(script: ModuleType) -> None:
    from pretraining.batches import choose_views

    rng = np.random.default_rng(0)
    for reach, width in ((0.0, 4), (0.5, 6), (1.0, 8)):
        spans = set()
        for _ in range(200):
            views = choose_views(8, 4, reach, rng)
            assert len(set(views)) == 4 and views.min() >= 0 and views.max() < 8
            spans.add(int(views.max() - views.min()) + 1)
        assert max(spans) == width


# -------------------------------------------------------------------------------------------------------- the hints


def slow_matches(truth: dict[str, torch.Tensor], patch: int) -> torch.Tensor:
    """Pixel by pixel, as the definition says it."""
    b, s, height, width = truth["depths"].shape
    columns = width // patch
    found = torch.full((b, s, height // patch * columns, s), -1)
    for scene in range(b):
        for i in range(s):
            for p in range(found.shape[2]):
                row, column = (part * patch + patch // 2 for part in divmod(p, columns))
                if not truth["point_masks"][scene, i, row, column]:
                    continue
                point = truth["world_points"][scene, i, row, column]
                for j in range(s):
                    pose = truth["extrinsics"][scene, j]
                    x, y, z = (pose[:, :3] @ point + pose[:, 3]).tolist()
                    if i == j or z <= 0:
                        continue
                    k = truth["intrinsics"][scene, j]
                    u, v = (
                        round(float(k[0, 0]) * x / z + float(k[0, 2])),
                        round(float(k[1, 1]) * y / z + float(k[1, 2])),
                    )
                    if 0 <= u < width and 0 <= v < height:
                        there = float(truth["depths"][scene, j, v, u])
                        if abs(there - z) < 0.05 * z:
                            found[scene, i, p, j] = v // patch * columns + u // patch
    return found


def test_matches_against_a_slow_search(batch: dict[str, torch.Tensor]) -> None:
    from pretraining.hints import find_matches

    truth = normalise_scene(batch)
    found, slow = find_matches(truth, 8), slow_matches(truth, 8)
    # A pixel on the edge of rounding may fall to either side.
    assert float((found == slow).float().mean()) > 0.995
    assert float((slow >= 0).float().mean()) > 0.2


def test_relative_error_against_a_slow_mean(batch: dict[str, torch.Tensor]) -> None:
    from pretraining.hints import relative_error

    truth, chance = batch["depths"], torch.Generator().manual_seed(0)
    mask = batch["point_masks"] & (torch.rand(truth.shape, generator=chance) < 0.3)
    depth = truth + 0.3 * torch.randn(truth.shape, generator=chance)
    errors = [abs(float(depth[at] - truth[at])) / float(truth[at]) for at in map(tuple, mask.nonzero().tolist())]
    assert 0 < len(errors) < mask.numel()
    assert float(relative_error(depth, truth, mask)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert float(relative_error(depth, truth, torch.zeros_like(mask))) == 0.0


def test_hints_against_slow_sums(batch: dict[str, torch.Tensor]) -> None:
    from pretraining.hints import TEMPERATURE, Hints, attention_on, find_matches

    torch.manual_seed(0)
    config = VggtConfig.preset("vggt-mini", image_size=32, embed_dim=16, depth=2, encoder_depth=1)
    model = VggtModel(config)
    hints = Hints(model, width=8)
    truth = normalise_scene(batch)
    matches = find_matches(truth, 8)
    b, s, n, _ = matches.shape

    tokens = torch.randn(b * s, n, 16)
    f = F.normalize(hints.describe(tokens), dim=-1).view(b, s, n, -1)
    terms = [
        -(f[scene, j] @ f[scene, i, p] / TEMPERATURE).log_softmax(0)[matches[scene, i, p, j]]
        for scene, i, p, j in (matches >= 0).nonzero().tolist()
    ]
    torch.testing.assert_close(hints._match(tokens, matches), torch.stack(terms).mean())

    special, attention = 5, model.aggregator.global_blocks[0].attn
    t = special + n
    x = torch.randn(b, s * t, 16)
    positions = torch.randint(0, 4, (t, 2))
    rope = tuple(table.repeat(s, 1) for table in rope_tables(positions, 8, 100.0))
    q, k, _ = attention.qkv(x).view(b, s * t, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = rotate(attention.q_norm(q), rope), rotate(attention.k_norm(k), rope)
    weights = (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1)[:, 0]
    first = matches.clone()
    first[..., 1:] = -1
    for told in (matches, first):
        terms = []
        for scene, i, p in (told >= 0).any(-1).nonzero().tolist():
            hit = [j * t + special + int(told[scene, i, p, j]) for j in range(s) if told[scene, i, p, j] >= 0]
            terms.append(-weights[scene, i * t + special + p, hit].sum().log())
        torch.testing.assert_close(attention_on(attention, x, rope, told, special), torch.stack(terms).mean())

    last = torch.randn(b, s, t, 32)
    place = hints.locate(last[:, :, special:]).view(b, s, 4, 4, 2, 2, 3)
    errors = []
    for scene, i, row, column, r, c in np.ndindex(b, s, 4, 4, 2, 2):
        v, u = row * 8 + (2, 6)[r], column * 8 + (2, 6)[c]
        if truth["point_masks"][scene, i, v, u]:
            errors.append((truth["world_points"][scene, i, v, u] - place[scene, i, row, column, r, c]).norm())
    torch.testing.assert_close(hints._points(last, truth), torch.stack(errors).mean())


# ----------------------------------------------------------------------------------------------------- the measures


def test_measures_against_slow_ones(batch: dict[str, torch.Tensor]) -> None:
    """A model that knows the truth but for noise, measured pair by pair and pixel by pixel."""
    from pretraining.evaluate import measure

    truth = normalise_scene(batch)
    torch.manual_seed(0)
    size = tuple(truth["depths"].shape[-2:])
    target = encode_pose(truth["extrinsics"], truth["intrinsics"], size)
    found = SimpleNamespace(
        pose_enc=target + 0.05 * torch.randn_like(target),
        depth=(3 * truth["depths"] * (1 + 0.2 * torch.rand_like(truth["depths"])))[..., None],
    )

    class Known:
        def eval(self) -> None: ...
        def __call__(self, images: torch.Tensor) -> SimpleNamespace:
            return found

    answer = measure(Known(), [batch])

    poses = decode_pose(found.pose_enc, size)[0].double()
    turned, still, moved, depth, flat = [], [], [], [], []
    for scene in range(len(target)):
        for i in range(4):
            for j in range(i + 1, 4):
                pairs = []
                for one in (poses, truth["extrinsics"].double()):
                    full = [torch.cat([one[scene, view], torch.tensor([[0.0, 0, 0, 1]])]) for view in (i, j)]
                    pairs.append(full[1] @ torch.linalg.inv(full[0]))
                apart = pairs[0][:3, :3].T @ pairs[1][:3, :3]
                turned.append(np.degrees(np.arccos((float(apart.trace()) - 1) / 2)))
                still.append(np.degrees(np.arccos((float(pairs[1][:3, :3].trace()) - 1) / 2)))
                a, c = pairs[0][:3, 3], pairs[1][:3, 3]
                if c.norm() >= 0.01:
                    moved.append(np.degrees(np.arccos(float(a @ c / a.norm() / c.norm()))))
        mask = truth["point_masks"][scene]
        z, d = truth["depths"][scene][mask].double().numpy(), found.depth[scene, ..., 0][mask].double().numpy()
        depth.append(np.mean(np.abs(np.median(z) / np.median(d) * d - z) / z))
        flat.append(np.mean(np.abs(np.median(z) - z) / z))
    assert answer["rotation_degrees"] == pytest.approx(np.median(turned), rel=1e-4)
    assert answer["translation_degrees"] == pytest.approx(np.median(moved), rel=1e-4)
    assert answer["abs_rel"] == pytest.approx(np.mean(depth), rel=1e-3)
    assert answer["trivial"]["rotation_degrees"] == pytest.approx(np.median(still), rel=1e-4)
    assert answer["trivial"]["abs_rel"] == pytest.approx(np.mean(flat), rel=1e-3)
    assert (answer["scenes"], answer["pairs"]) == (3, 18)


# ------------------------------------------------------------------------------------------------ export and loading


def test_an_export_is_a_model(
    script: ModuleType, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running mean, rounded to bfloat16 in the file and float32 in memory, by folder and by name."""
    folder = tmp_path / "clone" / "examples" / "vggt" / "vggt-mini"
    assert script.main([*TOY, "--out", str(finished), "--export", str(folder), "--note", "A toy."]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_log.json"}
    kept = load_file(folder / "model.safetensors")
    mean = {name.removeprefix("shadow."): tensor for name, tensor in state(finished)["ema"].items()}
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}

    monkeypatch.setattr(shipped_module, "_CLONE", tmp_path / "clone")
    monkeypatch.chdir(tmp_path)
    by_name = VggtModel.from_pretrained("vggt-mini", heads=["camera", "depth"])
    for model in (by_name, VggtModel.from_pretrained(folder)):
        loaded = model.state_dict()
        assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
        assert all(torch.equal(tensor, kept[name].float()) for name, tensor in loaded.items())
        assert all(
            torch.equal(loaded[name], tensor.bfloat16().float()) for name, tensor in mean.items() if name in loaded
        )
    assert by_name.name_or_path == "vggt-mini"
    assert VggtModel.from_pretrained("vggt-mini", dtype=torch.bfloat16).aggregator.camera_token.dtype == torch.bfloat16
    processor = VggtImageProcessor.from_pretrained("vggt-mini")
    assert (processor.image_size, processor.patch_size) == (32, 8)
    assert VggtConfig.from_pretrained("vggt-mini").embed_dim == 32

    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in text and str(finished) not in text and os.uname().nodename not in text.split()
    log = json.loads((folder / "training_log.json").read_text())
    assert log["steps"] == 8 and [line["step"] for line in log["held_out"]] == [4, 8] and log["losses"]
    card = (folder / "README.md").read_text()
    assert f"{log['result']['abs_rel']:.4f}" in card and log["note"] == "A toy." and card.endswith("\nA toy.\n")


def test_a_users_own_folder_of_that_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = VggtConfig.preset("vggt-mini", image_size=16, embed_dim=16, depth=1, encoder_depth=1)
    VggtModel(config).save_pretrained(tmp_path / "vggt-mini")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped_module, "_CLONE", tmp_path / "elsewhere")
    assert VggtModel.from_pretrained("vggt-mini").config.embed_dim == 16


@pytest.mark.parametrize("kind", [VggtModel, VggtConfig, VggtImageProcessor])
def test_without_the_clone_a_sentence_says_what_to_do(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped_module, "_CLONE", tmp_path)
    with pytest.raises(OSError, match=r"examples/vggt/vggt-mini.*give the path of that folder.*pretrain_mini\.py"):
        kind.from_pretrained("vggt-mini")


def test_wrong_numbers_are_sentences(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert script.main(["--toy", "--out", str(tmp_path), "--threads", "0"]) == 2
    assert "expected 1 or more" in capsys.readouterr().err
