"""benchmarks/mini_study.py at toy size: it ends, goes on after it was killed, and says what its numbers say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
TOY = {
    "name": "toy",
    "attributes": ["texture", "lighting"],
    "datasets": 2,
    "scenes": 2,
    "views": 3,
    "benchmarks": ["human"],
    "train": 2,
    "validation": 1,
    "test": 1,
    "cross": 1,
    "generic": 1,
    "views_tuned": 2,
    "source_rank": 2,
    "source_ranks": [],
    "rank_datasets": 1,
    "source_steps": 2,
    "source_images": 2,
    "steps": 2,
    "images": 2,
    "sweep": 1,
    "methods": ["full", "lora", "attrsub"],
    "ranks": [2],
    "dims": [4],
    "basis_dims": [],
    "oracle_dims": [4],
    "ablation_dim": 4,
    "ablations": [],
    "folds": 1,
    "queries": 200,
}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules are found as the script finds them; those of the examples are taken away again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft_attrsub.vggt import VggtConfig, VggtModel

    config = VggtConfig(
        image_size=32,
        patch_size=8,
        embed_dim=16,
        depth=4,
        num_heads=2,
        encoder_depth=1,
        encoder_num_heads=2,
        layer_scale_init=0.5,
        camera_depth=1,
        camera_num_heads=2,
        camera_iterations=1,
        dpt_features=8,
        dpt_channels=(8, 8, 8, 8),
        heads=["camera", "depth"],
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    VggtModel(config).save_pretrained(folder)
    return folder


def begin(model: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The toy study in this process's Python, its output kept."""
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, str(BENCHMARKS / "mini_study.py"), "--model", str(model), "--out", str(out)]
    words += ["--seeds", "1", "--workers", "0", "--output", str(out / "result.json")]
    words += [*(f"--set={key}={json.dumps(value)}" for key, value in TOY.items()), *more]
    environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    return text


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_result(model: Path, tmp_path: Path) -> None:
    from study.files import without_times

    pytest.importorskip("open3d")
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    printed = finish(begin(model, whole))
    assert "### Table 1: Clothed humans" in printed
    assert "agreement of 4 source adapters of rank 2" in printed
    result = json.loads((whole / "result.json").read_text())
    assert result["missing"] == 0
    assert {row["label"] for row in result["rows"]} == {"none", "full", "lora-2", "attrsub-4", "oracle-4"}
    for row in result["rows"]:
        for part in ("test", "cross", "generic"):
            assert all(math.isfinite(row["seeds"]["0"][part][name]) for name in ("acc", "comp", "nc", "abs_rel"))
    assert 0 <= result["explained"]["human"]["inside"]["attrsub-4"] < result["oracle"]["human"]["inside"]["4"] <= 1
    assert str(tmp_path) not in json.dumps(result["command"])

    process = begin(model, halved)
    while not list(halved.glob("sources/*/*/summary.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (halved / "result.json").exists()
    finish(begin(model, halved))
    again = json.loads((halved / "result.json").read_text())
    assert without_times(again) == without_times(result)

    # Nothing is left to do, and another study is not mixed in.
    before = {path: path.stat().st_mtime_ns for path in halved.rglob("summary.json")}
    finish(begin(model, halved))
    assert {path: path.stat().st_mtime_ns for path in halved.rglob("summary.json")} == before
    other = begin(model, halved, "--set=folds=2")
    text, _ = other.communicate(timeout=280)
    assert other.returncode == 2
    assert "holds a study with folds = 1, and this one has 2" in text


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model: Path, tmp_path: Path) -> None:
    from study.files import without_times

    pytest.importorskip("open3d")
    finish(begin(model, tmp_path / "one", "--stage", "diagnosis"))
    finish(begin(model, tmp_path / "two", "--stage", "diagnosis", "--workers", "2"))
    one, two = (json.loads((tmp_path / name / "diagnosis" / "summary.json").read_text()) for name in ("one", "two"))
    assert without_times(one) == without_times(two)
    assert not (tmp_path / "one" / "bases").exists()


def test_a_study_keeps_the_precision_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from study.files import keep_study
    from study.precision import keep, settle

    from peft_attrsub.vggt import precision

    monkeypatch.setattr(precision, "slowdown", lambda device, name: 0.5)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(variable, raising=False)
    for flags, name, other in (({}, "fp32", "bf16"), ({"avx512_bf16": True}, "bf16", "fp32")):
        out = tmp_path / name
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        study, chosen, told = settle(toy(), out)
        assert (study.precision, chosen.requested) == (name, "auto") and told.startswith(f"precision {name}: ")
        keep_study(out, study.record())
        keep(out, chosen)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: {"avx512_bf16": not flags})
        for asked in ("auto", name):
            again, kept, told = settle(toy(precision=asked), out)
            assert again == study and kept == chosen and f"auto would choose {other}" in told
            keep_study(out, again.record())
        with pytest.raises(ValueError, match=f"precision = '{name}', and this one has '{other}'"):
            keep_study(out, settle(toy(precision=other), out)[0].record())
        # A folder of an older version has the settings alone.
        (out / "precision.json").unlink()
        assert settle(toy(), out)[0] == study
        with pytest.raises(ValueError, match="precision is 'int8'"):
            settle(toy(precision="int8"), out)


