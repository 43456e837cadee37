"""`ghibli report`: the page agrees with the files of its runs, and names what is missing."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.report_material import evaluation_of, make_run, page_of
from PIL import Image

from ghibli.cli import main
from ghibli.evaluation.gain import Gain
from ghibli.report import charts, figures, page, text
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_rows
from ghibli.sweeps import effects
from ghibli.sweeps.trials import read_trials


def test_one_run_agrees_with_its_files(tmp_path: Path) -> None:
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
    for expected in (*provenance, "lora.rank 4", "sampling scale", "use ghibli evaluate"):
        assert expected in page.text, expected
    titles = ["Gain over the base", "Training loss", "Normalised training loss"]
    assert all(title in page.text for title in titles)
    assert sum(tag == "img" for tag, _ in page.tags) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "failed", "reason": "the disk is full"}, "It failed: the disk is full. python train"),
        ({"state": "interrupted", "reason": "Ctrl-C"}, "It was stopped: Ctrl-C."),
        ({"state": "running", "process": 2**22 + 1}, "It was killed: its status says running"),
        ({"finetune": "none", "gains": (0,)}, "Nothing was trained (finetune=none)"),
        ({"gains": (0,), "state": "failed", "reason": "why"}, "No epoch is finished yet"),
        ({"gains": (0, 0.2)}, "It ran for one epoch. Early stopping ended it before epoch 3."),
        ({"gains": (0, -0.2, -0.3)}, "It did not learn: even its best epoch is WORSE than the base by 2"),
        ({"gains": (0, 0.1, float("nan"))}, "Epoch 1 of 2 is the best; the gain of the last is not finite."),
        ({"findings": [{"name": "overfitting", "text": "by heart"}]}, "It overfits"),
    ],
)  # fmt: skip
def test_the_verdict_names_every_outcome(tmp_path: Path, changes: dict, said: str) -> None:
    assert said in page_of(make_run(tmp_path / "run", **changes).path).text


@pytest.mark.slow
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
        assert ("How it ended is unknown" in page.text) or content == b'{"a": 1}'
    elif name == "samples/adapter.png":
        assert sum(tag == "img" for tag, _ in page.tags) == 1
        assert content is None or "adapter.png is damaged" in page.text
    elif name == "config.yaml":
        assert "config.yaml is missing or damaged" in page.text or content == b'{"a": 1}'
    else:
        unseen = "no evaluation yet" in page.text.partition("Not on this page")[2]
        assert name in page.text or (name == "evaluation.json" and unseen)
    page_of(tmp_path / "study")


def test_a_study_is_ranked_and_shows_its_effects(tmp_path: Path) -> None:
    make_run(tmp_path / "low", (0, 0.1, 0.2), lora__rank=4)
    make_run(tmp_path / "high", (0, 0.3, 0.5), lora__rank=8)
    shutil.rmtree(make_run(tmp_path / "broken", (0,), state="failed", reason="no luck", lora__rank=8).samples)
    page = page_of(tmp_path)
    trials = read_trials(tmp_path)
    (effect,) = effects.effects(trials)
    difference = f"{100 * effect.difference.value:+.2f} \u00b1 {100 * effect.difference.standard_error:.2f}"
    assert f"lora.rank 4 \u2192 8 {difference} points" in page.text
    assert "The first leads the second by" in page.text and "broken: it failed: no luck" in page.text
    ranking = page.text.partition("Each run ")[2]
    assert ranking.index("1. high") < ranking.index("2. low") < ranking.index("3. broken")
    assert "2 learned; 2 finished, 1 failed." in page.text
    assert "no image grid for 1 of 3 runs (samples/ is empty)" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_the_gain_stands_before_the_settings(tmp_path: Path) -> None:
    """A table that is wider than the page is cut at its right."""
    make_run(tmp_path / "low", (0, 0.1, 0.2), lora__rank=4)
    make_run(tmp_path / "high", (0, 0.3, 0.5), lora__rank=8)
    table = page_of(tmp_path).text.partition("are the settings that differ.")[2]
    assert 0 <= table.index("gain over the base") < table.index("rank")


def test_what_lies_below_the_scale_is_an_arrow() -> None:
    low, high = charts.common_scale([Gain(0.14, 0.01), Gain(-1.8, 0.05)])
    below, inside = (charts.interval_chart(gain, low, high) for gain in (Gain(-1.8, 0.05), Gain(0.14, 0.01)))
    assert low > -1.8
    assert "arrow" in below and "circle" not in below
    assert "arrow" not in inside and "circle" in inside
    partly = charts.interval_chart(Gain(low + 0.01, 0.1), low, high)
    assert "arrow" in partly and "circle" in partly


@pytest.mark.parametrize(
    ("losses", "falls"),
    [([0.4] * 8, False), ([0.4, 0.38] * 4, False), ([0.4, 0.4, 0.3, 0.2], True), ([0.4], False)],
)
def test_a_loss_that_halves_hides_no_gain(losses: list[float], falls: bool) -> None:
    assert figures.falls_visibly([{figures.LOSS: loss} for loss in losses]) == falls
    rows = [{"step": step, figures.LOSS: loss} for step, loss in enumerate(losses)]
    raw, _ = figures.loss_curves([("it", SimpleNamespace(metrics=rows, state="finished"))])
    assert ("a small gain is lost in it" in raw.caption) == (not falls)


def test_a_title_says_more_than_the_time(tmp_path: Path) -> None:
    dated = make_run(tmp_path / "2026-01-02_03-04-05", settings="LoRA rank 4", base="demo", images="film")
    named = make_run(tmp_path / "panda", settings="LoRA rank 4", base="demo", images="film")
    text = page_of(dated.path).text
    assert text.index("LoRA rank 4") < text.index("base demo, images film, 2026-01-02_03-04-05")
    assert "panda LoRA rank 4, base demo, images film" in page_of(named.path).text
    assert page.title_of_several(["2026-01-02_03-04-05", "panda", "x"]) == "panda and 2 more"
    assert page.title_of_several(["2026-01-02_03-04-05", "2026-01-02_03-04-06"]) == "2 runs compared"


def test_unfinished_runs_come_last_and_have_no_effect(tmp_path: Path) -> None:
    make_run(tmp_path / "low", (0, 0.1, 0.2), lora__rank=4)
    make_run(tmp_path / "high", (0, 0.3, 0.5), lora__rank=8, state="interrupted", reason="Ctrl-C")
    page = page_of(tmp_path)
    assert "Unfinished runs come last, and effects do not include them." in page.text
    assert "lora.rank 4 \u2192 8" not in page.text and "no effects: no two scored runs" in page.text
    runs = page.text.partition("Each run ")[2]
    assert runs.index("1. rank 4") < runs.index("2. rank 8")


def test_distance_and_losses_are_charts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    columns = ("step", "epoch", "evaluate/kernel_distance", "evaluate/kernel_distance_se")
    points = [(0, 0, 11.1, 1.2), (30, 3, 1.625, 0.25)]
    write_rows(run.distances, columns, [dict(zip(columns, row, strict=True)) for row in points])
    labels = [attributes.get("aria-label") for tag, attributes in page_of(run.path).tags if tag == "svg"]
    assert "Distance to real images. distance: 1.62 +- 0.25 at 3" in labels
    loss = f"Training loss. loss: {0.5 + 0.1 * math.sin(30):.3g} at 30"
    assert loss in labels and "Normalised training loss. loss: 0.5 at 30" in labels


def test_separate_runs_are_written_to_out(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / part / "run", lora__rank=rank) for part, rank in (("a", 4), ("b", 8)))
    page = page_of(one.path, two.path, one.path, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").exists() and not (one.path / "report.html").exists()
    assert "2 runs" in page.text and "rank 4" in page.text and "rank 8" in page.text
    assert "The first two cannot be told apart: they differ by +0.00" in page.text


def test_the_evaluation_is_a_table_a_chart_and_sentences(tmp_path: Path) -> None:
    scan = {"1": [3.0, 0.1], "2": [2.0, 0.1], "7.5": [0.6, 0.1], "15": [0.8, 0.1]}
    guided = {"7.5": [3.0, 0.1], "15": [1.5, 0.1], "56": [6.0, 0.3]}
    for name, guidance, own in (("ordinary", 1.0, scan), ("guided", 7.5, guided)):
        run = make_run(tmp_path / name, loss__guidance=guidance)
        run.evaluation.write_text(json.dumps(evaluation_of(guidance, own)))
        Image.new("RGB", (30, 30)).save(run.path / "evaluation_nearest.png")
    page = page_of(tmp_path)
    for said in (
        "precision 20 %, recall 95 %", "large number is the style distance to", "Fr\u00e9chet 150.0",
        "A model trained at guidance 7.5 is not made to be sampled at 1: its images are mush",
        "12 samples per cell, 16 real images, 8 steps, style features", "0.48 \u00b1 0.21",
        "below base +3.70 \u00b1 1.30", "150.0 (116.5)", "recall 95 %", "few images",
        "close to copies: the nearest training image is at 0.41 times the distance of unseen",
        "trained at guidance 7.5: the rule does not hold: of the 3 points they share, 2 differ",
        "guidance 7.5 is closest to real images at scale 15: 1.50 \u00b1 0.10.",
    ):  # fmt: skip
        assert said in page.text, said
    assert "Samples beside their nearest training images" in page_of(tmp_path / "guided").text


def test_a_run_without_a_scan_has_no_curve(tmp_path: Path) -> None:
    """The base's curve comes from a run that has a scan."""
    for name, finetune, scan in (("a", "full", {}), ("b", "lora", {"1": [3.0, 0.1], "2": [2.0, 0.1]})):
        content = evaluation_of(1.0, scan)
        content["scan"]["base"] = scan
        make_run(tmp_path / name, finetune=finetune).evaluation.write_text(json.dumps(content))
    labels = [
        attributes.get("aria-label") or "" for tag, attributes in page_of(tmp_path).tags if tag == "svg"
    ]
    (label,) = (label for label in labels if label.startswith("Distance over the scale"))
    assert "LoRA" in label and "untouched base" in label and "all weights" not in label


