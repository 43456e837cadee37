r"""Writing to the terminal: it never ends a command, and what is printed never controls the terminal.

A closed pipe (`| head -1`), a terminal that is gone, a full disk behind `> log.txt`, characters that the
terminal's encoding lacks: none of them is a reason to lose a training. And what is printed may come from
strangers (captions, file names, status.json, titles of adapters), so control characters are shown as
`\x1b` instead of being obeyed.
"""

import atexit
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO, cast

# C0 and C1 but tab and newline; marks, embeddings, overrides and isolates of bidirectional text; the line
# and paragraph separators; halves of surrogate pairs, which file names that are no UTF-8 contain
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)
COLOURS_AND_BARS = re.compile(r"\x1b\[[0-9;]*[mAK]|\r")  # what libraries' own progress bars write
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESHUTDOWN, errno.ECONNRESET)
FAILURES = (OSError, ValueError, RuntimeError)  # gone; closed; a signal arrived within a write


def visible(text: str) -> str:
    r"""Return the text with control characters as escapes such as `\x1b`; newlines and tabs stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """Return foreign data, such as a file name or a title, as one line without control characters."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def visible_but_bars(text: str) -> str:
    """Return the text with control characters visible, except colours and the cursor of progress bars."""
    parts, end = [], 0
    for found in COLOURS_AND_BARS.finditer(text):
        parts += [visible(text[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, visible(text[end:])])


class Terminal:
    """A text stream in place of sys.stdout or sys.stderr: its writes never raise.

    What is printed on it has its control characters made visible. rich looks for `rich_proxied_file` and
    writes there instead, since its colours are control characters; `console` makes its texts visible first.
    """

    def __init__(self, stream: TextIO, raw: bool = False):
        self.stream, self.raw = stream, raw

    @property
    def rich_proxied_file(self) -> "Terminal":
        return Terminal(self.stream, raw=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self.raw:
            text = visible_but_bars(text) if self.isatty() else visible(text)
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.attempt("write", text.encode(encoding, "backslashreplace").decode(encoding))
        except FAILURES as error:
            self.give_up(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.attempt("flush")

    def isatty(self) -> bool:
        with suppress(*FAILURES):
            return self.stream.isatty()
        return False

    def attempt(self, method: str, *arguments: str) -> None:
        try:
            getattr(self.stream, method)(*arguments)
        except FAILURES as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Send all further output nowhere if the other end is gone; a full disk may have room again later."""
        if isinstance(error, OSError) and error.errno in GONE:
            with suppress(OSError, ValueError):  # under the descriptor, as others may hold the stream too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


class VisibleRecord(logging.LogRecord):
    """A log record, of any library, whose message has its control characters visible.

    `Terminal` lets colours and the cursor of progress bars through; a message may quote data that has both.
    """

    def getMessage(self) -> str:
        return visible(super().getMessage())


def guard_terminal() -> None:
    """Put `Terminal`s in the place of stdout and stderr, also for tracebacks; once per process is enough.

    What libraries log and warn of is made visible before it gets there.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before Python started: the next file opened would be taken for it
            stream = open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, Terminal):
            setattr(sys, name, cast(TextIO, Terminal(stream)))
    if sys.excepthook is not print_traceback:
        sys.excepthook = print_traceback
        atexit.register(flush_or_drop)
        logging.setLogRecordFactory(VisibleRecord)
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda *words, **options: visible(format_warning(*words, **options))


def print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print a traceback on stderr; its message may quote data, so control characters are made visible."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, where))))


def flush_or_drop() -> None:
    """Flush at the end of the process; drop what cannot be written, which would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        inner = stream.stream if isinstance(stream, Terminal) else None
        if inner is None:
            continue
        try:
            inner.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, inner.fileno())
                inner.flush()
