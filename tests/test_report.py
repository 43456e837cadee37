"""`ghibli report`: the page says what the files say, leaves nothing out silently and needs nothing else."""

import csv
import json
import math
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ghibli import cli, report, study
from ghibli.mistakes import UserMistake
from ghibli.records import METRICS, probe_values, write_rows
from ghibli.report import words
from ghibli.report.svg import Axis, tag
from ghibli.run_dir import RunDir, write_sealed
from ghibli.validation import Gain, Probe

EVIL = "<script>alert(1)</script>\"' onload=alert(2) {{ 7 * 7 }} &amp;"
VOID = {"meta", "link", "img", "input", "br"}
STATUS = {
    "state": "finished", "reason": None, "started": "2026-01-01T10:00:00+00:00",
    "ended": "2026-01-01T10:06:30+00:00", "settings": "LoRA rank 4", "command": "train.py lora.rank=4",
    "seed": 3, "threads": 2, "git_commit": "ab" * 20, "git_dirty": True, "versions": {"torch": "2.0"},
    "machine": "Linux", "device": "cpu, 2 threads", "devices": 1, "base_hash": "b" * 64,
    "data_hash": "d" * 64, "epoch": 3, "step": 30, "findings": [],
}  # fmt: skip
SETTINGS = {
    "finetune": "lora", "seed": 3, "lora": {"rank": 4, "dropout": 0.0}, "loss": {"guidance": 1.0},
    "optimizer": {"lr": 0.001}, "trainer": {"max_epochs": 3, "accumulate_grad_batches": 1},
    "data": {"batch_size": 4},
}  # fmt: skip


def make_run(folder: Path, gains: tuple[float, ...] = (0, 0.3, 0.4, 0.35), **changes: object) -> RunDir:
    """A run folder with these held-out gains (the untouched model's first), and its best checkpoint.

    Args:
        changes: entries of status.json, or with a dot (as `lora__rank`) settings.
    """
    run, settings = RunDir(folder), json.loads(json.dumps(SETTINGS))
    for key in [key for key in changes if "__" in key]:
        part, name = key.split("__")
        settings[part][name] = changes.pop(key)
    settings["finetune"] = changes.pop("finetune", "lora")
    run.update_status(**(STATUS | changes))
    run.config.write_text(yaml.safe_dump(settings))
    history = [probe_of(gain) for gain in gains]
    rows = [
        {"step": 10 * epoch, "epoch": epoch} | probe_values(probe, 1000)
        for epoch, probe in enumerate(history)
    ]
    write_rows(run.probe, tuple(rows[0]), rows)
    losses = [(step, 0, 0.5 + 0.1 * math.sin(step), 1 - step / 60, 0.001, 8.0) for step in range(1, 31)]
    write_rows(run.metrics, METRICS, [dict(zip(METRICS, row, strict=True)) for row in losses])
    best = study.best_epoch(history)
    content = {"probe": [vars(probe) for probe in history[: best + 1]]}
    write_sealed(run.best_checkpoint, lambda file: torch.save(content, file))
    write_sealed(run.last_checkpoint, lambda file: torch.save(content, file))
    run.samples.mkdir()
    for name in ("epoch_001.png", "adapter.png"):
        Image.new("RGB", (60, 40), (200, 30, 90)).save(run.samples / name)
    return run


