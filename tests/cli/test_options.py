"""The `ghibli` command: its help, in a sensible order and without loading torch, and shell completion."""

import json

from helpers.commands import run_python
from typer.main import get_command
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.cli.options import PANELS

ORDER = [name for names in PANELS.values() for name in names]
HELP = """
import json, sys
from typer.testing import CliRunner
from ghibli.cli.main import app
result = CliRunner().invoke(app, ["--help"])
print(json.dumps([result.exit_code, "torch" in sys.modules]))
"""


def test_every_command_has_a_place_in_the_help() -> None:
    assert sorted(get_command(app).commands) == sorted(ORDER)


def test_the_help_lists_commands_by_panel() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    lines = [line.strip("│ ").split(" ")[0] for line in text.splitlines() if line.startswith("│ ")]
    assert [word for word in lines if word in ORDER] == ORDER
    assert all(panel in text for panel in PANELS)


def test_the_help_does_not_load_torch() -> None:
    done = run_python("-c", HELP)
    assert json.loads(done.stdout) == [0, False], done.stderr


def test_the_shell_can_complete_commands() -> None:
    environment = {"_GHIBLI_COMPLETE": "complete_bash", "COMP_WORDS": "ghibli ex", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="ghibli")
    assert result.output.split() == ["export", "extract"]