# --- the plan -------------------------------------------------------------------------------------------------------


def toy(**changes: Any) -> Any:
    from study.settings import Study

    return Study.of(TOY | {"source_ranks": (), **changes})


def play(study: Any, score: Any) -> tuple[dict[str, Any], list[str]]:
    """Do a plan with made-up results; score: of a rate."""
    from study.plan import jobs, startable
    from study.settings import STAGES

    done: dict[str, Any] = {}
    order: list[str] = []
    while ready := startable(jobs(study, done), done, set(), STAGES):
        job = ready[0]
        assert set(job.needs) <= set(done)
        order.append(job.name)
        rate = job.options.get("rate")
        sets = {part: {"mean": {"acc": 1.0, "abs_rel": 0.1}, "skipped": {}} for part in ("test", "cross", "generic")}
        done[job.name] = {"score": None if rate is None else score(rate), "options": job.options, "rate": rate}
        done[job.name] |= {"trainable": 10, "sets": sets, "losses": [1.0], "moved_a": 0.5, "seconds": 1.0}
    return done, order


def test_full_and_quick_studies_can_be_played_to_their_end() -> None:
    from study.plan import jobs
    from study.settings import FULL, QUICK

    for study in (FULL, QUICK):
        done, order = play(study, lambda rate: abs(math.log(rate / 3e-3)))
        assert len(order) == len(set(order))
        assert all(job.name in done for job in jobs(study, done))


def test_a_foreign_oracle_is_that_of_another_benchmark() -> None:
    from study.plan import jobs

    study = toy(benchmarks=("human", "face"), oracle_dims=(4, 8))
    done, _ = play(study, lambda rate: abs(math.log(rate / 3e-3)))
    needs = {job.name: job.needs for job in jobs(study, done)}
    for own, other in (("human", "face"), ("face", "human")):
        assert f"bases/oracle-{own}" in needs[f"tuning/{own}/oracle-8/seed-0"]
        assert f"bases/oracle-{other}" in needs[f"tuning/{own}/foreign-4/seed-0"]
        assert f"tuning/{own}/foreign-8/seed-0" not in needs
        chosen = done[f"tuning/{own}/full/seed-0"]["rate"]
        assert done[f"bases/oracle-{own}"]["options"]["state"] == f"tuning/{own}/full/rate-{chosen:g}"


def test_a_sweep_follows_its_border_and_seed_0_takes_up_the_best_run() -> None:
    study = toy(seeds=2, sweep=2)
    done, order = play(study, lambda rate: rate)  # smaller is better without end
    tried = [name for name in order if name.startswith("tuning/human/lora-2/rate-")]
    rates = sorted(done[name]["rate"] for name in tried)
    assert rates == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3])
    first, second = (done[f"tuning/human/lora-2/seed-{seed}"]["options"] for seed in (0, 1))
    assert first["rate"] == second["rate"] == rates[0]
    assert first["state"] == "tuning/human/lora-2/rate-0.0001"
    assert second["state"] is None


def test_ablations_take_the_rate_of_what_they_change() -> None:
    study = toy(ablations=("core", "columns"), dims=(4,))
    done, order = play(study, lambda rate: abs(math.log(rate / 1e-2)))
    assert not any("block-diagonal-core/rate" in name for name in order)
    chosen = done["tuning/human/attrsub-4/seed-0"]["rate"]
    assert done["tuning/human/block-diagonal-core/seed-0"]["rate"] == chosen
    assert any("spectral-columns/rate" in name for name in order)


