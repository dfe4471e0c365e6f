"""write_report without a browser: what the file holds, what can never be in it, how it is written, what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from peft_attrsub.analysis import analyse, write_report
from peft_attrsub.basis import BasisError

from .helpers import layered_basis
from .synthetic import synthetic

HOSTILE = '</script><img src=x onerror="alert(1)"><b>bold</b>\u2028& "quoted"'
TOY: dict[str, Any] = {
    "depths": 2,
    "stacks": ("enc",),
    "kinds": ("qkv",),
    "adapters": 2,
    "rank": 2,
    "dim": 2,
    "muted": (),
}


def embedded(page: str) -> dict[str, Any]:
    """The analysis inside a page, read as a browser would: up to the first end of the element."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def findings(page: str) -> str:
    """The text of the findings at the top, without markup."""
    part = page.partition('<section id="findings"')[2].partition("</section>")[0]
    return re.sub(r"\s+", " ", unescape(re.sub("<[^>]+>", " ", part)))


def without_plotly(page: str) -> str:
    """The page less its largest script, which is plotly's own text."""
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


@pytest.fixture(scope="module")
def vggt_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(synthetic(), tmp_path_factory.mktemp("report") / "report.html")


def test_a_report_of_vggt_size_is_one_file_under_ten_megabytes(vggt_page: Path) -> None:
    assert vggt_page.stat().st_size < 10_000_000
    assert [path.name for path in vggt_page.parent.iterdir()] == ["report.html"]


def test_the_page_holds_the_whole_analysis(vggt_page: Path) -> None:
    held = embedded(vggt_page.read_text(encoding="utf-8"))
    data = synthetic()
    assert {key: held[key] for key in data} == data


def test_a_real_analysis_is_taken_as_it_is(tmp_path: Path) -> None:
    analysis = analyse(layered_basis(3, "by layer"), draws=20)
    path = write_report(analysis, tmp_path / "r.html")
    held = embedded(path.read_text(encoding="utf-8"))
    wanted = analysis.to_dict()
    assert {key: held[key] for key in wanted} == wanted
    assert "Most overlap: texture and geometry, 0.00" in findings(path.read_text(encoding="utf-8"))


