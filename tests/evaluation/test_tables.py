"""Rows that survive whatever ends a run, means by hand, and tables that say what they rest on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.evaluation import files, tables
from peft_attrsub.evaluation.markdown import (
    Column,
    depth_columns,
    markdown_table,
    parameters_text,
    point_columns,
    relief_columns,
)
from peft_attrsub.evaluation.tables import ok_row, skipped_row

SETTINGS = {"benchmark": "face", "align": "sim3+icp", "icp_threshold": 0.1, "seed": 42}
NAMES = ["b|theta-5.00_phi0.00_d0.30", "a/scene 1", "A/scene 1", "c", "..", "ü" * 120]


def rows() -> list[tables.Row]:
    return [
        ok_row("b", {"acc": 0.004, "nc": 0.8, "depth_pixels": 10, "abs_rel": 0.1}),
        skipped_row("a", "no valid pixels"),
        ok_row("c", {"acc": 0.002, "nc": 0.9, "depth_pixels": 30, "abs_rel": 0.2, "transparent_acc": 0.01}),
        skipped_row("d", "no valid pixels"),
        skipped_row("e", "prediction not finite"),
    ]


def test_rows_are_found_again_under_any_name_and_in_the_dataset_s_order(tmp_path: Path) -> None:
    assert tables.start_run(tmp_path, SETTINGS) == set()
    for number, name in enumerate(NAMES):
        tables.write_row(tmp_path, ok_row(name, {"acc": float(number)}))
    stored = sorted((tmp_path / "sequences").iterdir())
    assert len({path.name.lower() for path in stored}) == len(NAMES)  # also where case does not count
    assert all(len(path.name) < 200 and path.suffix == ".json" for path in stored)
    assert tables.start_run(tmp_path, SETTINGS) == set(NAMES)
    assert [row["acc"] for row in tables.ordered_rows(tmp_path, NAMES)] == [0, 1, 2, 3, 4, 5]
    assert [row["sequence"] for row in tables.ordered_rows(tmp_path, ["c", "not yet", ".."])] == ["c", ".."]


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=30), st.floats(allow_nan=False, allow_infinity=False)),
        unique_by=lambda pair: pair[0],
        max_size=5,
    )
)
@settings(max_examples=30)
def test_a_csv_gives_back_the_same_rows_bit_for_bit(pairs: list[tuple[str, float]]) -> None:
    import tempfile

    given_rows = [ok_row(name, {"acc": value, "points": 7}) for name, value in pairs]
    given_rows.append(skipped_row('odd, "quoted"\nname', "no valid pixels"))
    with tempfile.TemporaryDirectory() as folder:
        path = tables.write_csv(Path(folder) / "rows.csv", given_rows)
        back = tables.read_csv(path)
    # a CSV knows one kind of line end
    plain = [{**row, "sequence": row["sequence"].replace("\r\n", "\n").replace("\r", "\n")} for row in given_rows]
    back = [{**row, "sequence": row["sequence"].replace("\r\n", "\n").replace("\r", "\n")} for row in back]
    assert back == plain
    assert all(type(row["acc"]) is float and type(row["points"]) is int for row in back if row["status"] == "ok")


def test_columns_are_those_that_any_row_has(tmp_path: Path) -> None:
    text = tables.write_csv(tmp_path / "rows.csv", rows()).read_text()
    assert text.splitlines()[0] == "sequence,status,reason,acc,nc,depth_pixels,abs_rel,transparent_acc"
    assert tables.read_csv(tmp_path / "rows.csv") == rows()


def _work(folder: Path, numbers: list[int]) -> None:
    for number in numbers:
        tables.write_row(folder, ok_row(f"s{number}", {"acc": float(number)}))
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def test_several_processes_write_and_one_that_is_killed_loses_no_row(tmp_path: Path) -> None:
    tables.start_run(tmp_path, SETTINGS)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, list(range(first, 12, 2)))) for first in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert workers[1].exitcode == -signal.SIGKILL
    assert tables.start_run(tmp_path, SETTINGS) == {f"s{n}" for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)}
    summary = tables.finish_run(tmp_path, [f"s{n}" for n in range(12)])
    assert (summary["n_evaluated"], summary["n_missing"]) == (10, 2)


def test_a_write_that_fails_leaves_the_old_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tables.write_row(tmp_path, ok_row("s", {"acc": 1.0}))
    with monkeypatch.context() as patch:

        def fails(*_: object) -> None:
            raise OSError("the disk is full")

        patch.setattr(files.os, "replace", fails)
        with pytest.raises(OSError, match="full"):
            tables.write_row(tmp_path, ok_row("s", {"acc": 2.0}))
    assert tables.read_rows(tmp_path)["s"]["acc"] == 1.0 and list(path.parent.iterdir()) == [path]
    # what a killed writer leaves beside is not read
    (path.parent / ".s.json.abc.tmp").write_text('{"sequ')
    assert set(tables.read_rows(tmp_path)) == {"s"}


def test_files_are_as_readable_as_the_user_s_others(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = tables.write_row(tmp_path, ok_row("s", {"acc": 1.0}))
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_run_continues_only_under_its_own_settings(tmp_path: Path) -> None:
    tables.start_run(tmp_path, {**SETTINGS, "frames": (1, 2)})
    tables.start_run(tmp_path, {**SETTINGS, "frames": [1, 2]})
    with pytest.raises(ValueError, match=r"icp_threshold = 0\.1, and this one has 0\.2"):
        tables.start_run(tmp_path, {**SETTINGS, "frames": [1, 2], "icp_threshold": 0.2})
    with pytest.raises(ValueError, match="frames"):
        tables.start_run(tmp_path, SETTINGS)
    (tmp_path / "run.json").unlink()
    tables.write_row(tmp_path, ok_row("s", {"acc": 1.0}))
    with pytest.raises(ValueError, match=r"rows but no run\.json"):
        tables.start_run(tmp_path, SETTINGS)
    with pytest.raises(FileNotFoundError, match="start_run"):
        tables.finish_run(tmp_path, ["s"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"status": "ok", "acc": 1.0}, "names no sequence"),
        ({"sequence": "s", "status": "done", "acc": 1.0}, "status 'done'"),
        ({"sequence": "s", "status": "ok"}, "no metrics"),
        ({"sequence": "s", "status": "ok", "acc": float("nan")}, "acc of s is nan"),
        ({"sequence": "s", "status": "ok", "acc": float("inf")}, "acc of s is inf"),
        ({"sequence": "s", "status": "ok", "acc": None}, "acc of s is None"),
        ({"sequence": "s", "status": "ok", "acc": True}, "acc of s is True"),
        ({"sequence": "s", "status": "skipped"}, "needs a reason"),
        ({"sequence": "s", "status": "skipped", "reason": "why", "acc": 0.0}, "no metrics"),
    ],
)
def test_rows_that_mean_nothing_are_never_stored(tmp_path: Path, row: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tables.write_row(tmp_path, row)
    assert not (tmp_path / "sequences").exists()


def test_numbers_of_numpy_become_plain_ones(tmp_path: Path) -> None:
    tables.write_row(tmp_path, ok_row("s", {"acc": np.float32(0.5), "points": np.int64(3)}))
    row = tables.read_rows(tmp_path)["s"]
    assert row["acc"] == 0.5 and type(row["points"]) is int


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tables.write_row(tmp_path, ok_row("s", {"acc": 1.0}))
    for text, words in (("{", "not readable JSON"), ("[]", "holds no record"), ('{"sequence": "s"}', "is no row")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            tables.read_rows(tmp_path)
        assert str(path) in str(caught.value)
    table = tmp_path / "rows.csv"
    for text, words in (("name,acc\n", "has columns"), ("sequence,status,reason,acc\ns,ok,,x\n", "no number")):
        table.write_text(text)
        with pytest.raises(ValueError, match=words):
            tables.read_csv(table)


def test_means_weigh_sequences_alike_and_skipped_ones_are_counted_with_reasons() -> None:
    summary = tables.summarise(rows(), SETTINGS, names=["b", "a", "c", "d", "e", "f"])
    assert summary["metrics"]["acc"] == pytest.approx(0.003) and summary["metrics"]["nc"] == pytest.approx(0.85)
    assert summary["metrics"]["transparent_acc"] == 0.01
    assert summary["counts"]["acc"] == 2 and summary["counts"]["transparent_acc"] == 1
    assert (summary["n_sequences"], summary["n_evaluated"], summary["n_skipped"], summary["n_missing"]) == (6, 2, 3, 1)
    assert summary["skipped_reasons"] == {"no valid pixels": 2, "prediction not finite": 1}
    assert summary["skipped"]["e"] == "prediction not finite" and summary["settings"] == SETTINGS


def test_a_metric_can_be_weighted_by_another_as_the_release_does_with_pixels() -> None:
    summary = tables.summarise(rows(), SETTINGS, weights={"abs_rel": "depth_pixels"})
    assert summary["metrics"]["abs_rel"] == pytest.approx((10 * 0.1 + 30 * 0.2) / 40)
    assert summary["metrics"]["acc"] == pytest.approx(0.003)
    with pytest.raises(ValueError, match="weighted by points"):
        tables.summarise(rows(), SETTINGS, weights={"abs_rel": "points"})


def test_where_all_is_skipped_there_is_no_number_at_all() -> None:
    summary = tables.summarise([skipped_row("a", "no valid pixels")], SETTINGS)
    assert summary["metrics"] == {} and summary["n_evaluated"] == 0
    assert "| – | – |" in markdown_table([summary], depth_columns())


def test_a_summary_needs_its_alignment_and_counts_no_sequence_twice() -> None:
    with pytest.raises(ValueError, match="align"):
        tables.summarise(rows(), {"seed": 1})
    with pytest.raises(ValueError, match="b has two rows"):
        tables.summarise([*rows(), rows()[0]], SETTINGS)


def test_a_finished_run_is_a_csv_and_a_summary_that_can_be_read(tmp_path: Path) -> None:
    tables.start_run(tmp_path, SETTINGS)
    for row in rows():
        tables.write_row(tmp_path, row)
    made = tables.finish_run(tmp_path, list("abcde"), label="base", trainable_parameters=0)
    assert made == tables.read_summary(tmp_path) == tables.read_summary(tmp_path / "summary.json")
    assert made == json.loads((tmp_path / "summary.json").read_text()) and made["label"] == "base"
    assert [row["sequence"] for row in tables.read_csv(tmp_path / "sequences.csv")] == list("abcde")
    with pytest.raises(FileNotFoundError, match="give a run that has ended"):
        tables.read_summary(tmp_path / "sequences")
    with pytest.raises(ValueError, match="no summary"):
        tables.read_summary(tmp_path / "run.json")


def summary(label: str, count: int | None, acc: float, nc: float, **more: object) -> dict[str, object]:
    row = ok_row("s", {"acc": acc, "comp": 0.0035, "nc": nc})
    run: dict[str, object] = {**tables.summarise([row], {**SETTINGS, **more})}
    return {**run, "label": label, "trainable_parameters": count}


def test_several_runs_in_one_table_in_the_paper_s_units() -> None:
    runs = [
        summary("VGGT", 0, 0.009006, 0.8074),
        summary("LoRA | r16", 16_336_000, 0.005767, 0.86651),
        summary("ours", 3_800_000, 0.0038311, 0.86649),
    ]
    assert markdown_table(runs, point_columns(1e-3)) == (
        "| Method | Trainable | Acc (×1e-3) ↓ | Comp (×1e-3) ↓ | NC (%) ↑ |\n"
        "|---|--:|--:|--:|--:|\n"
        "| VGGT | 0 | 9.006 | **3.500** | 80.74 |\n"
        "| LoRA \\| r16 | 16.3 M | 5.767 | **3.500** | **86.65** |\n"
        "| ours | 3.8 M | **3.831** | **3.500** | **86.65** |\n"
        "\n"
        "All runs: benchmark = face; align = sim3+icp; icp_threshold = 0.1; mean over sequences; "
        "1 of 1 sequences evaluated.\n"
    )


def test_runs_that_rest_on_different_settings_are_not_passed_off_as_comparable() -> None:
    table = markdown_table(
        [summary("a", 1, 0.1, 0.5), summary("b", None, 0.2, 0.5, align="sim3")], point_columns(1e-2)
    )
    assert "- a: benchmark = face; align = sim3+icp;" in table and "- b: benchmark = face; align = sim3;" in table
    assert "compare them with care" in table and "| b | – |" in table and "(×1e-2)" in table


def test_inverted_depth_is_said_under_the_table() -> None:
    """And it makes no two runs incomparable: it is a result, not a setting."""
    runs = []
    for label, shares in (("upright", (0.0, 0.0)), ("turned", (0.0, 1.0)), ("half", (0.5, 0.0))):
        done = [ok_row(str(n), {"abs_rel": 0.1, "delta": 1.0, "depth_inverted": x}) for n, x in enumerate(shares)]
        runs.append({**tables.summarise(done, SETTINGS), "label": label})
    table = markdown_table(runs, depth_columns())
    assert "- turned: **the fitted scale of depth is negative in 50.0 % of the frames**" in table
    assert "- half: **the fitted scale of depth is negative in 25.0 % of the frames**" in table
    assert "- upright" not in table and "compare them with care" not in table
    assert "negative" not in markdown_table(runs[:1], depth_columns())


def test_skipped_sequences_stand_under_the_table() -> None:
    run = {**tables.summarise(rows(), SETTINGS, names=list("abcdefg")), "label": "x"}
    table = markdown_table([run], (*point_columns(1e-2, "transparent_"), *relief_columns()))
    assert "2 of 7 sequences evaluated, 3 skipped (2 no valid pixels, 1 prediction not finite), 2 missing." in table
    assert "Acc transparent (×1e-2) ↓" in table and "Relief / width (%) |" in table and "| 1.000 |" in table
    with pytest.raises(ValueError, match="no run"):
        markdown_table([], depth_columns())


def test_a_column_without_a_best_value_has_no_bold() -> None:
    table = markdown_table([summary("a", 1, 0.1, 0.5), summary("b", 1, 0.2, 0.5)], [Column("acc", "Acc", best=None)])
    assert "**" not in table and "| Acc |" in table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (73_728, "73.7 K"),
        (999_999, "1.0 M"),
        (16_336_000, "16.3 M"),
        (1_157_000_000, "1.16 B"),
    ],
)
def test_numbers_of_parameters_for_people(count: int | None, text: str) -> None:
    assert parameters_text(count) == text
