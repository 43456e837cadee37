"""The `ghibli` command: its help, in a sensible order and at once, and shell completion."""

import json
from pathlib import Path

from helpers.commands import run_python
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


def test_the_shell_can_complete_commands() -> None:
    environment = {"_GHIBLI_COMPLETE": "complete_bash", "COMP_WORDS": "ghibli ex", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="ghibli")
    assert result.output.split() == ["export", "extract"]
