"""The `ghibli` command: its help, in a sensible order and at once, and shell completion."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO, run_python
from typer.main import get_command
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.cli.options import PANELS
from ghibli.config.schema import CONFIG_VERSION
from ghibli.runs.folder import RunDir

ORDER = [name for names in PANELS.values() for name in names]
SLOW = ("torch", "numpy", "hydra", "omegaconf", "PIL", "scipy")  # to import
ANSWER = f"""
import json, sys
from typer.testing import CliRunner
from ghibli.cli.main import app
codes = [CliRunner().invoke(app, [word]).exit_code for word in ("--help", "list")]
print(json.dumps([codes, [name for name in {SLOW} if name in sys.modules]]))
"""
TRAINING = ("torch", "diffusers", "lightning", "transformers", "wandb", "scipy")
TYPO = f"""
import json, runpy, sys
sys.argv = ["train.py", "lora.rnk=4"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, [name for name in {TRAINING} if name in sys.modules]]))
"""


def test_every_command_has_a_place_in_the_help() -> None:
    assert sorted(get_command(app).commands) == sorted(ORDER)


def test_the_help_lists_commands_by_panel() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    lines = [line.strip("│ ").split(" ")[0] for line in text.splitlines() if line.startswith("│ ")]
    assert [word for word in lines if word in ORDER] == ORDER
    assert all(panel in text for panel in PANELS)


def test_help_and_list_load_nothing_slow(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "outputs" / "train" / "a")
    run.status.update(state="finished", gain=0.1, gain_se=0.01, config_version=CONFIG_VERSION)
    done = run_python("-c", ANSWER, cwd=tmp_path)
    assert json.loads(done.stdout) == [[0, 0], []], done.stderr


@pytest.mark.parametrize("words", [[], ["list"], ["demo", "draw"]])
def test_h_is_help(words: list[str]) -> None:
    answers = [CliRunner().invoke(app, [*words, flag]) for flag in ("-h", "--help")]
    assert answers[0].exit_code == 0 and answers[0].output == answers[1].output


def test_a_typo_loads_nothing_slow() -> None:
    done = run_python("-c", TYPO)
    assert json.loads(done.stdout) == [2, []], done.stderr
    assert "did you mean rank?" in done.stderr


def test_help_of_sweep_is_its_own_and_the_pipe_may_close() -> None:
    for script, first in (("train.py", "Train a LoRA"), ("sweep.py", "Train a grid of runs")):
        words = [sys.executable, script, "--help"]
        shell = f"{shlex.join(words)} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], cwd=REPO, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(first)
        help_of = {flag: run_python(script, flag).stdout for flag in ("-h", "--help")}
        assert help_of["-h"] == help_of["--help"]


def test_the_shell_can_complete_commands() -> None:
    environment = {"_GHIBLI_COMPLETE": "complete_bash", "COMP_WORDS": "ghibli ex", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="ghibli")
    assert result.output.split() == ["export", "extract"]