def test_models_of_one_name_are_told_apart_and_inception_features_give_fid(tmp_path: Path) -> None:
    for place, rank in enumerate((4, 8, 16)):
        run = make_run(tmp_path / f"rank {rank}", lora__rank=rank)
        content = evaluation_of(1.0, {"1": [3.0 + place, 0.1]}) | {"features": "inception"}
        run.evaluation.write_text(json.dumps(content))
    page = page_of(tmp_path)
    assert "KID to real images" in page.text and "FID 150.0 (116.5)" in page.text
    for rank in (4, 8, 16):
        assert f"LoRA, trained at guidance 1, rank {rank} is closest to real images" in page.text


def test_an_evaluation_older_than_the_run_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    content = evaluation_of(1.0, {"1": [3.0, 0.1]})
    run.evaluation.write_text(json.dumps(content | {"weights": run.weights}))
    assert "12 samples per cell" in page_of(run.path).text
    run.evaluation.write_text(json.dumps(content | {"weights": "f" * 64}))
    page = page_of(run.path)
    assert "evaluation.json is older than the run, which was trained further: ghibli evaluate" in page.text
    assert "12 samples per cell" not in page.text


def test_settings_are_those_that_differ_from_the_defaults(tmp_path: Path) -> None:
    settings = page_of(make_run(tmp_path / "run", loss__guidance=7.5).path).text
    listed = settings.partition("Settings that differ from the defaults")[2].partition(
        "settings that can change"
    )[0]
    assert "lora.rank 4 (default 32)" in listed and "loss.guidance 7.5 (default 1" in listed
    assert "finetune" not in listed  # lora is the default


