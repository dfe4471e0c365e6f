"""The page of examples/vggt/demo.py: its words follow the numbers, and it needs no network."""

from __future__ import annotations

import copy
import importlib
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peft_attrsub.evaluation import save_points

from .training_tools import on_path

pytest.importorskip("PIL", reason="the page's pictures need Pillow")

SECTIONS = ["result", "points", "depth", "scenes", "basis", "commands"]
VOID = {"meta", "img", "br", "link", "input"}


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    on_path()
    names = ("plan", "results", "clouds", "page")
    return SimpleNamespace(**{name: importlib.import_module(f"demonstration.{name}") for name in names})


def made_result(
    people: tuple[float, float, float] = (10.0, 8.0, 9.0), scenes: tuple[float, float, float] = (4, 4, 4)
) -> dict[str, Any]:
    """A result in which every number is chosen: errors of the base, the LoRA and the cores."""
    methods = {}
    for number, (method, trainable) in enumerate((("base", 0), ("lora", 200_000), ("cores", 40_000))):
        methods[method] = {"trainable": trainable, "seconds": 30.0 * (number > 0), "steps": 80 * (number > 0)}
        for place, errors in (("people", people), ("scenes", scenes)):
            error = errors[number] * 1e-3
            each = {"0016": error * 0.9, "0017": error * 1.1}
            methods[method][place] = {
                "acc": error,
                "comp": error,
                "nc": 0.5,
                "errors": each,
                "error": error,
                "sequences": 2,
            }
    return {
        "settings": {
            "model": "vggt-mini",
            "scale": "laptop",
            "image_size": 84,
            "why": "A training step takes 0.40 s on this machine: the scale is laptop, about 4 min in all.",
            "speed": {"parameters": 5_000_000, "processor": "a <CPU>", "instructions": "AVX2", "torch": "2.9"},
            "workers": 2,
            "calls": [100.0, 142.4],
        },
        "finished": True,
        "precision": {"name": "fp32", "why": "no native bfloat16"},
        "methods": methods,
        "basis": [{"topic": "Spectra", "headline": "One drop <b>", "text": "A drop & more."}],
        "attributes": ["texture", "geometry", "camera", "lighting"],
        "adapters": 8,
        "steps": [{"name": "a", "title": "a step", "command": "peft-attrsub info 'x<y'", "seconds": 12.0}],
    }


def unfinished() -> dict[str, Any]:
    """A result of which nothing is there yet."""
    result = made_result()
    place = {"acc": math.nan, "comp": math.nan, "nc": math.nan, "errors": {}, "error": math.nan, "sequences": 0}
    for method, values in result["methods"].items():
        values |= {"people": place, "scenes": place}
        if method != "base":
            values |= {"trainable": None, "seconds": None}
    settings = {"model": "vggt-mini", "scale": None, "image_size": 84}
    return result | {"settings": settings, "finished": False, "basis": [], "adapters": 0, "precision": {}, "steps": []}


@pytest.mark.parametrize(
    ("people", "lora", "cores", "against"),
    [
        (
            (10, 8, 8.8),
            "The LoRA learned: .* 20 % less .* 2 of 2",
            "The cores learned: .* 12 % less",
            "cores err by 10 % more",
        ),
        (
            (10, 9, 8),
            "The LoRA learned: .* 10 % less",
            "The cores learned: .* 20 % less",
            "cores err by 11 % less .* 2 of 2",
        ),
        ((10, 12, 10), "The LoRA made held-out people worse: .* 20 % more", "The cores changed little", "17 % less"),
        (
            (10, 10.01, 10.02),
            "The LoRA changed little",
            "The cores changed little",
            "the cores are as good as the LoRA",
        ),
        ((10, float("nan"), 9), "The LoRA: nothing could", "The cores learned", "could not be compared"),
    ],
)
def test_what_is_said_of_people(demo: SimpleNamespace, people: Any, lora: str, cores: str, against: str) -> None:
    said = demo.results.sentences(made_result(people))
    for sentence, expected in zip(said[:3], (lora, cores, against), strict=True):
        assert re.search(expected, sentence), sentence
    assert "40.0 K trainable parameters against the LoRA's 200.0 K" in said[2]


