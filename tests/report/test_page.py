"""The page of `ghibli report` as a file: self-contained, escaped, and rendered well by a browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsers import new_browser
from helpers.report_material import EVIL, evaluation_of, make_run, page_of
from PIL import Image

from ghibli.report import page, svg, text
from ghibli.report.svg import Axis
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = page_of(run.path)
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    for name, attributes in page.tags:
        assert name not in {"script", "iframe", "object", "base", "form", "use", "image"}
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
        assert attributes.get("href", "#")[:1] == "#" or attributes["href"] == "data:,"
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert all(attributes["alt"] for name, attributes in page.tags if name == "img")
    assert all(attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img")
    targets = {attributes.get("id") for _, attributes in page.tags}
    links = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    assert links <= targets


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    evil = {
        "state": "failed", "reason": EVIL, "settings": EVIL, "command": EVIL, "machine": EVIL,
        "findings": [{"name": EVIL, "text": f"`{EVIL}` {EVIL}"}], "lora__rank": EVIL,
    }  # fmt: skip
    name = EVIL.replace("/", "")
    make_run(tmp_path / "study" / name, **evil)
    make_run(tmp_path / "study" / "plain", gains=(0, 0.1))
    for made in (page_of(tmp_path / "study" / name), page_of(tmp_path / "study")):
        assert not [tag for tag, _ in made.tags if tag == "script"]
        assert not [key for _, attributes in made.tags for key in attributes if key.startswith("on")]
        assert EVIL in made.text and "{{ 7 * 7 }}" in made.source
    labels = [attributes.get("aria-label") or "" for _, attributes in made.tags]
    assert any("<script>" in label for label in labels)  # as text within an SVG's attribute
    escaped = text.escape(EVIL)
    assert svg.tag("text", EVIL, title_=EVIL) == f'<text title="{escaped}">{escaped}</text>'


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 63, 0, 1), [0, 20, 40, 60]),
        (Axis(-0.5, 0.5, 0, 1), [-0.4, -0.2, 0, 0.2, 0.4]),
        (Axis(0.13, 60, 0, 1, log=True), [0.2, 0.5, 1, 2, 5, 10, 20, 50]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks == pytest.approx(ticks)
    assert [axis(axis.low), axis(axis.high)] == pytest.approx([0, 1])


@pytest.fixture(scope="module")
def browser() -> Iterator:
    driver = new_browser()
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("look", ["light", "dark"])
def test_a_browser_renders_it(browser: Any, tmp_path: Path, width: int, look: str) -> None:
    from selenium.webdriver.support.expected_conditions import presence_of_element_located as located
    from selenium.webdriver.support.ui import WebDriverWait

    runs = [
        make_run(tmp_path / f"run-{EVIL.replace('/', '')}-{rank}", lora__rank=rank) for rank in (4, 8, 16)
    ]
    for run in runs:
        run.evaluation.write_text(json.dumps(evaluation_of(1.0, {"1": [2.0, 0.1], "7.5": [1.0, 0.2]})))
        Image.new("RGB", (1200, 900)).save(run.evaluation_images)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": look}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    papers = {"light": "rgb(253, 252, 249)", "dark": "rgb(23, 25, 27)"}
    for folder in (runs[0].path, tmp_path):
        browser.get(page.write([folder]).resolve().as_uri())
        if folder == tmp_path:  # a link in the ranking opens its run
            browser.execute_script("document.querySelector('td a').click()")
            opened = "details:has(#run-1)[open]"
            WebDriverWait(browser, 10).until(located(("css selector", opened)))
        browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        wide, room = browser.execute_script(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert wide <= room <= width
        images = browser.execute_script("return [...document.images].map(one => one.naturalWidth)")
        assert images and all(images)
        seen = browser.execute_script(
            "return [...document.querySelectorAll('.stack')].map(stack => "
            "[...stack.querySelectorAll('.sheet')].filter(one => one.offsetHeight > 0).length)"
        )
        assert set(seen) == {1}  # one of several grids is visible
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == papers[look]
        assert browser.get_log("browser") == []


@pytest.mark.parametrize("content", ["mine", "<!doctype html>\n<title>mine</title>", ""])
def test_no_file_but_a_report_is_replaced(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    file = tmp_path / "notes.html"
    file.write_text(content)
    for where in (file, run.path / "report.html"):
        where.write_text(content)
        with pytest.raises(UserError, match="is there already and is no report: move it away"):
            page.write([run.path], where if where == file else None)
        assert where.read_text() == content
    (tmp_path / "link.html").symlink_to(file)
    with pytest.raises(UserError, match="is no report"):
        page.write([run.path], tmp_path / "link.html")


@pytest.mark.slow
def test_a_report_is_replaced_by_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = page.write([run.path], tmp_path / "a.html").read_text()
    assert page.write([run.path], tmp_path / "a.html").read_text().count(page.MARK) == 1
    (tmp_path / "a.html").write_text(first.replace(page.MARK, ""))  # as earlier versions wrote it
    page.write([run.path], tmp_path / "a.html")
    assert page.MARK in (tmp_path / "a.html").read_text()
