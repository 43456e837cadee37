"""Commands to print, quoted so that bash and our own command line take them as they were meant."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

SAFE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # what needs no quotes in bash, as in shlex
ROOT, SCRIPTS = Path(__file__).resolve().parents[2], ("train.py", "sweep.py")
MEANT_OTHERWISE = ("", "latest", "null")  # values of a path key that name no folder


def command_line(*words: str | Path) -> str:
    """Return the command made of these words, to be pasted into bash: each is quoted if it must be.

    A path that begins with a dash gets ./ before it, lest it be an option.
    """
    plain = (f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word) for word in words)
    return " ".join(map(quoted, plain))


def command_here(name: str, *words: str | Path) -> str:
    """Return command_line for the shell that this process was started from.

    Args:
        name: python, ghibli, wandb, ... If that shell would not find this installation's, as before
            `source .venv/bin/activate`, its path takes the place of the name.
    """
    return command_line(*program(name), *map(script, words))


def script(word: str | Path) -> str | Path:
    """Return a word of a command; of train.py or sweep.py the path, if the current folder has none."""
    if word not in SCRIPTS or Path(word).is_file() or not (ROOT / word).is_file():
        return word
    return short_path(str(ROOT / word))


def program(name: str) -> list[str]:
    """Return the words that start a program of this installation from the shell at hand."""
    folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found is not None and Path(found).parent.resolve() == folder.resolve():
        return [name]
    beside = shutil.which(name, path=str(folder))
    if name == "python":
        return [short_path(beside or sys.executable)]
    if beside is None and name == "ghibli":  # the package is on the path, but was not installed
        return [*program("python"), "-m", "ghibli"]
    return [name if beside is None else short_path(beside)]


def short_path(path: str) -> str:
    """Return a path to a program relative to the current folder where it lies in it, else as it is."""
    place, here = Path(path), Path.cwd()
    if not place.is_relative_to(here):
        return path
    short = place.relative_to(here)
    return f"./{short}" if len(short.parts) == 1 else str(short)  # without a slash bash would look in PATH


def install_command(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml into this environment."""
    return command_here("python", "-m", "pip", "install", "-e", f".[{extra}]")


def list_hint() -> str:
    """Return the words that end a message about a run which is not there."""
    return f"(`{command_here('ghibli', 'list')}` shows the runs)"


def quoted(word: str) -> str:
    """Quote one word for bash, on one line and in printable characters.

    What a terminal would not show as it is (control characters, bytes that are no UTF-8, unusual or several
    spaces) becomes an escape of bash's $'...' quotes.
    """
    if SAFE.fullmatch(word):
        return word
    plain = word.isprintable() and "  " not in word and word == word.strip()
    return shlex.quote(word) if plain else f"$'{''.join(map(escaped, spaced(word)))}'"


def spaced(word: str) -> list[str]:
    """Split a word into characters, with every space beside another one or at an end as a newline of its own.

    A message is put on one line by joining what stands between white space, so only single spaces survive.
    """
    ends = (0, len(word) - 1)
    return [
        "\x20\x00" if letter == " " and (at in ends or word[at - 1] == " ") else letter
        for at, letter in enumerate(word)
    ]


def escaped(letter: str) -> str:
    """Return a character as it stands between $' and ': itself, or its bytes."""
    if letter in ("'", "\\"):
        return f"\\{letter}"
    if letter == "\x20\x00":
        return r"\x20"
    return letter if letter.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


def path_setting(key: str, path: str | Path) -> str:
    """Return KEY=PATH as a user types it; a relative path that reads as something else gets ./ before it."""
    text = os.fspath(path)
    is_odd = text in MEANT_OTHERWISE or text.startswith(("~", "'", '"'))
    return f"{key}=./{text}" if is_odd else f"{key}={text}"


def resume_command(folder: Path) -> str:
    """Return the command that resumes the run in a folder, given relative to the current one."""
    return command_here("python", *resume_words(folder))


def resume_words(folder: Path) -> tuple[str, str]:
    """Return what follows `python` in the command that resumes the run in a folder."""
    return "train.py", path_setting("resume", os.path.relpath(folder))
