r"""What is printed never ends a command, and never controls the terminal: by real processes and terminals.

The bytes are those a terminal gets: ECMA-48 gives ESC and the C1 controls their power, UAX #9 the overrides.
"""

import errno
import io
import json
import logging
import os
import pty
import subprocess
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.commands import REPO, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.runtime import terminal
from ghibli.runtime.console import PlainConsole, counted, full_width, make_bar
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.terminal import Terminal, one_line, visible

SHORT = (*SMALL, "data.draw=null", "sample.every_n_epochs=0", "trainer.max_epochs=1", "data.workers=0")
CLEAR, CLIPBOARD, OVERRIDE = "\x1b[2J", "\x1b]52;c;cm0gLXJm\x07", "\u202egpj.exe"
EVIL = f"[/INST][a]{CLEAR}{CLIPBOARD}{OVERRIDE}\x9b2J\udce9"


def is_inert(text: str) -> bool:
    """Whether a text has no control, format-override or surrogate character, by the Unicode database."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return not any(
        (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and char not in "\n\t")
        or unicodedata.bidirectional(char) in bidi
        for char in text
    )


# One place makes data visible


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters()) | st.text("\x1b[\r\n\x07\x9b\u202e\u2028\udce9]amK;5", max_size=20))
def test_visible_text_is_inert_and_else_unchanged(text: str) -> None:
    shown = visible(text)
    assert is_inert(shown) and "\n" not in one_line(text)
    shown.encode()
    assert visible(shown) == shown
    if is_inert(text) and text.isascii():
        assert shown == text


def test_tables_bars_and_messages_show_data_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the column is measured: the escape is as wide as it looks."""
    console, safe = PlainConsole(), visible(EVIL)
    table = Table(EVIL, "x", title=EVIL, box=None, pad_edge=False)
    table.add_row(EVIL, "[bold]b[/bold] lora.targets=[to_q]")
    console.print(full_width(table))
    console.print(EVIL, style="bold")
    logging.getLogger("ghibli.tests").warning(EVIL)
    said = capsys.readouterr().out
    assert is_inert(said) and said.count(safe) == 5
    assert "[bold]b[/bold] lora.targets=[to_q]" in said


def test_a_progress_bar_with_markup_in_its_label_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn on a terminal: elsewhere there is none. Its note too, which is the loss or a caption."""
    drawn = io.StringIO()
    on_terminal = PlainConsole(file=drawn, force_terminal=True, width=100, legacy_windows=False)
    monkeypatch.setattr("ghibli.runtime.console.console", on_terminal)
    with counted(f"[/INST]{CLEAR}") as on_progress:
        on_progress(1, 2)
    with make_bar() as bar:
        bar.update(bar.add_task("x", total=2, note=f"[a] [/b]{CLEAR}"), completed=1)
    assert "[/INST]\\x1b[2J" in drawn.getvalue() and "[a] [/b]" in drawn.getvalue()
    assert CLEAR not in drawn.getvalue()


def test_a_terminal_of_no_width_gets_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As within Emacs, or in a container without a terminal."""
    monkeypatch.setenv("COLUMNS", "0")
    table = Table("name", box=None, pad_edge=False)
    table.add_row("x" * 100)
    console = PlainConsole()
    console.print(full_width(table))
    console.print("y" * 100)
    assert capsys.readouterr().out.split() == ["name", "x" * 100, "y" * 100]


def test_errors_and_tracebacks_are_visible(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: Exception) -> None:
        raise error

    for error in (UserError(EVIL), OSError(errno.ENOSPC, "full", EVIL)):
        with pytest.raises(SystemExit):
            one_line_errors(lambda error=error: raises(error))
    said = capsys.readouterr().err
    assert is_inert(said) and "\\x1b[2J" in said
    try:
        raise RuntimeError(EVIL)
    except RuntimeError as caught:
        terminal.print_traceback(RuntimeError, caught, caught.__traceback__)
    said = capsys.readouterr().err
    assert is_inert(said) and "\\x1b[2J" in said and "RuntimeError" in said


QUOTES = """
import logging, sys, warnings
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.console import console
def say():
    evil = "a\\x1b[9A\\x1b[2K\\rforged\\x1b[8m"
    logging.getLogger("transformers").warning(evil)
    logging.getLogger("ghibli").warning(evil)
    warnings.warn(evil)
    console.print(evil)
    try:
        raise RuntimeError(evil)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    raise UserError(evil)
one_line_errors(say)
"""


