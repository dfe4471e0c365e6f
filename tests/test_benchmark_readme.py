"""benchmarks/README.md is made from the results by write_readme.py, and says nothing that they do not give."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
OURS = ("vggt", "report", "metrics", "render", "startup", "digits")
DECIMAL = re.compile(r"\d+\.\d+")


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("write_readme")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a copy of the published result of `report`, and no other."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "report.json").write_text((RESULTS / "report.json").read_text())
    return folder


def page(markdown: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(TITLE="Apples, and pears", QUESTION="How many?", markdown=markdown, **more)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in strings(inner)]
    return [value] if isinstance(value, str) else []


def flat(value: Any) -> Any:
    """The value with 7.77 for every number that is not a count."""
    if isinstance(value, dict):
        return {key: flat(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [flat(inner) for inner in value]
    return 7.77 if isinstance(value, float) else value


def test_readme_is_what_the_results_give(writer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = writer.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_every_script_has_a_page_and_every_page_a_script(writer: ModuleType) -> None:
    scripts = {p.stem for p in BENCHMARKS.glob("*.py") if not p.stem.startswith("_")} - {"write_readme"}
    found = {name: page for name, page in writer.found_pages().items() if page is not None}
    assert scripts <= found.keys()
    for name, one in found.items():
        assert (BENCHMARKS / writer.script(name, one)).resolve().is_file()
        assert one.TITLE and one.QUESTION.endswith("?") and "\n" not in one.QUESTION


def test_make_bench_runs_every_script_and_then_writes(writer: ModuleType) -> None:
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    called = re.findall(r"benchmarks/(\w+)\.py", recipe[1])
    scripts = {p.stem for p in BENCHMARKS.glob("*.py") if not p.stem.startswith("_")} - set(writer.APART)
    assert called[-1] == "write_readme" and len(called) == len(set(called)) and scripts <= set(called)


@pytest.mark.parametrize("name", OURS)
def test_no_number_is_written_by_hand(writer: ModuleType, name: str) -> None:
    result = flat(json.loads((RESULTS / f"{name}.json").read_text()))
    text = importlib.import_module(f"pages.{name}").markdown(result)
    # Every measured number is now 7.77, a ratio of two 1.00, 7.8 or 777 %; versions and targets are texts of the JSON.
    allowed = {"7.77", "7.8", "1.00"}.union(*map(DECIMAL.findall, strings(result)))
    found = set(DECIMAL.findall(text))
    assert "7.77" in found and found <= allowed


def test_check_sees_any_change_and_writes_nothing(
    writer: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made" / "README.md"
    where = ["--results", str(results), "--output", str(output)]
    assert writer.main([*where, "--check"]) == 1 and not output.parent.exists()
    assert writer.main(where) == 0 and writer.main([*where, "--check"]) == 0
    made = output.read_text()
    assert made.startswith("<!-- Made by write_readme.py") and "# Benchmarks" in made
    assert not list(output.parent.glob("**/*.partial"))
    # By hand, one letter:
    output.write_text(made.replace("reached", "Reached", 1))
    assert writer.main([*where, "--check"]) == 1
    assert "README.md is not what the results give: run" in capsys.readouterr().err
    # By a new run:
    output.write_text(made)
    result = json.loads((results / "report.json").read_text())
    result["cases"][0]["html_mb"] = 123.456
    (results / "report.json").write_text(json.dumps(result))
    assert writer.main([*where, "--check"]) == 1 and output.read_text() == made
    assert writer.main(where) == 0 and "123 MB" in output.read_text()


def test_a_missing_result_is_said(writer: ModuleType, results: Path) -> None:
    text = " ".join(writer.readme(results).split())
    assert "there is no results/render.json, which `python benchmarks/render.py` writes." in text
    assert "no results/vggt-cuda.json, which `python benchmarks/vggt.py --device cuda` writes." in text
    assert "no results/report.json" not in text
    _, _, demo = text.partition("## The demo on digits")
    assert "`make demo-digits`" in demo


def test_a_result_of_another_form_is_said(
    writer: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((results / "report.json").read_text())
    del result["targets"]
    (results / "report.json").write_text(json.dumps(result))
    text = " ".join(writer.readme(results).split())
    assert "results/report.json was written by an older form of the script (it has no 'targets')" in text
    assert "run `python benchmarks/report.py` again" in capsys.readouterr().err


def test_results_of_other_devices_follow(writer: ModuleType, results: Path) -> None:
    result = json.loads((results / "report.json").read_text())
    result["machine"]["gpu"] = "Some GPU"
    (results / "report-cuda.json").write_text(json.dumps(result))
    section = writer.section("report", writer.found_pages()["report"], results)
    first, second = section.split("### The report, cuda")
    assert "Some GPU" in second and "Some GPU" not in first


def test_figures_are_drawn_checked_and_tidied(
    writer: ModuleType, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    stems = ["apples"]
    apples = page(lambda _: "![apples](figures/apples.png)", figures=lambda _: {stem: Figure() for stem in stems})
    monkeypatch.setattr(writer, "found_pages", lambda: {"report": apples, "render": None})
    output, figures = tmp_path / "made" / "README.md", tmp_path / "made" / "figures"
    figures.mkdir(parents=True)
    (figures / "old.png").write_bytes(b"of a page that is gone")
    where = ["--results", str(results), "--output", str(output)]
    assert writer.main(where) == 0
    assert [path.name for path in figures.iterdir()] == ["apples.png"]
    before = (figures / "apples.png").read_bytes()
    assert writer.main(where) == 0 and (figures / "apples.png").read_bytes() == before
    # Figures are compared by existence: other machines have other fonts.
    (figures / "apples.png").write_bytes(b"drawn elsewhere")
    assert writer.main([*where, "--check"]) == 0
    (figures / "apples.png").unlink()
    assert writer.main([*where, "--check"]) == 1
    for drawn, sentence in (([], "do not draw: apples"), (["apples", "pears"], "do not show: pears")):
        stems[:] = drawn
        with pytest.raises(SystemExit, match=sentence):
            writer.main(where)


def test_contents_link_to_the_sections_and_to_results_that_are_there(writer: ModuleType, results: Path) -> None:
    text = writer.contents({"report": page(str), "fruit": page(str), "soon": None}, results)
    link = "How many? | [Apples, and pears](#apples-and-pears)"
    assert f"| `report.py` | {link}, [JSON](results/report.json) |" in text
    assert f"| `fruit.py` | {link} |" in text
    assert "soon" not in text


@pytest.mark.parametrize(
    ("value", "spelt"),
    [(None, "-"), (0.0, "0"), (7, "7"), (2146592, "2,146,592"), (0.0348, "0.0348"), (5.0049, "5.00"), (99.96, "100"),
     (1117.4, "1,117"), (3.23e-8, "3.2e-8"), (-0.25, "-0.250"), (0.0005, "5e-4"), (100.0, "100")],
)  # fmt: skip
def test_numbers_have_one_spelling(writer: ModuleType, value: float | None, spelt: str) -> None:
    assert importlib.import_module("pages._words").number(value) == spelt
