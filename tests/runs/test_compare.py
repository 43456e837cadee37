"""`ghibli compare`: what differs between two runs, and what that says about their results."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ghibli.cli import main, runs
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import PlainConsole

STATUS = {
    "state": "finished", "epoch": 2, "gain": 0.25, "gain_se": 0.01, "base_hash": "b", "data_hash": "d",
    "code": "c" * 64, "git_commit": "a" * 40, "git_dirty": False, "versions": {"torch": "2.0", "numpy": "1"},
    "machine": "Linux", "processor": "one", "threads": 2, "device": "cpu", "devices": 1,
    "precision": "32-true",
}  # fmt: skip
SETTINGS = {"seed": 0, "lora": {"rank": 4}, "wandb": {"project": "x"}, "data": {"root": "images"}}
METRICS = "step,epoch,train/loss,time/images_per_second\n1,0,0.5,{speed}\n2,0,{loss},{speed}\n"


def make_run(folder: Path, speed: int = 1, loss: float = 0.4, rank: int = 4, **status: object) -> None:
    run = RunDir(folder)
    run.status.update(**(STATUS | status))
    run.status.note_start()
    run.config.write_text(yaml.safe_dump(SETTINGS | {"lora": {"rank": rank}}))
    run.metrics.write_text(METRICS.format(speed=speed, loss=loss))
    run.adapter.mkdir()
    (run.adapter / "pytorch_lora_weights.safetensors").write_bytes(b"weights")


@pytest.fixture
def compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Run `ghibli compare a b` with these changes in b: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")

    def run(*words: str, **changes: object) -> tuple[int, str]:
        if changes:
            make_run(tmp_path / "b", **changes)
        monkeypatch.setattr(sys, "argv", ["ghibli", "compare", *(words or ("a", "b"))])
        with pytest.raises(SystemExit) as leave:
            main.main()
        said = capsys.readouterr()
        return leave.value.code, " ".join((said.out + said.err).split())

    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": 9}, ["same settings, code, versions, data and machine", "bit-identical, and they are"]),
        ({"git_commit": "e" * 40}, ["git_commit aaaaaaa eeeeeee", "bit-identical, and they are"]),
        ({"loss": 0.41}, ["but metrics.csv differs at step 2: this is a bug"]),
        ({"loss": 0.41, "rank": 8}, ["lora.rank 4 8", "differ in settings: this can change the result"]),
        ({"rank": 8}, ["differ in settings: this can change the result; yet the results are bit-identical"]),
        ({"code": "f" * 64, "threads": 1}, ["code ccccccc fffffff", "code, machine: each can change"]),
        ({"versions": {"torch": "2.1", "numpy": "1"}}, ["versions.torch 2.0 2.1", "differ in versions"]),
        ({"data_hash": "other", "base_hash": "x"}, ["base_hash b x", "differ in base, images: each"]),
        ({"grown": [[5, 1, 2]]}, ["differ in epochs added on resume"]),
        ({"state": "interrupted"}, ["state finished interrupted", "once both are finished"]),
        ({"gain": 0.5}, ["gain 25.0 % +- 1.0 % 50.0 % +- 1.0 %"]),
        ({"price": 1.2, "price_se": 0.1}, ["price - 120.0 % +- 10.0 %"]),
    ],
)
def test_differences_and_conclusion(compared: Callable, changes: dict, words: list[str]) -> None:
    code, said = compared(**changes)
    assert code == 0
    for word in words:
        assert word in said


def test_a_gpu_may_round_differently(compared: Callable, tmp_path: Path) -> None:
    for name, loss in (("a2", 0.4), ("b2", 0.41)):
        make_run(tmp_path / name, loss=loss, device="NVIDIA H100, highest")
    code, said = compared("a2", "b2")
    assert code == 0
    assert "metrics.csv differs at step 2, as sums on a GPU may round differently" in said
    assert "bug" not in said


def test_a_damaged_byte_in_metrics_csv_is_a_difference(compared: Callable, tmp_path: Path) -> None:
    make_run(tmp_path / "b")
    metrics = RunDir(tmp_path / "b").metrics
    metrics.write_bytes(metrics.read_bytes().replace(b"0.4", b"0.\xff"))
    code, said = compared()
    assert code == 0
    assert "but metrics.csv differs at step 2" in said


def test_a_run_resumed_on_another_machine(compared: Callable, tmp_path: Path) -> None:
    make_run(tmp_path / "b")
    RunDir(tmp_path / "b").status.note_start(processor="another", step=5)
    _, said = compared()
    assert "processor one one, then another" in said
    assert "they differ in machine" in said


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("a", "nowhere"), "error: nowhere: no such folder"),
        (("a", "empty"), "error: empty is not a run: it has no status.json and config.yaml"),
        (("cut", "a"), "error: cut/status.json is damaged: this run cannot be compared"),
        (("a", "unreadable"), "error: unreadable/config.yaml is damaged: this run cannot be compared"),
    ],
)
def test_what_cannot_be_compared(compared: Callable, tmp_path: Path, words: tuple, answer: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("cut", "unreadable"):
        make_run(tmp_path / name)
    (tmp_path / "cut" / "status.json").write_text('{"state": "fin')
    (tmp_path / "unreadable" / "config.yaml").write_text("seed: [")
    code, said = compared(*words)
    assert code == 2
    assert said.startswith(answer)


def test_what_differs_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two long paths that differ at their end, on a terminal of 80 columns; names are no difference."""
    for name, count in (("a", 72), ("b", 36)):
        make_run(tmp_path / name)
        root = {"root": f"/data/{'long/' * 20}scenes-drawn-{count}"}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": root, "name": name}))
    output = io.StringIO()
    terminal = PlainConsole(file=output, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(runs, "console", terminal)
    runs.compare_command(str(tmp_path / "a"), str(tmp_path / "b"))
    lines = output.getvalue().splitlines()
    table = lines[next(at for at, line in enumerate(lines) if line.startswith("differs")) :]
    table = table[: table.index("")]
    assert all(len(line) <= 80 for line in table)
    starts = [table[0].index(head) for head in ("differs", "A", "B")]
    keys, left, right = (
        "".join(line[start:end].strip() for line in table[1:])
        for start, end in zip(starts, [*starts[1:], None], strict=True)
    )
    assert keys == "data.root"
    assert left.endswith("long/scenes-drawn-72") and right.endswith("long/scenes-drawn-36")
