"""Synthetic run folders and an HTML parser for the tests of `ghibli report`."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import torch
import yaml
from PIL import Image

from ghibli.evaluation.gain import Probe, best_epoch
from ghibli.report import page
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_rows, write_with_checksum
from ghibli.training.callbacks.metrics import METRICS, probe_values

EVIL = "<script>alert(1)</script>\"' onload=alert(2) {{ 7 * 7 }} &amp;"
BREAK = "\u200b"  # stands for <wbr>, where a word may be broken
VOID = {"meta", "link", "img", "input", "br", "wbr"}
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
    """Create a run folder with these held-out gains (the untouched model's first) and its checkpoints.

    Args:
        changes: entries of status.json; with a double underscore, such as `lora__rank`, settings.
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
    best = best_epoch(history)
    content = {"probe": [vars(probe) for probe in history[: best + 1]]}
    write_with_checksum(run.best_checkpoint, lambda file: torch.save(content, file))
    write_with_checksum(run.last_checkpoint, lambda file: torch.save(content, file))
    run.samples.mkdir()
    for name in ("epoch_001.png", "adapter.png"):
        Image.new("RGB", (60, 40), (200, 30, 90)).save(run.samples / name)
    return run


def probe_of(gain: float) -> Probe:
    """Create scores of 8 images that are better than the base by about `gain`."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand((8, 4), generator=generator) + 0.5
    ours = base * (1 - gain * (1 + 0.1 * torch.rand((8, 4), generator=generator)))
    return Probe(ours, ours, ours, base, base)


def cell(sampler: str, guidance: float, kernel: float, **more: object) -> dict:
    row = {"sampler": sampler, "guidance": guidance, "kernel": [kernel, 0.21], "frechet": 150.04}
    return row | {"caption_fit": [74.4, 2.9], "precision": 0.2, "recall": 0.95, "copying": 1.07} | more


def evaluation_of(guidance: float, scan: dict[str, list[float]]) -> dict:
    """Create the content of an evaluation.json."""
    own = [cell("ddim", 1.0, 2.5), cell("ddim", 7.5, 0.48, kernel_minus_base=[-3.7, 1.3], copying=0.41)]
    return {
        "features": "style", "reference_images": 16, "samples": 12, "num_inference_steps": 8,
        "training_guidance": guidance,
        "real": {"kernel": [0.06, 0.16], "frechet": 116.47, "caption_fit": [83.7, 2.1], "recall": 1.0},
        "models": {"base": [cell("ddim", 1.0, 11.4), cell("ddim", 7.5, 4.3)], "run": own},
        "scan": {"base": {"1": [11.0, 1.0], "7.5": [4.0, 0.5]}, "run": scan},
        "findings": [{"name": "few images", "text": "12 images are few"}],
    }  # fmt: skip


class Page(HTMLParser):
    """The text and tags of a page; fails if a tag is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.tags, self.open, self.source = [], [], [], text
        self.feed(text)
        assert not self.open
        text = " ".join(self.words).replace("\u00a0", " ").replace(f" {BREAK} ", "")
        self.text = " ".join(text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words += [BREAK] if tag == "wbr" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(*folders: Path, out: Path | None = None) -> Page:
    return Page(page.write(list(folders), out).read_text())