def test_a_mean_that_most_rooms_disagree_with_is_named(demo: SimpleNamespace) -> None:
    result = made_result((10, 9, 8))
    for method, errors in (("lora", (7, 7, 13)), ("cores", (8, 8, 8))):
        people = result["methods"][method]["people"]
        people["errors"] = {f"{number:04d}": error * 1e-3 for number, error in enumerate(errors)}
        people["error"] = sum(errors) / 3 * 1e-3
    assert (
        "less than the LoRA on people (better in 1 of 3 rooms; a few rooms decide)."
        in demo.results.sentences(result)[2]
    )
    assert all("a few rooms decide" in said for said in demo.results.sentences(result)[:3] if "in 1 of 3" in said)
    assert "a few rooms decide" not in " ".join(demo.results.sentences(made_result((10, 9, 8))))
    people["errors"] = {"0000": 8e-3, "0001": 8e-3, "0002": 8e-3, "0003": 6e-3}
    result["methods"]["base"]["people"]["errors"] = {"0000": 7e-3, "0001": 7e-3, "0002": 16e-3, "0003": 10e-3}
    assert "(better in 2 of 4 rooms; a few rooms decide)" in demo.results.sentences(result)[1]


@pytest.mark.parametrize(
    ("scenes", "lora", "cores"),
    [
        ((4, 5, 4.4), "forgot some .* grew by 25 %", "forgot some .* grew by 10 %"),
        ((4, 3, 4), "forgot nothing: .* fell by 25 %", "forgot nothing: .* is within half a percent"),
        ((4, float("nan"), 4.2), "could not be measured", "grew by 5.0 %"),
    ],
)
def test_what_is_said_of_forgetting(demo: SimpleNamespace, scenes: Any, lora: str, cores: str) -> None:
    result = made_result(scenes=scenes)
    said = demo.results.sentences(result)
    assert said[3].startswith("The LoRA") and re.search(lora, said[3])
    assert said[4].startswith("The cores") and re.search(cores, said[4])


def test_no_sentence_stays_when_its_numbers_turn(demo: SimpleNamespace) -> None:
    one, other = (
        demo.results.sentences(made_result(people, scenes))
        for people, scenes in (((10, 8, 9), (4, 5, 3)), ((10, 12, 11), (4, 3, 5)))
    )
    assert [a == b for a, b in zip(one, other, strict=True)] == [False] * 5 + [True]


# --- the page ----------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Checks that tags are closed in order, and gathers sections, text and everything that names an address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.http: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.http.append(values.get("http-equiv") or "")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words += data.replace("\n", " ")


def self_contained(text: str) -> Reader:
    reader = Reader(text)
    assert all(address.startswith("data:image/") or address == "report.html" for address in reader.addresses)
    assert not re.search(r"https?:|url\(|@import|//\w+\.", text.replace("data:image", ""))
    return reader


def a_picture() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def made_pictures(demo: SimpleNamespace, folder: Path) -> dict[str, Any]:
    points = np.random.default_rng(0).normal(size=(50, 3))
    colours = np.full((50, 3), 200, np.uint8)
    for method in ("base", "lora", "cores"):
        save_points(folder / method / "0016-prediction.ply", points, colours)
        save_points(folder / method / "0016-truth.ply", points, colours)
    folders = {method: folder / method for method in ("base", "lora", "cores")}
    data = a_picture()
    return {
        "sheets": dict.fromkeys(demo.plan.ATTRIBUTES, data),
        "panels": dict.fromkeys(folders, data),
        "clouds": demo.clouds.clouds(folders, "0016"),
        "sequence": "0016",
    }


def test_the_page_holds_all_parts_and_no_address(demo: SimpleNamespace, tmp_path: Path) -> None:
    result = made_result()
    reader = self_contained(demo.page.render(result, made_pictures(demo, tmp_path)))
    assert reader.sections == SECTIONS
    assert reader.tags.count("canvas") == 4 and reader.tags.count("img") == 7 and reader.tags.count("tr") == 5
    for sentence in demo.results.sentences(result):
        assert sentence in reader.words
    assert "One drop <b>" in reader.words and "peft-attrsub info 'x<y'" in reader.words
    for fact in ("scale is laptop", "float32 (no native bfloat16)", "a <CPU> (AVX2)", "242 seconds, in 2 runs"):
        assert fact in reader.words
    assert "refresh" not in reader.http and "unfinished" not in reader.words


