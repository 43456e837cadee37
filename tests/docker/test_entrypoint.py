"""What `docker run IMAGE WORDS` starts, and that its image is given all that an installation runs."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers.commands import REPO

ENTRYPOINT = REPO / "docker" / "entrypoint"


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["train", "sample.prompts=[a sea]", "seed=4"], "python|train.py|sample.prompts=[a sea]|seed=4"),
        (["sweep", "lora.rank=4,8"], "python|sweep.py|lora.rank=4,8"),
        (["list"], "ghibli|list"), (["--help"], "ghibli|--help"), ([], "ghibli"),
    ],
)  # fmt: skip
def test_words_become_a_command(words: list[str], started: str, tmp_path: Path) -> None:
    """In its place, so that `docker stop` reaches the training, and with its exit code."""
    for name in ("python", "ghibli"):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\nprintf "{name}"\nprintf "|%s" "$@"\nprintf " $$"\nexit 3\n')
        stand_in.chmod(0o755)
    given = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen([ENTRYPOINT, *words], env=given, stdout=subprocess.PIPE, text=True)
    told, _ = process.communicate(timeout=30)
    command, _, number = told.rpartition(" ")
    assert (command.rstrip("|"), int(number), process.returncode) == (started, process.pid, 3)


def test_the_image_gets_what_it_copies() -> None:
    """By .dockerignore, which leaves out all but what it lists."""
    lines = (REPO / ".dockerignore").read_text().splitlines()
    given = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines and "conf/local" in lines[lines.index("!conf") :]
    copied = [
        word
        for line in (REPO / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    for name in [*given, *copied]:
        assert (REPO / name).exists(), name
        assert name == "." or any(name == one or name.startswith(f"{one}/") for one in given), name
    needed = {"train.py", "sweep.py", "conf", "ghibli", "docker", "pyproject.toml", "README.md", "LICENSE"}
    assert needed <= set(given)
