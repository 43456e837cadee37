"""What the package prints and logs: text as it is, never markup, in the colour of its level."""

import io
import logging
import sys

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ghibli.runtime import console as console_module

logger = logging.getLogger("ghibli.tests.console")
handler = next(
    handler
    for handler in logging.getLogger("ghibli").handlers
    if isinstance(handler, console_module.LineHandler)
)


@pytest.mark.parametrize(
    "message",
    ["lora.targets=[to_q,to_v]: 50 % of [red]it[/red] [/]", "word " * 60 + "end", ":smile: a", "%s %d"],
)
def test_a_message_is_printed_as_it_is(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger.info(message)
    logger.warning(message)
    logger.debug(message)
    console_module.console.print(message)
    assert capsys.readouterr() == (f"{message}\n" * 3, "")


def test_a_logged_name_adds_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A file may be called anything; what it is called must not read as a message of its own."""
    logger.warning("a\nerror: the disk is full.png (it is damaged)")
    assert capsys.readouterr().out == "a\\nerror: the disk is full.png (it is damaged)\n"


def test_it_follows_the_stdout_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        logger.info("here")
        assert sys.stdout.getvalue() == "here\n"


@pytest.mark.parametrize(
    ("level", "style"), [(logging.INFO, None), (logging.WARNING, "yellow"), (logging.ERROR, "red")]
)
def test_colours_on_a_terminal(level: int, style: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as console.print with a style; numbers and paths are not highlighted."""
    message = "GET /a/b: 12.5 % 'x' None http://c"
    logged, printed = (
        Console(
            file=io.StringIO(), force_terminal=True, color_system="standard", soft_wrap=True, highlight=False
        )
        for _ in range(2)
    )
    monkeypatch.setattr(handler, "console", logged)
    logger.log(level, message)
    printed.print(message, style=style)
    assert logged.file.getvalue() == printed.file.getvalue()
    assert ("\x1b[" in logged.file.getvalue()) == (style is not None)


def test_a_quiet_console_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Further processes of a run say nothing."""
    monkeypatch.setattr(console_module.console, "quiet", True)
    logger.warning("here")
    assert capsys.readouterr() == ("", "")


def test_the_root_logger_stays_out_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra and other libraries put handlers there; no line appears twice."""
    root, stream = logging.getLogger(), logging.StreamHandler(io.StringIO())
    root.addHandler(stream)
    try:
        logger.warning("once")
    finally:
        root.removeHandler(stream)
    assert capsys.readouterr().out == "once\n" and stream.stream.getvalue() == ""


@pytest.mark.parametrize(("done", "shown"), [(3, "0:00:09 left"), (12, ""), (0, "")])
def test_a_bar_says_what_is_left_and_never_what_it_took(done: int, shown: str) -> None:
    """One step a second on a clock of its own; at 12 of 12 nothing is left."""
    clock = iter(range(100))
    bar = Progress(console_module.TimeLeftColumn(), get_time=lambda: float(next(clock)))
    task = bar.add_task("training", total=12)
    for _ in range(done):
        bar.advance(task)
    assert console_module.TimeLeftColumn().render(bar.tasks[0]).plain == shown


def printed(width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Print a table of two names that may wrap and a number that may not."""
    output = io.StringIO()
    console = console_module.PlainConsole(file=output, force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr("ghibli.runtime.console.console", console)
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    table.add_column("peak memory", no_wrap=True)
    table.add_row("LoRA rank 16, guidance 7.5", "12.3 MB +- 0.1")
    table.add_row("base", "1.0 MB +- 0.1")
    console.print(console_module.full_width(table))
    return [line.rstrip() for line in output.getvalue().splitlines()]


@pytest.mark.parametrize("width", [20, 32, 40, 80])
def test_names_wrap_between_words_and_numbers_stay_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(width, monkeypatch)
    least = len("guidance") + 2 + len("12.3 MB +- 0.1")  # the longest word, the gap and the number
    assert max(map(len, lines)) <= max(width, least)
    number = lines[0].index("peak memory")
    assert " ".join(" ".join(line[:number] for line in lines).split()) == (
        "model LoRA rank 16, guidance 7.5 base"
    )
    assert [line[number:] for line in lines if line[number:]] == [
        "peak memory", "12.3 MB +- 0.1", "1.0 MB +- 0.1"
    ]  # fmt: skip
    assert (len(lines) == 3) == (width >= 42)