def test_settings_that_do_not_fit_are_refused() -> None:
    from study.settings import FULL

    assert FULL.changed(["steps=7", "model=some/folder"]).steps == 7
    for pair, words in (("step=7", "--set step=7"), ("dims=[5]", "D = 5"), ('benchmarks=["cats"]', "cats")):
        with pytest.raises(ValueError, match=words):
            FULL.changed([pair])


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_paired_differences_against_the_slow_way(seed: int) -> None:
    from study.statistics import paired, spread

    rng = np.random.default_rng(seed)
    a, b = ({s: float(v) for s, v in enumerate(rng.normal(size=4) + shift)} for shift in (0.0, rng.normal()))
    b[9] = 1.0  # in one of them alone
    found = paired(a, b, less_is_better=True)
    gaps = np.array([a[s] - b[s] for s in range(4)])
    mean, se = gaps.sum() / 4, math.sqrt(((gaps - gaps.mean()) ** 2).sum() / 3) / 2
    assert (found["difference"], found["se"]) == pytest.approx((mean, se))
    expected = "no difference" if abs(mean) <= 2 * se else "better" if mean < 0 else "worse"
    assert found["verdict"] == expected
    opposite = {"better": "worse", "worse": "better", "no difference": "no difference"}
    assert paired(a, b, less_is_better=False)["verdict"] == opposite[expected]
    values = list(a.values())
    sd = math.sqrt(sum((v - fmean(values)) ** 2 for v in values) / 3)
    assert (spread([*values, None, math.nan])["mean"], spread(values)["sd"]) == pytest.approx((fmean(values), sd))


def test_paired_says_when_it_cannot_know() -> None:
    from study.statistics import paired

    assert paired({0: 1.0}, {0: 2.0}, True)["verdict"] == "one seed"
    assert paired({0: None}, {0: 2.0}, True)["verdict"] == "nothing"
    assert paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, True)["verdict"] == "no difference"


def test_a_rate_is_chosen() -> None:
    from study.statistics import choose_rate, rounded

    first = (1e-3, 3e-3, 1e-2)
    assert choose_rate({1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0}, 10**0.5, 2, first) == ("take", 3e-3, False)
    assert choose_rate({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}, 10**0.5, 2, first) == ("try", 3e-4, False)
    far = {1e-4: 0.1, 3e-4: 0.5, 1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}
    assert choose_rate(far, 10**0.5, 2, first) == ("take", 1e-4, True)
    # A run that diverged is not taken; where all did, smaller rates are tried.
    assert choose_rate({1e-3: 2.0, 3e-3: 1.0, 1e-2: None}, 10**0.5, 2, first) == ("take", 3e-3, False)
    assert choose_rate(dict.fromkeys(first), 10**0.5, 2, first) == ("try", 3e-4, False)
    assert [rounded(10 ** (-4 + k / 2)) for k in range(5)] == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])


def test_agreement_against_the_slow_way() -> None:
    from study.sources import agreement, compared, within_and_across

    rng = torch.Generator().manual_seed(0)
    spaces = [torch.linalg.qr(torch.randn(12, 3, generator=rng, dtype=torch.float64))[0] for _ in range(5)]
    table = agreement(spaces)
    for i, u in enumerate(spaces):
        for j, v in enumerate(spaces):
            cosines = torch.linalg.svdvals(u.T @ v)
            assert float(table[i, j]) == pytest.approx(float((cosines**2).mean()))
    groups = [0, 0, 1, 1, 1]
    inside = [float(table[i, j]) for i in range(5) for j in range(5) if i != j and groups[i] == groups[j]]
    outside = [float(table[i, j]) for i in range(5) for j in range(5) if groups[i] != groups[j]]
    assert within_and_across(table, groups) == pytest.approx((fmean(inside), fmean(outside)))
    # Two attributes with a direction each of their own: far above what shuffled labels give.
    planted = torch.full((8, 8), 0.1)
    planted[:4, :4] = planted[4:, 4:] = 0.9
    found = compared(planted, [0] * 4 + [1] * 4, 200)
    assert found["z"] > 2
    assert found["shuffled"]["mean"] < 0.1


def test_captured_energy_against_the_dense_form() -> None:
    from study.mining import captured

    from peft_attrsub.basis import shared_subspace

    rng = torch.Generator().manual_seed(1)
    row = [{"m": (torch.randn(10, 2, generator=rng), torch.randn(7, 2, generator=rng))} for _ in range(4)]
    found = shared_subspace([one["m"][0] for one in row[1:]], [one["m"][1] for one in row[1:]], 3)
    p, q = row[0]["m"]
    update = (p @ q.T).double()
    inside = found.u.double().T @ update @ found.v.double()
    assert captured(row[0], row[1:], 3) == pytest.approx(float((inside**2).sum() / (update**2).sum()))