def test_the_page_fetches_nothing(vggt_page: Path) -> None:
    page = without_plotly(vggt_page.read_text(encoding="utf-8"))
    # The namespace of SVG is a name, not an address that is fetched.
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"')]*", re.sub(r"(?m)^\s*//.*$", "", page)) == [
        "http://www.w3.org/2000/svg"
    ]
    assert not re.search(r"<(?:link|iframe|object|embed|base)\b|@import|url\(|\bfetch\(|XMLHttpRequest", page)
    assert re.findall(r'\b(?:src|href)="([^"]*)"', page) == ["#layers"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert {source for rule in rules.values() for source in rule.split()} <= {
        "'none'",
        "'unsafe-inline'",
        "data:",
        "blob:",
    }


def test_no_script_of_ours_writes_markup(vggt_page: Path) -> None:
    page = without_plotly(vggt_page.read_text(encoding="utf-8"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page)


def test_hostile_names_cannot_leave_their_place(tmp_path: Path) -> None:
    data = synthetic(attributes=(HOSTILE, "b"), **TOY)
    data["basis"] |= {"base_model": HOSTILE, "source": HOSTILE, "command": HOSTILE}
    data["modules"][0]["kind"] = HOSTILE
    data["adapters"][0] |= {"adapter": HOSTILE, "muted": True}
    page = write_report(data, tmp_path / "r.html", title=HOSTILE).read_text(encoding="utf-8")
    assert embedded(page)["basis"]["attributes"][0] == HOSTILE
    assert embedded(page)["modules"][0]["kind"] == HOSTILE
    assert "<img" not in without_plotly(page)
    assert "<b>bold" not in page
    assert page.count("\u2028") == page.partition('id="data"')[0].count("\u2028")


def test_a_name_that_looks_like_a_placeholder_stays_a_name(tmp_path: Path) -> None:
    data = synthetic(attributes=("{{plotly}}", "b"), **TOY)
    page = write_report(data, tmp_path / "r.html", title="{{style}}").read_text(encoding="utf-8")
    assert "<h1>{{style}}</h1>" in page
    assert embedded(page)["basis"]["attributes"][0] == "{{plotly}}"


def test_numbers_that_json_lacks_become_missing(tmp_path: Path) -> None:
    data = synthetic(**TOY)
    data["spectra"][0]["gap"] = math.inf
    data["spectra"][0]["singular_values"][0] = math.nan
    page = write_report(data, tmp_path / "r.html").read_text(encoding="utf-8")
    assert embedded(page)["spectra"][0]["gap"] is None
    assert embedded(page)["spectra"][0]["singular_values"][0] is None


def test_the_findings_say_pattern_energy_overlap_and_the_muted_adapter(vggt_page: Path) -> None:
    text = findings(vggt_page.read_text(encoding="utf-8"))
    data = synthetic()
    patterns = [s["pattern"] for s in data["spectra"]]
    assert f"One drop at the adapters' rank in {100 * patterns.count('at-rank') / len(patterns):.0f} %" in text
    assert "16 directions keep" in text
    closest = min(data["pairs"], key=lambda pair: pair["median"])
    assert (
        f"Most overlap: {closest['attribute']} and {closest['other']}, {closest['median']:.2f} (random 0.80)" in text
    )
    assert "More overlap than random subspaces (0.80, 95 % band 0.78–0.81) and mismatched layers" in text
    assert "1 of 40 adapters is muted" in text
    assert "adapters/lighting-3 (lighting, in 100 % of its modules)" in text


@pytest.mark.parametrize(
    ("median", "said"),
    [
        (0.5, "More overlap than random subspaces"),
        (0.8, "As much overlap as random subspaces"),
        (0.9, "Less overlap than random subspaces"),
    ],
)
def test_the_overlap_is_judged_by_its_null(tmp_path: Path, median: float, said: str) -> None:
    data = synthetic(attributes=("a", "b"), **TOY)
    data["pairs"] = [pair | {"median": median} for pair in data["pairs"]]
    page = write_report(data, tmp_path / "r.html").read_text(encoding="utf-8")
    assert said in findings(page)


def test_different_verdicts_of_the_two_nulls_are_both_said(tmp_path: Path) -> None:
    data = synthetic(attributes=("a", "b"), **TOY)
    data["pairs"] = [pair | {"median": 0.72} for pair in data["pairs"]]
    text = findings(write_report(data, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "More overlap than random subspaces" in text
    assert "as much overlap as mismatched layers" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attributes": ("only",)}, "A basis of one attribute has no pairs."),
        ({"stored": ("texture", "geometry", "camera", "lighting")}, "This basis was not mined from adapters"),
        ({"empty": ("qkv",)}, "No module has two attributes"),
        ({}, "None of 8 adapters is muted"),
    ],
)
def test_a_basis_that_lacks_something_says_so(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    page = write_report(synthetic(**TOY | changes), tmp_path / "r.html").read_text(encoding="utf-8")
    assert said in findings(page)


def test_the_title_names_the_basis_unless_one_is_given(tmp_path: Path) -> None:
    data = synthetic(**TOY)
    path = tmp_path / "r.html"
    assert "<title>Basis studio/vggt-attributes</title>" in write_report(data, path).read_text(encoding="utf-8")
    page = write_report(data, path, title="Cats & dogs").read_text(encoding="utf-8")
    assert "<title>Cats &amp; dogs</title>" in page


def test_an_existing_report_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    assert write_report(synthetic(**TOY), str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BasisError, match="No space left"):
        write_report(synthetic(**TOY), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(BasisError, match="is a folder: give the name of a file to write"):
        write_report(synthetic(**TOY), tmp_path)


def test_the_folder_of_the_target_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BasisError, match=r"'.*missing' does not exist: make it"):
        write_report(synthetic(**TOY), tmp_path / "missing" / "r.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", [None, 3, {"format": 1}])
def test_something_else_is_no_analysis(tmp_path: Path, what: Any) -> None:
    with pytest.raises(BasisError, match="made of an Analysis or its to_dict"):
        write_report(what, tmp_path / "r.html")


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(BasisError, match=r'pip install "peft-attrsub\[report\]"'):
        write_report(synthetic(**TOY), tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