def test_what_libraries_log_or_warn_of_moves_no_cursor_of_a_terminal() -> None:
    """A terminal gets colours and the cursor of bars, but not out of a name of a weight or of a file."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", QUOTES]
    quoting = subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    with suppress(OSError):  # EIO: the end, as Linux has it
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert quoting.wait(60) == 2
    assert said.count(b"forged") == 6 and said.count(b"a\\x1b[9A\\x1b[2K") == 6
    assert b"\x1b[9A" not in said and b"\rforged" not in said and b"\x1b[8m" not in said


# A stream that fails


class Failing:
    """A stream whose other end is gone, full, or in the middle of a write that a signal interrupted."""

    encoding = "utf-8"

    def __init__(self, error: Exception):
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        raise self.error

    def fileno(self) -> int:
        raise OSError(errno.EBADF, "no descriptor")


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, "x")
            for number in (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF, errno.EAGAIN)
        ),
        ValueError("I/O operation on closed file"),
        RuntimeError("reentrant call inside <_io.BufferedWriter>"),
    ],
)
def test_a_stream_that_fails_is_given_up(error: Exception) -> None:
    stream = Terminal(Failing(error))
    print("here", file=stream, flush=True)
    PlainConsole(file=stream).print("here", style="red")
    stream.writelines(["a"])
    assert not stream.isatty()


def piped(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = os.environ | {"PYTHONPATH": str(REPO), "PY": sys.executable} | environment
    script = f"set -o pipefail; {command}"
    return subprocess.run(["bash", "-c", script], cwd=REPO, env=variables, capture_output=True, timeout=200)


PRINTS = (
    "import sys\n"
    "from ghibli.runtime.errors import one_line_errors\n"
    "from ghibli.runtime.console import console\n"
    "def say():\n"
    "    for i in range(3000): console.print('x' * 99); print('y' * 99); print('z', file=sys.stderr)\n"
    "    sys.exit(7)\n"
    "one_line_errors(say)"
)


@pytest.mark.parametrize(
    "redirection",
    [
        "| head -1",
        "2>&1 | head -1",
        ">/dev/full",
        "2>/dev/full >/dev/full",
        ">&-",
        ">&- 2>&-",
        "2>&- | head -1",
    ],
)
def test_the_exit_code_is_the_commands_own(redirection: str) -> None:
    """A reader that leaves, a full disk, a descriptor that was closed: nothing is said about them."""
    done = piped(f'"$PY" -c "$PRINTS" {redirection}', PRINTS=PRINTS)
    assert done.returncode == 7
    assert set(done.stderr.split()) <= {b"z"}


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show(tmp_path: Path, encoding: str) -> None:
    """`list` of a run with Japanese, broken and hostile text, on a terminal that knows Western letters."""
    run = tmp_path / "outputs" / "a[b]\udce9\x1b[2J"
    run.mkdir(parents=True)
    (run / "status.json").write_text(
        json.dumps({"settings": f"ジブリ {EVIL}", "epoch": 2, "state": "x\x1b[2J"})
    )
    done = piped(f'cd {tmp_path} && "$PY" -m ghibli list', PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode(encoding)
    assert is_inert(said)
    said = "".join(said.split())  # a cell folds
    assert "[/INST][a]\\x1b[2J" in said and "a[b]\\udce9\\x1b[2J" in said
    assert ("ジブリ" if encoding == "utf-8" else "\\u30b8\\u30d6\\u30ea") in said
    done = piped(f'cd {tmp_path} && "$PY" -m ghibli list | head -c 1', PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")


def images_with_hostile_names(folder: Path) -> Path:
    write_folder(folder, "drawn", 12, FINETUNE_SEEDS.start)
    (folder / "images" / f"ジブリ{CLEAR}.png").write_bytes(b"")  # unusable, so it is named
    with open(folder / "captions.txt", "a", encoding="utf-8") as file:
        file.write(f"scene_1000000.png|[/INST] {CLEAR}\n")
    return folder


@pytest.mark.slow
def test_a_training_whose_reader_leaves_goes_on(tmp_path: Path) -> None:
    images = images_with_hostile_names(tmp_path / "images")
    words = " ".join([*SHORT, f"data.root={images}", f"hydra.run.dir={tmp_path / 'run'}"])
    done = piped(f'"$PY" train.py {words} 2>&1 | head -c 1', PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_training_whose_terminal_closes_goes_on_under_nohup(tmp_path: Path) -> None:
    """Writing to it fails with EIO, which is no trouble of a disk; a bar was being drawn on it."""
    images = images_with_hostile_names(tmp_path / "images")
    words = [*SHORT, f"data.root={images}", f"hydra.run.dir={tmp_path / 'run'}"]
    ours, theirs = pty.openpty()
    ignoring = 'trap "" HUP; exec "$@"'  # as nohup does, which would write to a file instead
    command = ["bash", "-c", ignoring, "bash", sys.executable, str(REPO / "train.py"), *words]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    training = subprocess.Popen(command, cwd=REPO, start_new_session=True, **streams)
    os.close(theirs)
    assert os.read(ours, 1)  # its first sign of life
    os.close(ours)
    assert training.wait(200) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