def test_a_demo_without_pictures_has_a_page(demo: SimpleNamespace) -> None:
    shown = {"sheets": {}, "panels": {}, "clouds": [], "sequence": ""}
    reader = self_contained(demo.page.render(made_result((10, float("nan"), 9)), shown))
    assert reader.sections == ["result", "scenes", "basis", "commands"]


def test_an_unfinished_page_says_what_is_missing_and_grows(demo: SimpleNamespace, tmp_path: Path) -> None:
    """Each part that comes makes a placeholder a picture; the sentences come with the last."""
    shown = made_pictures(demo, tmp_path)
    nothing = {"sheets": {}, "panels": {}, "clouds": [], "sequence": ""}
    status = demo.page.Status(0.126, None, (("scenes & <rooms>", 0.5),))
    reader = self_contained(demo.page.render(unfinished(), nothing, status))
    assert reader.sections == ["progress", *SECTIONS] and reader.http.count("refresh") == 1
    assert "12 %" in reader.words and "scenes & <rooms> 50 %" in reader.words and "unfinished" in reader.words
    assert reader.tags.count("img") == reader.tags.count("canvas") == reader.tags.count("table") == 0

    first = nothing | {"sheets": {"texture": a_picture()}}
    reader = self_contained(demo.page.render(unfinished(), first, demo.page.Status(0.3, 170.0)))
    assert reader.tags.count("img") == 1 and "about 3 min left" in reader.words
    assert "Still to be rendered: geometry, camera, lighting" in reader.words

    result = unfinished()
    result["methods"]["base"] = made_result()["methods"]["base"]
    reader = self_contained(demo.page.render(result, shown, demo.page.Status(0.5, 60.0, (), "It was stopped.")))
    assert "10.000" in reader.words and "It was stopped. The same command continues." in reader.words
    assert "learned" not in reader.words and reader.tags.count("canvas") == 4


def test_the_table_marks_what_is_best_and_says_what_was_forgotten(demo: SimpleNamespace) -> None:
    result = made_result((10, 8, 9), (4, 5, 3))
    rows = re.findall(r"<tr><td>.*?</tr>", demo.page.table(result))
    assert ['class="best">8.000' in row for row in rows] == [False, True, False]
    assert ['class="best">0.300' in row for row in rows] == [False, False, True]
    assert "+25.0 %" in rows[1] and "−25.0 %" in rows[2]
    same = copy.deepcopy(result)
    same["methods"]["lora"]["scenes"] = same["methods"]["base"]["scenes"]
    assert "<td>0.0 %</td>" in demo.page.table(same)


def test_clouds_keep_places_and_colours(demo: SimpleNamespace, tmp_path: Path) -> None:
    import base64

    draw = np.random.default_rng(1)
    truth, colours = draw.uniform(-1, 1, (200, 3)), draw.integers(0, 255, (200, 3), dtype=np.uint8)
    save_points(tmp_path / "x-truth.ply", truth, colours)
    save_points(tmp_path / "x-prediction.ply", truth + np.array([0.5, 0, 0]), np.zeros((200, 3), np.uint8))
    made = demo.clouds.clouds({"base": tmp_path}, "x")
    assert [cloud["label"] for cloud in made] == ["truth", "base"]
    first, second = (np.frombuffer(base64.b64decode(cloud["points"]), "<i2").reshape(-1, 3) / 32767 for cloud in made)
    low, high = np.percentile(truth, (1, 99), axis=0)
    half = (high - low).max() / 2
    np.testing.assert_allclose(second - first, np.broadcast_to([0.5 / (2 * half), 0, 0], first.shape), atol=1e-4)
    np.testing.assert_allclose(first * 2 * half + (low + high) / 2, truth, atol=1e-4)
    # The prediction's own colours are those of its error; the page shows the image's.
    assert made[0]["colours"] == made[1]["colours"] == base64.b64encode(colours.tobytes()).decode()