def test_what_lies_inside_against_the_projection() -> None:
    """All of an update that was made of A and B, none of one beside them, and in between what a projector leaves."""
    from study.explaining import inside

    g = torch.Generator().manual_seed(0)
    a = torch.linalg.qr(torch.randn(9, 3, generator=g, dtype=torch.float64))[0]
    b = torch.linalg.qr(torch.randn(7, 3, generator=g, dtype=torch.float64))[0]
    assert inside(a @ torch.randn(3, 3, generator=g, dtype=torch.float64) @ b.T, a, b) == pytest.approx(1.0)
    update = torch.randn(9, 7, generator=g, dtype=torch.float64)
    kept = (a @ a.T) @ update @ (b @ b.T)
    assert inside(update, a.float(), b.float()) == pytest.approx(float((kept**2).sum() / (update**2).sum()), rel=1e-5)
    assert inside(update - a @ (a.T @ update), a, b) == pytest.approx(0.0, abs=1e-12)
    assert inside(torch.zeros(9, 7, dtype=torch.float64), a, b) == 0.0


def test_the_oracle_holds_more_of_an_update_than_any_other_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from study import explaining

    from peft_attrsub.basis import Basis

    g = torch.Generator().manual_seed(1)
    update = torch.randn(9, 7, generator=g, dtype=torch.float64)
    monkeypatch.setattr(explaining, "changed", lambda study, path: {"blocks.0.fc": update})
    found = explaining.make_oracle(toy(oracle_dims=(2, 4)), tmp_path, "human", "tuning/human/full/rate-0.001")
    s = torch.linalg.svdvals(update).square()
    assert found["inside"] == pytest.approx({"2": float(s[:2].sum() / s.sum()), "4": float(s[:4].sum() / s.sum())})
    u, _, v = Basis.from_pretrained(tmp_path / "bases" / "oracle-human" / "basis").factors("blocks.0.fc", "oracle")
    assert explaining.inside(update, u, v) == pytest.approx(found["inside"]["4"], rel=1e-5)
    for _ in range(20):
        a, b = (torch.linalg.qr(torch.randn(k, 4, generator=g, dtype=torch.float64))[0] for k in update.shape)
        assert explaining.inside(update, a, b) < found["inside"]["4"]


def test_frames_that_are_measured_are_apart_and_start_elsewhere() -> None:
    from study.data import fixed

    class Made:
        names = ("a", "b", "c")

        def frames(self, name: str) -> list[str]:
            return [str(i) for i in range(24)]

    found = fixed(Made(), 4, 2)
    assert found["a"] == ["0", "2", "4", "6"]
    assert found["b"] == ["5", "7", "9", "11"]
    assert found["c"] != found["a"]


# --- the page -------------------------------------------------------------------------------------------------------


def made_up(better: bool) -> dict[str, Any]:
    """A result by the code that makes the real one, from made-up summaries."""
    from study.collect import collect
    from study.mining import variants

    study = toy(
        seeds=3,
        methods=("full", "lora", "psv", "random", "attrsub"),
        ranks=(16,),
        basis_dims=(4,),
        ablations=("core", "alpha"),
    )
    done, _ = play(study, lambda rate: abs(math.log(rate / 3e-3)))
    sizes = {"none": 0, "full": 5000, "lora": 4000, "psv": 100, "random": 100}
    for name, summary in done.items():
        if name.startswith("tuning/") and "rate-" not in name:
            _, _, label, *seed = name.split("/")
            noise = 0.01 * int(seed[0][-1]) if seed else 0.0
            acc = (1.0 if better else 3.0) if label.startswith("attrsub") else 2.0
            acc = 0.5 if label.startswith("oracle") else acc
            mean = {"acc": acc * 1e-3 + noise * 1e-3, "comp": 0.003, "nc": 0.7, "abs_rel": 0.1 * acc, "delta": 0.9}
            summary["sets"] = {part: {"mean": mean, "skipped": {}} for part in ("test", "cross", "generic")}
            summary["trainable"] = sizes.get(label.split("-")[0], 100)
            summary["blind"] = {"abs_rel": 0.3}
    pair = {"attribute": "texture", "other": "lighting", "median": 0.2, "null_median": 0.6, "null_low": 0.5}
    gap = {"difference": 0.1, "se": 0.01, "n": 5, "verdict": "better" if better else "no difference"}
    energy = {"own": {"mean": 0.5}, "shuffled": {"mean": 0.4}, "gap": gap}
    for variant in variants(study):
        dims = {"texture": {"mean": 2.0, "least": 2, "most": 2}}
        done[f"bases/{variant}"] |= {"dims": dims, "pairs": [pair | {"side": side} for side in ("output", "input")]}
    done["bases/default"] |= {
        "spectra": {"texture": [1.0, 0.1, 0.01]},
        "held_out": {"dim": 2, "folds": 5, "attributes": {"texture": energy}, "random": 0.02},
    }
    done["bases/oracle-human"]["inside"] = {"4": 0.6}
    done["tuning/human/explained"]["inside"] = {"attrsub-4": 0.2, "psv-4": 0.1}
    side = {"within": 0.4, "across": 0.2, "random": 0.05, "z": 3.0}
    done["diagnosis"] |= {"adapters": 4, "rank": 2, "output": side, "input": side}
    header = {"settings": study.record(), "minutes": {"tune": 3.0}, "command": "python benchmarks/mini_study.py"}
    header["model"] = {"name": "tiny", "parameters": 10_000, "aggregator": 5000, "pixels": 32}
    return json.loads(json.dumps(header | collect(study, done)))