def probe_of(gain: float) -> Probe:
    """Scores of 8 pictures that are about `gain` better than the base."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand((8, 4), generator=generator) + 0.5
    ours = base * (1 - gain * (1 + 0.1 * torch.rand((8, 4), generator=generator)))
    return Probe(ours, ours, ours, base, base)


def cell(sampler: str, guidance: float, kernel: float, **more: object) -> dict:
    row = {"sampler": sampler, "guidance": guidance, "kernel": [kernel, 0.21], "frechet": 150.04}
    return row | {"caption_fit": [74.4, 2.9], "precision": 0.2, "recall": 0.95, "copying": 1.07} | more


def evaluation_of(guidance: float, scan: dict[str, list[float]]) -> dict:
    """The content of an evaluation.json."""
    own = [cell("ddim", 1.0, 2.5), cell("ddim", 7.5, 0.48, kernel_minus_base=[-3.7, 1.3], copying=0.41)]
    return {
        "features": "style", "reference_pictures": 16, "samples": 12, "num_inference_steps": 8,
        "training_guidance": guidance,
        "real": {"kernel": [0.06, 0.16], "frechet": 116.47, "caption_fit": [83.7, 2.1], "recall": 1.0},
        "models": {"base": [cell("ddim", 1.0, 11.4), cell("ddim", 7.5, 4.3)], "run": own},
        "scan": {"base": {"1": [11.0, 1.0], "7.5": [4.0, 0.5]}, "run": scan},
        "findings": [{"name": "few pictures", "text": "12 pictures are few"}],
    }  # fmt: skip


class Page(HTMLParser):
    """A page's text and tags; fails where a tag is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.tags, self.open, self.source = [], [], [], text
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(*folders: Path, out: Path | None = None) -> Page:
    return Page(report.write(list(folders), out).read_text())


def test_one_run_in_words_and_numbers_of_its_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", findings=[{"name": "sampling scale", "text": "use `ghibli evaluate`"}])
    page = page_of(run.path)
    with open(run.probe, newline="") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["probe/val_gain"]))
    gain = Gain(float(best["probe/val_gain"]), float(best["probe/val_gain_se"]))
    assert f"It learned: {gain}.".replace("+-", "\u00b1") in page.text
    assert "Epoch 2 of 3 is the best; the last is 5." in page.text  # 40 % to 35 %, each 1.05 times
    for part in ("0-249", "750-999"):
        told = Gain(float(best[f"probe/val_gain_t{part}"]), float(best[f"probe/val_gain_t{part}_se"]))
        assert f"{part}: {told.size}".replace("+-", "\u00b1") in page.text
    provenance = (
        "train.py lora.rank=4",
        "abababa",
        "uncommitted changes yes",
        "b" * 64,
        "torch 2.0",
        "threads 2",
        "seed 3",
    )
    for words_ in (*provenance, "lora.rank 4", "sampling scale", "use ghibli evaluate"):
        assert words_ in page.text, words_
    titles = ["Gain over the base", "Training loss as it is", "Training loss, readable"]
    assert all(title in page.text for title in titles)
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
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


def test_words_of_others_stay_words(tmp_path: Path) -> None:
    evil = {
        "state": "failed", "reason": EVIL, "settings": EVIL, "command": EVIL, "machine": EVIL,
        "findings": [{"name": EVIL, "text": f"`{EVIL}` {EVIL}"}], "lora__rank": EVIL,
    }  # fmt: skip
    name = EVIL.replace("/", "")
    make_run(tmp_path / "study" / name, **evil)
    make_run(tmp_path / "study" / "plain", gains=(0, 0.1))
    for page in (page_of(tmp_path / "study" / name), page_of(tmp_path / "study")):
        assert not [tag for tag, _ in page.tags if tag == "script"]
        assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
        assert EVIL in page.text and "{{ 7 * 7 }}" in page.source
    labels = [attributes.get("aria-label") or "" for _, attributes in page.tags]
    assert any("<script>" in label for label in labels)  # as text within an SVG's attribute
    escaped = words.escape(EVIL)
    assert tag("text", EVIL, title_=EVIL) == f'<text title="{escaped}">{escaped}</text>'


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "failed", "reason": "the disk is full"}, "It failed: the disk is full. python train"),
        ({"state": "interrupted", "reason": "Ctrl-C"}, "It was stopped: Ctrl-C."),
        ({"state": "running", "process": 2**22 + 1}, "It was killed: its status says running"),
        ({"finetune": "none", "gains": (0,)}, "Nothing was trained (finetune=none)"),
        ({"gains": (0,), "state": "failed", "reason": "why"}, "No epoch is finished yet"),
        ({"gains": (0, 0.2)}, "It has one epoch. Early stopping ended it before epoch 3."),
        ({"gains": (0, -0.2, -0.3)}, "It did not learn: even at its best it is WORSE than the base by 2"),
        ({"gains": (0, 0.1, float("nan"))}, "Epoch 1 of 2 is the best; the last one's gain is no number."),
        ({"findings": [{"name": "overfitting", "text": "by heart"}]}, "It overfits"),
    ],
)  # fmt: skip
def test_every_end_is_told(tmp_path: Path, changes: dict, said: str) -> None:
    assert said in page_of(make_run(tmp_path / "run", **changes).path).text


