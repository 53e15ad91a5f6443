"""The MLflow pages that a person opens, in a real browser: the names and charts of a sweep are there, errors are not.

With MERGELOOM_SCREENSHOTS set to a folder, a picture of every page is left there to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.services.servers import Addresses
from mergecore.reporting.figure import draw
from mergecore.reporting.summary import Summaries
from tasks.tracking import project as track
from tasks.tracking.project import TrackResult
from tests import example_sweep

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TROUBLE = ("Something went wrong", "Page Not Found", "error occurred", "does not exist", "No charts in this section")
PATIENCE = 30_000  # milliseconds; pages draw late on a busy machine


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, shared_servers: Addresses) -> TrackResult:
    """A sweep with a refused cell and a registered one, projected into a real MLflow."""
    folder = tmp_path_factory.mktemp("pages")
    cells = [*example_sweep.baselines(), *example_sweep.merges(), example_sweep.refused()]
    best = next(cell for cell in cells if cell.name == "ties-n2")
    sweep = example_sweep.sweep(cells, "pages", {**example_sweep.registration(best), "name": "pages-model"})
    summaries = Summaries(sweep)
    figures = draw(summaries.on("test"), folder / "figure")
    artifacts = {f"figures/{path.name}": path for path in figures if path.suffix == ".png"}
    links = {"Prefect flow run": "http://127.0.0.1:4200/runs/flow-run/1"}
    return track.project(summaries, shared_servers.mlflow, artifacts, links, folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of a fresh browser; at the end it must show no trouble and have thrown no error."""
    context = browser.new_context(viewport={"width": 1600, "height": 1100})
    opened = context.new_page()
    thrown: list[str] = []
    opened.on("pageerror", lambda error: thrown.append(str(error)))
    opened.set_default_timeout(PATIENCE)
    yield opened
    folder = os.environ.get("MERGELOOM_SCREENSHOTS")
    if folder:
        opened.screenshot(path=str(Path(folder) / f"{request.node.name}.png"))
    text = opened.inner_text("body")
    context.close()
    assert not [trouble for trouble in TROUBLE if trouble.lower() in text.lower()], text
    assert not thrown


def sees(page: Page, *texts: str) -> None:
    """Each text becomes visible somewhere on the page."""
    for text in texts:
        expect(page.get_by_text(text, exact=True).first).to_be_visible(timeout=PATIENCE)


def is_whole(page: Page, text: str) -> bool:
    """Whether the element that shows the text shows all of it, not the beginning and an ellipsis."""
    element = page.get_by_text(text, exact=True).first
    return bool(
        element.evaluate("element => element.scrollWidth <= element.clientWidth + 1 || element.clientWidth === 0")
    )


def test_the_list_of_runs_opens_on_the_curves(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["runs"])
    sees(page, "pages", "average", "ties", "task_arithmetic", "multitask", "base model")
    assert page.get_by_text("24 models (23 done, 1 refused)").first.is_visible(), "the note's first line"


def test_the_leaderboard_shows_every_cell_and_its_scores(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["leaderboard"])
    sees(page, "ties-n2", "ties-n4", "average-n2", "task_arithmetic+drop-n4", "mixture")
    sees(page, "method", "n_experts", "held_in/avg", "held_out/avg")
    sees(page, "24")  # matching runs: cells only, no curves
    assert is_whole(page, "task_arithmetic+drop-n4") and is_whole(page, "held_out/avg")
    first = page.get_by_text("mixture", exact=True).first.bounding_box()
    last = page.get_by_text("average-n4", exact=True).first.bounding_box()
    assert first and last and first["y"] < last["y"], "the best is on top"


def test_the_curves_of_every_method_are_drawn(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["curves"])
    sees(page, "average", "ties", "slerp", "task_arithmetic", "held_in/avg", "held_out/avg")
    page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", timeout=PATIENCE)
    expect(page.locator(".js-plotly-plot:has(.scatterlayer .trace)")).to_have_count(2, timeout=PATIENCE)
    points = page.locator(".js-plotly-plot").first.locator(".scatterlayer .points path")
    colours = points.evaluate_all("paths => paths.map(path => getComputedStyle(path).fill)")
    assert len(set(colours)) == 8, "five curves and three baselines, each in its own colour"


def test_the_charts_of_cells_are_drawn(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["charts"])
    sees(page, "ties-n2", "average-n4", "Each cell")
    page.wait_for_selector(".js-plotly-plot .scatterlayer .points path", timeout=PATIENCE)
    points = page.locator(".js-plotly-plot").first.locator(".scatterlayer .points path")
    assert points.count() >= 20
    page.get_by_text("Method to scores").first.scroll_into_view_if_needed()
    page.wait_for_selector("text=Parallel Coordinates", timeout=PATIENCE)
    page.wait_for_selector(".parcoords svg, canvas", timeout=PATIENCE)


def test_the_run_of_the_sweep_has_its_note_table_and_figure(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["sweep"])
    sees(page, "Finished", "Leaderboard", "Prefect flow run")
    page.get_by_text("Show more", exact=True).click()
    sees(page, "8 experts", "Without a result:")
    run = shown.urls["sweep"].partition("?")[0]
    page.goto(f"{run}/artifacts/cells.json?workflowType=machine_learning")
    sees(page, "View as table", "ties-n2", "n_experts")


def test_links_of_the_note_lead_to_the_views(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["sweep"])
    link = page.get_by_role("link", name="Leaderboard").first
    target = link.get_attribute("href")
    assert target and target.endswith("viewStateShareKey=mergeloom-leaderboard")
    page.goto(page.url.partition("#")[0] + target[target.index("#") :])
    sees(page, "ties-n2", "held_in/avg")


def test_a_refused_cell_says_why(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["leaderboard"])
    page.get_by_placeholder("metrics.rmse").fill("tags.`cell.status` = 'refused'")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="slerp-n4").first.click()
    sees(page, "Failed")
    expect(page.get_by_text("slerp merges exactly two models, not 4").last).to_be_visible(timeout=PATIENCE)


def test_the_registered_model_says_what_it_is(page: Page, shown: TrackResult) -> None:
    page.goto(shown.urls["model"])
    sees(page, "pages-model", "Version 1")
    page.goto(shown.urls["model"].replace("/models/pages-model", "/models/pages-model/versions/1"))
    sees(page, "ties-n2", "weights.digest", "sha256-of-ties-n2")
    assert "champion" in page.inner_text("body")
