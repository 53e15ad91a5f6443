"""The Prefect pages that a person opens, in a real browser: the form, the run, its graph, tasks and artifacts.

With MERGELOOM_SCREENSHOTS set to a folder, a picture of every page is left there to look at.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergecore.registry import METHODS
from tests.deployed import Project

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"), pytest.mark.timeout(1500)]
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NOBODY_ELSE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
"""The pages must do without anything that is not on this machine."""
TROUBLE = ("Something went wrong", "Page Not Found", "error occurred", "Can't connect")
PATIENCE = 120_000  # milliseconds; pages draw late on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=[*SWITCHES, NOBODY_ELSE])
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
        opened.wait_for_timeout(1500)  # the graph comes in moving
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


def runs_of(project: Project) -> list[Any]:
    """The flow runs, the latest first."""
    return list(project.ask("/flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=20))


def waited_for(page: Page, look: Callable[[], Any]) -> Any:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not (something := look()):
        assert time.monotonic() < deadline, "waited in vain"
        page.wait_for_timeout(300)
    return something


def test_the_form_reads_well_and_starts_a_run(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/v2/deployments/deployment/{project.deployment('sweep')['id']}/run")
    sees(page, "spec", "methods (Optional)", "counts (Optional)", "workers (Optional)", "retry_failed (Optional)")
    sees(page, "Path of the spec file, seen from the project's folder.")
    sees(page, "Do only these of the spec's methods now; none chosen: all.")
    page.get_by_label("Run Name").fill("by hand")
    page.get_by_label("spec", exact=True).fill(str(project.spec))
    page.get_by_label("Select methods").click()
    expect(page.get_by_role("option")).to_have_text(list(METHODS), timeout=10_000)
    page.get_by_role("option", name="average", exact=True).click()
    page.get_by_role("option", name="ties", exact=True).click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0, timeout=PATIENCE)
    submit = page.get_by_role("button", name="Submit")
    submit.click()
    page.wait_for_timeout(5000)
    if submit.is_visible():
        submit.click()  # now and then the first click does no more than close the list of methods
    runs = waited_for(page, lambda: [run for run in runs_of(project) if run["name"].endswith("by hand")])
    for run in runs:
        project.forget(run["id"])
    assert runs[0]["parameters"]["methods"] == ["average", "ties"]
    assert runs[0]["parameters"]["spec"] == str(project.spec)


def test_the_page_of_a_run_and_its_tasks(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/v2/runs/flow-run/{project.whole}?tab=TaskRuns")
    tasks = project.tasks(project.whole)
    sees(page, project.ended(project.whole)["name"], "Completed", f"{len(tasks)} Task runs", "mergeloom", "Cached")
    page.get_by_label("Items per page").click()
    page.get_by_role("option", name="50").click()
    for name in tasks:
        sees(page, name)
        assert is_whole(page, name)
    page.wait_for_selector("canvas")


def test_the_graph_of_a_run_in_the_older_pages(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/runs/flow-run/{project.whole}")
    sees(page, "Completed", f"{len(project.tasks(project.whole))} Task runs")
    page.wait_for_selector("canvas")


def test_artifacts_of_a_run(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/v2/runs/flow-run/{project.whole}?tab=Artifacts")
    sees(page, "progress-tiny", "Share of the cells of tiny that are done", "report-tiny", "Report of the sweep tiny")
    assert is_whole(page, "Share of the cells of tiny that are done")


def test_the_report_has_its_figure_tables_and_links(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/v2/artifacts/artifact/{project.artifacts(project.whole)['report-tiny']['id']}")
    sees(page, "tiny: scores on test items", "Held-in, relative to the merge's own experts", "8 of 8 cells done")
    figure = page.get_by_role("img", name="held-in and held-out scores")
    expect(figure).to_be_visible(timeout=PATIENCE)
    assert figure.evaluate("image => image.naturalWidth") > 400, "the picture is there, not only its frame"
    expect(page.get_by_role("table").first).to_be_visible(timeout=PATIENCE)
    link = page.get_by_role("link", name="Leaderboard").first.get_attribute("href")
    assert link and "viewStateShareKey=mergeloom-leaderboard" in link


def test_the_progress_of_a_sweep(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/v2/artifacts/artifact/{project.artifacts(project.whole)['progress-tiny']['id']}")
    sees(page, "Progress: 100%")


def test_the_schedule_is_switched_on_and_off(page: Page, project: Project) -> None:
    deployment = project.deployment("sweep")
    page.goto(f"{project.page}/v2/deployments/deployment/{deployment['id']}")
    sees(page, "At 02:00 AM", "Concurrency Limit", "flows/sweep.py:sweep")
    for wanted in (True, False):
        page.get_by_role("switch").first.click()
        waited_for(page, lambda: project.deployment("sweep")["schedules"][0]["active"] is wanted)


def test_the_automation_says_what_it_does(page: Page, project: Project) -> None:
    page.goto(f"{project.page}/v2/automations")
    sees(page, "mergeloom crashed runs", "Crashed")