def test_the_scale_rule_is_tested_against_the_errors() -> None:
    ordinary = [(1.0, 3.0, 0.1), (2.0, 2.0, 0.1), (4.0, 1.0, 0.1)]
    middle = 2 * math.sqrt(2)  # halfway on the logarithmic axis
    assert text.interpolate(ordinary, middle) == pytest.approx((1.5, 0.1))
    holds, said = text.scale_rule_verdict(ordinary, [(0.5, 9.0, 0.1), (1.0, 3.1, 0.1), (middle, 1.7, 0.1)])
    assert holds and said == "at the 2 points they share, nothing contradicts the rule"
    holds, said = text.scale_rule_verdict(ordinary, [(1.0, 3.0, 0.1), (middle, 2.0, 0.1)])
    assert not holds and "1 differ by more than chance, most clearly at s / w = 2.83" in said
    assert "+0.50 +- 0.14" in said
    assert (
        text.scale_rule_verdict(ordinary, [(0.1, 1.0, 0.1)]) is None
        and text.scale_rule_verdict([], ordinary) is None
    )


def test_numbers_are_typeset_and_dates_and_paths_are_not() -> None:
    assert text.typeset("-4.1 % +- 0.3 %") == "\u22124.1\u00a0%\u00a0\u00b1\u00a00.3\u00a0%"
    assert text.typeset("2026-11-24 lr=1e-4 a/-5") == "2026-11-24 lr=1e-4 a/-5"
    assert text.prose("`a <b> +- 1` or ` -1") == text.escape(
        "`a <b> \u00b1 1` or ` \u22121".replace(" \u00b1 ", "\u00a0\u00b1\u00a0")
    )


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no such folder"):
        page.write([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="that is a folder"):
        page.write([tmp_path / "run"], tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, code in ((["run"], 0), (["run", "empty"], 2)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ghibli", "report", *arguments])
        with pytest.raises(SystemExit) as leave:
            main.main()
        assert leave.value.code == code
    said = capsys.readouterr()
    assert said.out.startswith("wrote run/report.html") and said.err.count("\n") == 1
    assert "empty is neither a run nor a study" in said.err


def test_negative_effects_are_on_their_scale() -> None:
    """A ranking cuts values far below its best; a table of effects may hold nothing else."""
    effects = [Gain(-0.085, 0.002), Gain(-0.01, 0.002)]
    low, high = charts.common_scale(effects, cut=False)
    assert low <= -0.085 and high >= 0
    assert charts.common_scale([Gain(0.1, 0.01), Gain(-9.0, 0.1)])[0] > -9
