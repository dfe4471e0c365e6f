"""The report in a real browser: what a person sees, clicks and types, in light and dark, wide and narrow.

Every page is watched: an error on its console, an uncaught exception or a request for anything but the file itself
fails the test that opened it.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_attrsub.analysis import analyse, write_report

from .helpers import layered_basis
from .synthetic import synthetic

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
expect = sync_api.expect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SMALL: dict[str, Any] = {
    "depths": 6,
    "stacks": ("enc",),
    "kinds": ("qkv", "fc1"),
    "adapters": 3,
    "rank": 4,
    "dim": 4,
    "muted": ("lighting-1",),
}
HOSTILE = '</script><img src=x onerror="window.hit=1"><b>bold</b><a href="javascript:window.hit=1">x</a>&amp;%{x}'

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small report that most tests open: 12 modules, 4 attributes."""
    return write_report(synthetic(**SMALL), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a file in a page of its own; at the end of the test nothing may have gone wrong in any of them."""
    problems: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1400, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce", **settings)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else 0
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if foreign(request.url, path) else None)
        page.goto(path.as_uri())
        page.locator("#maps .main-svg").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def foreign(url: str, path: Path) -> bool:
    return url != path.as_uri() and not url.startswith(("data:", "blob:"))


def cell(page: Any, attribute: int, row: int, column: int) -> tuple[float, float]:
    """The middle of a heat map's cell, in pixels of the window, from plotly's own axes."""
    box = page.locator("#maps .grid").nth(attribute)
    box.scroll_into_view_if_needed()
    place = box.evaluate(
        """(box, [row, column]) => {
            const { xaxis, yaxis, margin } = box._fullLayout;
            const corner = box.getBoundingClientRect();
            return [corner.left + margin.l + xaxis.l2p(column), corner.top + margin.t + yaxis.l2p(row)];
        }""",
        [row, column],
    )
    return place[0], place[1]


def points(page: Any, chart: str) -> list[dict[str, Any]]:
    """What a chart draws: x, y and mode of its traces."""
    page.locator(f"{chart} .main-svg").first.wait_for()
    return page.locator(chart).evaluate("box => box.data.map(({ x, y, mode }) => ({ x, y, mode }))")


@contextmanager
def changes(page: Any, chart: str) -> Iterator[None]:
    """What happens inside draws this chart anew."""
    page.locator(chart).evaluate("box => { box.layout.old = true; }")
    yield
    page.wait_for_function("chart => !document.querySelector(chart).layout.old", arg=chart)


def test_a_click_on_a_cell_shows_that_modules_spectra(opened: Open, report: Path) -> None:
    page = opened(report)
    page.mouse.click(*cell(page, attribute=1, row=1, column=4))
    expect(page.locator("#module-name")).to_have_text("aggregator.enc_blocks.4.mlp.fc1")
    expect(page.locator("#live")).to_have_text("Showing aggregator.enc_blocks.4.mlp.fc1")
    expect(page.locator("#module-select")).to_have_value("aggregator.enc_blocks.4.mlp.fc1")
    data = synthetic(**SMALL)
    wanted = [s["singular_values"] for s in data["spectra"] if s["module"] == "aggregator.enc_blocks.4.mlp.fc1"]
    drawn = [trace["y"] for trace in points(page, "#spectrum")]
    assert all(values in drawn for values in wanted)
    rows = page.locator("#module-table tbody tr")
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == ["texture", "geometry", "camera", "lighting"]


def test_a_heat_map_is_walked_with_the_arrow_keys(opened: Open, report: Path) -> None:
    page = opened(report)
    page.locator("#quantity").focus()
    page.keyboard.press("Tab")
    grid = page.locator("#maps .grid").first
    expect(grid).to_be_focused()
    # The walk starts at the module shown, the middle layer of the first kind.
    expect(page.locator("#live")).to_contain_text("aggregator.enc_blocks.3.attn.qkv")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#live")).to_have_text(re.compile(r"aggregator\.enc_blocks\.4\.mlp\.fc1, texture: [\w-]+"))
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#live")).to_contain_text("aggregator.enc_blocks.5.mlp.fc1")
    page.keyboard.press("Enter")
    expect(page.locator("#module-name")).to_have_text("aggregator.enc_blocks.5.mlp.fc1")
    expect(grid).to_be_focused()
    assert grid.evaluate("box => getComputedStyle(box).outlineStyle") == "solid"


def test_the_module_is_chosen_from_the_list_too(opened: Open, report: Path) -> None:
    page = opened(report)
    page.select_option("#module-select", "aggregator.enc_blocks.0.mlp.fc1")
    expect(page.locator("#module-name")).to_have_text("aggregator.enc_blocks.0.mlp.fc1")


def test_all_layers_of_a_kind_are_drawn_together(opened: Open, report: Path) -> None:
    page = opened(report)
    with changes(page, "#spectrum"):
        page.check("#all-layers")
    page.select_option("#all-layers-attribute", "camera")
    expect(page.locator("#spectrum-title")).to_have_text("Singular values of C: camera, qkv, all layers")
    data = synthetic(**SMALL)
    wanted = [s["singular_values"] for s in data["spectra"] if s["attribute"] == "camera" and "qkv" in s["module"]]
    assert [trace["y"] for trace in points(page, "#spectrum")] == wanted


def test_eigenvalues_stand_beside_the_band_of_random_subspaces(opened: Open, report: Path) -> None:
    page = opened(report)
    data = synthetic(**SMALL)
    for side in ("output", "input"):
        page.select_option("#angles-side", side)
        traces = [trace["y"] for trace in points(page, "#angles")]
        assert [data["nulls"][0][part] for part in ("low", "high", "mean")] == traces[:3]
        module = page.locator("#module-name").inner_text()
        wanted = [o["eigenvalues"] for o in data["overlaps"] if o["module"] == module and o["side"] == side]
        assert traces[3:] == wanted
    page.select_option("#angles-of", "camera")
    page.wait_for_function("() => document.querySelector('#angles').data.length === 3 + 3")


def heat(page: Any, attribute: int) -> list[list[float]]:
    return page.locator("#maps .grid").nth(attribute).evaluate("box => box.data[0].z")


def test_a_quantity_is_chosen_and_hover_says_its_null(opened: Open, report: Path) -> None:
    page = opened(report)
    page.select_option("#quantity", "eigenvalue")
    page.select_option("#other", "camera")
    page.select_option("#layers-side", "input")
    data = synthetic(**SMALL)
    name = "aggregator.enc_blocks.2.attn.qkv"
    (wanted,) = (
        o
        for o in data["overlaps"]
        if (o["module"], o["attribute"], o["other"], o["side"]) == (name, "texture", "camera", "input")
    )
    assert heat(page, 0)[0][2] == wanted["smallest"]
    assert heat(page, 2)[0][2] is None, "an attribute is not compared with itself"
    page.mouse.move(*cell(page, attribute=0, row=0, column=2))
    hover = page.locator("#maps .hovertext")
    expect(hover).to_contain_text(name)
    expect(hover).to_contain_text(f"texture – camera, input side: {wanted['smallest']:.2f}")
    expect(hover).to_contain_text("random subspaces: 0.80 (0.78–0.81)")
    expect(hover).to_contain_text("mismatched layers: 0.75 (0.69–0.80)")
    page.select_option("#other", "")
    least = min(
        o["smallest"]
        for o in data["overlaps"]
        if o["module"] == name and o["side"] == "input" and "texture" in (o["attribute"], o["other"])
    )
    assert heat(page, 0)[0][2] == least


def test_every_quantity_has_one_scale_for_all_attributes(opened: Open, report: Path) -> None:
    page = opened(report)
    spectra = synthetic(**SMALL)["spectra"]
    for quantity, name, logarithmic in [
        ("gap", "gap", True),
        ("energy", "energy_at_dim", False),
        ("captured", "captured_energy", False),
        ("suggested", "suggested_dim", False),
        ("largest", "largest", True),
    ]:
        page.select_option("#quantity", quantity)
        ranges = page.locator("#maps .grid").evaluate_all("all => all.map(({ data }) => [data[0].zmin, data[0].zmax])")
        values = [math.log10(s[name]) if logarithmic else s[name] for s in spectra]
        assert ranges == [pytest.approx([min(values), max(values)])] * 4, quantity
        first = [
            v for s, v in zip(spectra, values, strict=True) if s["attribute"] == "texture" and "qkv" in s["module"]
        ]
        assert heat(page, 0)[0] == pytest.approx(first), quantity
        expect(page.locator("#layers-legend .ends span")).to_have_count(3 if min(values) < max(values) else 1)


def test_filters_reach_every_part_below(opened: Open, report: Path) -> None:
    page = opened(report)
    page.get_by_role("group", name="Attributes").get_by_role("checkbox", name="lighting").uncheck()
    page.get_by_role("group", name="Kinds").get_by_role("checkbox", name="fc1").uncheck()
    page.fill("#depth-from", "2")
    page.keyboard.press("Enter")
    expect(page.locator("#filter-count")).to_have_text("4 of 12 modules")
    expect(page.locator("#maps h3")).to_have_count(3)
    assert len(heat(page, 0)) == 1 and len(heat(page, 0)[0]) == 4
    assert page.locator("#module-select option").count() == 4
    expect(page.locator("#depth-facets h3")).to_have_text(["qkv"])
    expect(page.locator("#overlap-tables tbody tr")).to_have_count(4)
    expect(page.locator("#adapters-table tbody tr")).to_have_count(9)
    expect(page.locator("#explained-table tbody tr")).to_have_count(4)
    data = synthetic(**SMALL)
    kept = {f"aggregator.enc_blocks.{depth}.attn.qkv" for depth in range(2, 6)}
    smallest = sorted(
        o["smallest"]
        for o in data["overlaps"]
        if o["module"] in kept and (o["attribute"], o["other"], o["side"]) == ("texture", "geometry", "output")
    )
    median = (smallest[1] + smallest[2]) / 2
    expect(page.locator("#overlap-tables strong").first).to_have_text(f"{median:.2f}")
    rows = [row for row in data["explained"][0]["modules"] if row["module"] in kept]
    share = sum(row["norm"] * row["joint"] for row in rows) / sum(row["norm"] for row in rows)
    assert points(page, "#explained-bars")[0]["x"][-1] == pytest.approx(share)
    weights = [s["weights"][0] for s in data["spectra"] if s["module"] in kept and s["attribute"] == "texture"]
    cells = page.locator("#adapters-table tbody tr").first.locator("td").all_inner_texts()
    shown = (statistics.median(weights), min(weights), max(weights))
    assert [cells[1], *cells[3:5]] == [f"{value:.2f}" for value in shown]
    page.click("#filter-reset")
    expect(page.locator("#filter-count")).to_have_text("12 of 12 modules")
    expect(page.locator("#maps h3")).to_have_count(4)


def test_the_depth_filter_keeps_its_ends_in_order_and_in_range(opened: Open, report: Path) -> None:
    page = opened(report)
    ends = page.locator("#depth-from"), page.locator("#depth-to")
    for end, typed, wanted in [(0, "99", "5 5"), (1, "2", "2 2"), (0, "", "0 2"), (1, "", "0 5"), (1, "-3", "0 0")]:
        ends[end].fill(typed)
        page.keyboard.press("Tab")
        assert " ".join(one.input_value() for one in ends) == wanted
    expect(page.locator("#filter-count")).to_have_text("2 of 12 modules")


def test_a_filter_that_leaves_nothing_says_so(opened: Open, report: Path) -> None:
    page = opened(report)
    page.get_by_role("group", name="Kinds").get_by_role("button").click()
    expect(page.locator("#maps")).to_have_text("Nothing matches the filters.")
    expect(page.locator("#module-name")).to_have_text("No module matches the filters.")
    expect(page.locator("#depth-facets")).to_have_text("No layers to show.")
    expect(page.locator("#overlap-tables")).to_have_text("No pair of attributes to compare.")
    page.get_by_role("group", name="Kinds").get_by_role("button").click()
    expect(page.locator("#maps .grid")).to_have_count(4)


def test_a_hidden_module_gives_way_to_one_that_is_shown(opened: Open, report: Path) -> None:
    page = opened(report)
    expect(page.locator("#module-name")).to_have_text("aggregator.enc_blocks.3.attn.qkv")
    page.get_by_role("group", name="Kinds").get_by_role("checkbox", name="qkv").uncheck()
    expect(page.locator("#module-name")).to_have_text("aggregator.enc_blocks.3.mlp.fc1")


def test_adapters_are_sorted_by_their_headers(opened: Open, report: Path) -> None:
    page = opened(report)
    names = page.locator("#adapters-table tbody th")
    expect(page.locator("#adapters-table .badge")).to_have_count(1)
    page.get_by_role("button", name="Weight").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Weight")).to_be_focused()
    expect(names.first).to_have_text("adapters/lighting-1")
    expect(page.locator("#adapters-table th[aria-sort=ascending]")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(names.last).to_have_text("adapters/lighting-1")
    weights = [float(row.split("\t")[2]) for row in page.locator("#adapters-table tbody tr").all_inner_texts()]
    assert weights == sorted(weights, reverse=True)


def test_overlap_tables_give_both_nulls(opened: Open, report: Path) -> None:
    page = opened(report)
    first = page.locator("#overlap-tables tbody td").first
    expect(first).to_contain_text("random 0.80 (0.78–0.81)")
    expect(first).to_contain_text("mismatched 0.75 (0.69–0.80)")
    expect(first).to_contain_text("more overlap than random")
    for pair in synthetic(**SMALL)["pairs"]:
        table = page.get_by_role("table", name="Output side" if pair["side"] == "output" else "Input side")
        column = table.locator("thead th").all_inner_texts().index(pair["attribute"])
        row = table.get_by_role("row").filter(has=page.get_by_role("rowheader", name=pair["other"], exact=True))
        expect(row.locator("td").nth(column).locator("strong")).to_have_text(f"{pair['median']:.2f}")


def test_explained_adapters_are_drawn_beside_chance(opened: Open, report: Path) -> None:
    page = opened(report)
    adapter = synthetic(**SMALL)["explained"][0]
    shares, expected = points(page, "#explained-bars")
    assert shares["x"] == [*(s["share"] for s in adapter["attributes"].values()), adapter["joint"]]
    assert expected["x"] == [*(s["expected"] for s in adapter["attributes"].values()), adapter["expected"]]
    page.select_option("#explained-attribute", "camera")
    first = page.locator("#explained-map .grid").evaluate("box => box.data[0].z[0][0]")
    assert first == adapter["modules"][0]["attributes"]["camera"]["share"]


def test_every_control_can_be_reached_with_tab(opened: Open, report: Path) -> None:
    page = opened(report)
    reached = set()
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.classList[0]"))
        visible = page.evaluate(
            """() => {
                const own = document.activeElement;
                return [own, own.nextElementSibling].some((e) => e && getComputedStyle(e).outlineStyle !== 'none');
            }"""
        )
        assert visible or page.evaluate("document.activeElement === document.body")
    wanted = {
        "depth-from",
        "depth-to",
        "filter-reset",
        "quantity",
        "grid",
        "module-select",
        "all-layers",
        "angles-side",
    }
    assert wanted <= reached
    assert "explained-adapter" in reached


def luminance(color: str) -> float:
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_charts_follow_the_color_scheme_while_open(opened: Open, report: Path) -> None:
    page = opened(report, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('#spectrum').layout.font.color"
    points(page, "#spectrum")
    assert luminance(page.evaluate(background)) < 40
    before = page.evaluate(ink)
    with changes(page, "#spectrum"):
        page.emulate_media(color_scheme="light")
    assert luminance(page.evaluate(background)) > 200
    assert page.evaluate(ink) != before


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_never_scrolls_sideways(opened: Open, report: Path, width: int) -> None:
    page = opened(report, width=width)
    page.select_option("#quantity", "eigenvalue")
    page.wait_for_function("() => document.querySelectorAll('#overlap-strips .main-svg').length > 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inner = page.evaluate(
        """() => [...document.querySelectorAll('.plot, .grid')].filter((e) => e.clientWidth)
            .map((e) => e.getBoundingClientRect().right)"""
    )
    assert max(inner) <= width
    lefts = page.locator("#maps .map").evaluate_all("all => all.map((e) => e.getBoundingClientRect().left)")
    assert len(set(lefts)) == (1 if width == 400 else 2), "facets stand in one column when narrow"


def test_charts_fit_again_after_the_window_changed(opened: Open, report: Path) -> None:
    page = opened(report)
    page.set_viewport_size({"width": 700, "height": 900})
    page.wait_for_function("() => document.querySelector('#maps .main-svg').getBoundingClientRect().right <= 700")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700


def test_hostile_names_are_only_text(opened: Open, tmp_path: Path) -> None:
    data = synthetic(attributes=(HOSTILE, "b"), loose=(f"head.{HOSTILE}",), **SMALL | {"muted": (f"{HOSTILE}-0",)})
    for module in data["modules"]:
        module["kind"] = module["kind"].replace("qkv", HOSTILE)
    data["basis"] |= {"base_model": HOSTILE, "source": HOSTILE, "command": HOSTILE}
    page = opened(write_report(data, tmp_path / "r.html", title=HOSTILE))
    page.wait_for_function("() => document.querySelectorAll('#overlap-strips .main-svg').length > 0")
    page.select_option("#quantity", "eigenvalue")
    page.mouse.move(*cell(page, attribute=0, row=0, column=2))
    expect(page.locator("#maps .hovertext")).to_contain_text("<b>bold</b>")
    page.select_option("#module-select", f"head.{HOSTILE}")
    expect(page.locator("h1")).to_have_text(HOSTILE)
    expect(page.locator("#module-name")).to_have_text(f"head.{HOSTILE}")
    expect(page.locator("#maps h3").first).to_contain_text(HOSTILE)
    assert (
        page.evaluate("document.querySelectorAll('img[src=x], a[href^=javascript], svg a, h3 b, tspan a').length") == 0
    )
    assert page.evaluate("window.hit === undefined")


@pytest.mark.parametrize(
    "changes_of_shape",
    [
        pytest.param({"attributes": ("only",), "muted": ()}, id="one attribute"),
        pytest.param({"depths": 0, "loose": ("0", "2"), "explained": 0}, id="no depths"),
        pytest.param({"loose": tuple(f"head.{i}" for i in "abcdefghijk")}, id="loose modules"),
        pytest.param({"stored": ("texture", "geometry", "camera", "lighting"), "explained": 0}, id="not mined"),
        pytest.param({"empty": ("fc1",)}, id="no direction in a kind"),
        pytest.param({"empty": ("qkv", "fc1")}, id="no direction at all", marks=pytest.mark.slow),
        pytest.param({"depths": 2, "explained": 0}, id="two layers", marks=pytest.mark.slow),
        pytest.param({"rank": 1, "dim": 1, "adapters": 1, "muted": ()}, id="rank 1", marks=pytest.mark.slow),
        pytest.param(
            {"depths": 40, "kinds": ("qkv", "proj", "fc1", "fc2", "gate", "up", "down")},
            id="280 modules",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_shapes_of_analyses_draw_without_an_error(
    opened: Open, tmp_path: Path, changes_of_shape: dict[str, Any]
) -> None:
    data = synthetic(**SMALL | changes_of_shape)
    page = opened(write_report(data, tmp_path / "r.html"))
    for name in page.locator("#quantity option").evaluate_all("all => all.map(({ value }) => value)"):
        page.select_option("#quantity", name)
    for module in data["modules"][:2]:
        page.select_option("#module-select", module["name"])
        expect(page.locator("#module-name")).to_have_text(module["name"])
    if not page.locator("#all-layers").is_disabled():
        page.check("#all-layers")
    page.locator("#adapters").scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('#adapters-text').textContent")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400


def test_a_real_analysis_draws_what_it_says(opened: Open, tmp_path: Path) -> None:
    analysis = analyse(layered_basis(3, "by layer"), draws=20)
    page = opened(write_report(analysis, tmp_path / "r.html"))
    page.select_option("#quantity", "eigenvalue")
    data = analysis.to_dict()
    output = [o for o in data["overlaps"] if o["side"] == "output"]
    assert heat(page, 0) == [[o["smallest"] for o in output]]
    assert points(page, "#angles")[-1]["y"] == output[1]["eigenvalues"]
    expect(page.locator("#overlap-tables strong")).to_have_text(["0.00", "0.00"])
    # Nothing was mined: the stored singular values are all there is.
    expect(page.locator("#adapters-text")).to_have_text("This basis names no source adapters.")
    expect(page.locator("#module-table tbody tr").first).to_contain_text("–")


def test_a_report_of_vggt_size_draws_every_part(opened: Open, tmp_path: Path) -> None:
    page = opened(write_report(synthetic(), tmp_path / "r.html"))
    page.wait_for_function("() => document.querySelectorAll('#explained-bars .main-svg').length > 0")
    assert [len(heat(page, attribute)) for attribute in range(4)] == [8] * 4
    assert [len(row) for row in heat(page, 3)] == [24] * 8
    page.mouse.click(*cell(page, attribute=3, row=6, column=17))
    expect(page.locator("#module-name")).to_have_text("aggregator.global_blocks.17.mlp.fc1")
    expect(page.locator("#depth-facets .main-svg")).not_to_have_count(0)
    assert page.locator("#adapters-table tbody tr").count() == 40


def test_the_findings_stand_without_javascript(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    expect(page.locator("#findings")).to_contain_text("of 12 adapters is muted")
    context.close()


def test_what_was_muted_is_seen_on_a_phone(opened: Open, report: Path) -> None:
    page = opened(report, width=400)
    table = page.locator("#adapters-table")
    page.locator("#adapters").scroll_into_view_if_needed()
    table.locator("tbody tr").first.wait_for()
    heads = table.locator("thead th").all_inner_texts()
    for name in ("Weight", "Muted in"):
        box = (
            table.locator("thead th")
            .nth(next(i for i, head in enumerate(heads) if head.startswith(name)))
            .bounding_box()
        )
        assert box is not None and box["x"] + box["width"] <= 400
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