def test_the_page_says_what_the_numbers_say() -> None:
    from pages import mini_study as page

    good, bad = page.markdown(made_up(True)), page.markdown(made_up(False))
    assert "mined D=4 | 100 | 1.01 ± 0.01" in good
    assert "mined D=4 | 100 | 3.01 ± 0.01" in bad
    flat = " ".join(good.split())
    assert "With those of another sequence AbsRel is human 1.50 to 3.00 times." in flat
    assert "beyond two standard errors for texture" in flat
    assert "Is the mined basis better than PSV at equal D?** (1 comparison) in domain Acc better 1; AbsRel" in flat
    assert "In none of these comparisons is Acc or AbsRel worse" in flat
    assert "there lies inside: human: mined D=4 20.0 %, PSV D=4 10.0 %." in flat
    assert "AbsRel is: human oracle D=4 5.00 (mined 10.0, PSV 20.0, random 20.0)." in flat
    assert "there lies inside the oracle: human D=4 60.0 %." in flat
    flat = " ".join(bad.split())
    assert "for no attribute beyond two standard errors" in flat
    assert "in domain Acc worse 1" in flat
    assert "in Acc or AbsRel: human mined D=4 (in domain: r = 16" in flat
    assert "default basis, output side: 0 of 1 pairs overlap no more than random" in flat


def test_the_page_draws_the_figures_that_it_shows() -> None:
    pytest.importorskip("matplotlib")
    from pages import mini_study as page

    result = made_up(True)
    figures, text = page.figures(result), page.markdown(result)
    assert set(figures) == {"mini_study_accuracy", "mini_study_basis"}
    assert all(f"(figures/{stem}.png)" in text for stem in figures)
    axes = figures["mini_study_accuracy"].axes
    assert len(axes) == 3
    assert any(len(axis.containers) for axis in axes)
    result["bases"]["default"] = None
    assert set(page.figures(result)) == {"mini_study_accuracy"}
    assert "mini_study_basis" not in page.markdown(result)


# --- the small addition to the training scripts ---------------------------------------------------------------------


def test_lora_a_learns_so_many_times_as_fast() -> None:
    import study
    from accelerate import Accelerator
    from torch import Tensor, nn

    sys.path.insert(0, study.EXAMPLES)
    from training.loop import Loop
    from training.methods import Built
    from training.options import TrainSettings

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, pixel_values: Tensor) -> Tensor:
            return (self.lora_A + self.lora_B).sum() * pixel_values.mean()

    class Found:
        def __init__(self, total: Tensor) -> None:
            self.total, self.terms, self.nonfinite = total, {}, None

    model = Toy()
    built: Any = Built(model, None, {}, dict(model.named_parameters()), None)  # type: ignore[arg-type]
    (whole,) = built.optimizer_groups(1.0)
    assert whole["ratio"] == 1.0 and len(whole["params"]) == 2
    optimizer = torch.optim.SGD(built.optimizer_groups(4.0), lr=1.0)
    groups = {"aggregator": list(model.parameters())}
    loop = Loop(Accelerator(cpu=True), model, optimizer, lambda out, batch: Found(out), groups, lambda step: 0.1)
    loop.step(0, [{"images": torch.ones(1, 1, 3, 2, 2)}])
    torch.testing.assert_close(model.lora_B.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(model.lora_A.detach(), torch.full((3,), 0.6))
    with pytest.raises(ValueError, match="lora-a-ratio"):
        TrainSettings(lora_a_ratio=0.0)