@pytest.mark.parametrize("content", [None, b"", b"\0\0\0", b"[1]", b'{"a": 1}', b"step,epoch\n1\n"])
@pytest.mark.parametrize(
    "name",
    ["status.json", "config.yaml", "probe.csv", "metrics.csv", "evaluation.json", "samples/adapter.png"],
)
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = make_run(tmp_path / "study" / "run")
    run.evaluation.write_text(json.dumps(evaluation_of(1.0, {"1": [2.0, 0.1]})))
    (run.path / name).unlink()
    if content is not None:
        (run.path / name).write_bytes(content)
    page = page_of(run.path)
    if name == "status.json":
        assert ("How it ended is not known" in page.text) or content == b'{"a": 1}'
    elif name == "samples/adapter.png":
        assert sum(tag == "img" for tag, _ in page.tags) == 1
        assert content is None or "adapter.png is damaged" in page.text
    elif name == "config.yaml":
        assert "config.yaml is missing or damaged" in page.text or content == b'{"a": 1}'
    else:
        unseen = "no evaluation yet" in page.text.partition("Not on this page")[2]
        assert name in page.text or (name == "evaluation.json" and unseen)
    page_of(tmp_path / "study")


def test_a_study_is_ranked_and_its_effects_are_those_of_the_study(tmp_path: Path) -> None:
    make_run(tmp_path / "low", (0, 0.1, 0.2), lora__rank=4)
    make_run(tmp_path / "high", (0, 0.3, 0.5), lora__rank=8)
    shutil.rmtree(make_run(tmp_path / "broken", (0,), state="failed", reason="no luck", lora__rank=8).samples)
    page = page_of(tmp_path)
    trials = study.read_trials(tmp_path)
    (effect,) = study.effects(trials)
    difference = f"{100 * effect.difference.value:+.2f} \u00b1 {100 * effect.difference.standard_error:.2f}"
    assert f"lora.rank 4 \u2192 8 {difference} points" in page.text
    assert "The first is ahead of the second by" in page.text and "broken: It failed: no luck" in page.text
    ranking = page.text.partition("Each run ")[2]
    assert ranking.index("1. high") < ranking.index("2. low") < ranking.index("3. broken")
    assert "2 learned; 2 finished, 1 failed." in page.text
    assert "no picture grid (samples/ is empty) of 1 runs" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_runs_side_by_side_go_where_out_says(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / part / "run", lora__rank=rank) for part, rank in (("a", 4), ("b", 8)))
    page = page_of(one.path, two.path, one.path, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").exists() and not (one.path / "report.html").exists()
    assert "2 runs" in page.text and "rank 4" in page.text and "rank 8" in page.text
    assert "The first two cannot be told apart: they differ by +0.00" in page.text


def test_the_evaluation_is_a_table_a_curve_and_words(tmp_path: Path) -> None:
    scan = {"1": [3.0, 0.1], "2": [2.0, 0.1], "7.5": [0.6, 0.1], "15": [0.8, 0.1]}
    guided = {"7.5": [3.0, 0.1], "15": [1.5, 0.1], "56": [6.0, 0.3]}
    for name, guidance, own in (("ordinary", 1.0, scan), ("guided", 7.5, guided)):
        run = make_run(tmp_path / name, loss__guidance=guidance)
        run.evaluation.write_text(json.dumps(evaluation_of(guidance, own)))
        Image.new("RGB", (30, 30)).save(run.path / "evaluation_nearest.png")
    page = page_of(tmp_path)
    for said in (
        "12 samples a cell, 16 real pictures, 8 steps, style features", "0.48 \u00b1 0.21",
        "below base +3.70 \u00b1 1.30", "150.0 (116.5)", "recall 95 %", "few pictures",
        "close to copies: the nearest training picture is at 0.41",
        "trained at guidance 7.5: the rule does not hold: in the 3 points they share, 2 differ",
        "guidance 7.5 is nearest to real pictures at scale 15: 1.50 \u00b1 0.10.",
    ):  # fmt: skip
        assert said in page.text, said
    assert "Samples beside their nearest training pictures" in page_of(tmp_path / "guided").text


def test_the_rule_of_the_scale_is_tested_with_the_errors() -> None:
    ordinary = [(1.0, 3.0, 0.1), (2.0, 2.0, 0.1), (4.0, 1.0, 0.1)]
    middle = 2 * math.sqrt(2)  # halfway on the logarithmic axis
    assert words.at(ordinary, middle) == pytest.approx((1.5, 0.1))
    holds, said = words.rule_holds(ordinary, [(0.5, 9.0, 0.1), (1.0, 3.1, 0.1), (middle, 1.7, 0.1)])
    assert holds and said == "in the 2 points they share nothing contradicts the rule"
    holds, said = words.rule_holds(ordinary, [(1.0, 3.0, 0.1), (middle, 2.0, 0.1)])
    assert not holds and "1 differ by more than chance, most clearly at s / w = 2.83" in said
    assert "+0.50 +- 0.14" in said
    assert words.rule_holds(ordinary, [(0.1, 1.0, 0.1)]) is None and words.rule_holds([], ordinary) is None


def test_numbers_are_typeset_and_words_are_not() -> None:
    assert words.typeset("-4.1 % +- 0.3 %") == "\u22124.1\u00a0%\u00a0\u00b1\u00a00.3\u00a0%"
    assert words.typeset("2026-11-24 lr=1e-4 a/-5") == "2026-11-24 lr=1e-4 a/-5"
    assert words.prose("`a <b> +- 1` or ` -1") == words.escape(
        "`a <b> \u00b1 1` or ` \u22121".replace(" \u00b1 ", "\u00a0\u00b1\u00a0")
    )


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


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(UserMistake, match="no such folder"):
        report.write([tmp_path / "nowhere"])
    with pytest.raises(UserMistake, match="that is a folder"):
        report.write([tmp_path / "run"], tmp_path)
    (tmp_path / "empty").mkdir()
    for words_, code in ((["run"], 0), (["run", "empty"], 2)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ghibli", "report", *words_])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        assert leave.value.code == code
    said = capsys.readouterr()
    assert said.out.startswith("wrote run/report.html") and said.err.count("\n") == 1
    assert "empty is no run and no study" in said.err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium; skipped where selenium or the browser is not at hand."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("look", ["light", "dark"])
def test_a_browser_shows_it(browser: Any, tmp_path: Path, width: int, look: str) -> None:
    runs = [
        make_run(tmp_path / f"run-{EVIL.replace('/', '')}-{rank}", lora__rank=rank) for rank in (4, 8, 16)
    ]
    for run in runs:
        run.evaluation.write_text(json.dumps(evaluation_of(1.0, {"1": [2.0, 0.1], "7.5": [1.0, 0.2]})))
        Image.new("RGB", (1200, 900)).save(run.evaluation_pictures)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": look}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    papers = {"light": "rgb(253, 252, 249)", "dark": "rgb(23, 25, 27)"}
    for folder in (runs[0].path, tmp_path):
        browser.get(report.write([folder]).resolve().as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        wide, room = browser.execute_script(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert wide <= room <= width
        pictures = browser.execute_script("return [...document.images].map(one => one.naturalWidth)")
        assert pictures and all(pictures)
        seen = browser.execute_script(
            "return [...document.querySelectorAll('.stack')].map(stack => "
            "[...stack.querySelectorAll('.sheet')].filter(one => one.offsetHeight > 0).length)"
        )
        assert set(seen) == {1}  # of several grids one is shown
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == papers[look]
        assert browser.get_log("browser") == []
