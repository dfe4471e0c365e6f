"""Names of runs in tables: short where that is enough, and never equal where the paths differ."""

from __future__ import annotations

from pathlib import PurePath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_attrsub.basis import naming
from peft_attrsub.evaluation.labels import OUTPUTS, run_label, run_labels, summary_labels

#: Few words, so that paths share most of their parts, and the outputs of finetune.py among them.
WORDS = st.sampled_from(["a", "b", "lora", "..", "VGGT-1B", *OUTPUTS])
PATHS = st.tuples(st.sampled_from(["", "/", "./"]), st.lists(WORDS, min_size=1, max_size=4)).map(
    lambda pair: pair[0] + "/".join(pair[1])
)


@given(st.lists(PATHS, max_size=8))
@example(["a/lora/adapter", "b/lora/adapter", "lora/adapter", "lora", "/lora", "lora/best", "best", "adapter/best"])
def test_labels_are_equal_exactly_where_paths_are(paths: list[str]) -> None:
    labels = run_labels(paths)
    assert [[a == b for b in labels] for a in labels] == [[PurePath(a) == PurePath(b) for b in paths] for a in paths]
    for path, label in zip(paths, labels, strict=True):
        # Words of the path in their order, nothing made up.
        words = iter(PurePath(path).parts)
        assert all(word in words for word in PurePath(label).parts)


@given(st.lists(st.tuples(PATHS, PATHS), max_size=6, unique_by=lambda pair: PurePath(pair[1])), st.data())
def test_no_two_rows_of_a_table_have_one_name(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    """Evaluations of any adapters, some twice, under labels of their own or not, each in a folder of its own."""
    summaries = []
    for adapter, _ in pairs:
        by_hand = data.draw(st.sampled_from([None, "LoRA", "lora"]))
        summaries.append({"label": by_hand or run_label(adapter), "adapter": adapter})
    labels = summary_labels(summaries, [out for _, out in pairs])
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/lora/adapter", "runs/cores/adapter"], ["lora", "cores"]),
        (["runs/lora/adapter", "runs/full/model", "facebook/VGGT-1B"], ["lora", "full", "VGGT-1B"]),
        (["people/lora/adapter", "faces/lora/adapter", "faces/cores/best"], ["people/lora", "faces/lora", "cores"]),
        (["runs/lora/adapter", "runs/lora/best"], ["lora/adapter", "lora/best"]),
        (["adapters/texture_00", "adapters/texture_01"], ["texture_00", "texture_01"]),
        (["adapter"], ["adapter"]),
        (["/adapter", "/srv/x/adapter"], ["adapter", "x"]),
    ],
)
def test_a_run_is_called_by_its_folder(paths: list[str], labels: list[str]) -> None:
    assert run_labels(paths) == labels


def test_both_rooms_know_the_same_outputs() -> None:
    """Rooms do not import each other, so that this is written twice."""
    assert naming.OUTPUTS == OUTPUTS


def test_a_label_by_hand_stands_and_the_folder_of_the_evaluation_tells_equal_ones_apart() -> None:
    def summary(label: str, adapter: str | None = None) -> dict:
        return {"label": label, "adapter": adapter, "settings": {"model": "vggt-mini"}}

    # "adapter" is what earlier versions called every run.
    found = [summary("adapter", "x/a/adapter"), summary("adapter", "x/b/adapter"), summary("vggt-mini")]
    assert summary_labels(found, ["e/1", "e/2", "e/3"]) == ["a", "b", "vggt-mini"]
    found = [summary("mine", "x/a/adapter"), summary("a", "x/a/adapter"), summary("a", "x/a/adapter")]
    assert summary_labels(found, ["e/1", "e/2", "f/2"]) == ["mine", "a (e/2)", "a (f/2)"]
