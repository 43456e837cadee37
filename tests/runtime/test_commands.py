"""Printed commands, pasted into bash, name the folder that was meant, whatever its name."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO, run_python
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ghibli.config.files import apply_overrides
from ghibli.config.schema import Config
from ghibli.config.typed_paths import PATH_KEYS, with_typed_paths
from ghibli.runs.compose import compose_config
from ghibli.runtime.commands import command_here, command_line, path_setting, quoted, resume_command
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import exists, expanded

ODD = "\t\n\x1b\x7f '\"$`\\!*?[](){}<>|&;#~=,:%@+^.-_aZ0\u00e9\u3000\u30b8\u202e\U0001f600\u2028\xa0"
LETTERS = st.one_of(st.sampled_from(ODD), st.characters(exclude_characters="/\0"))
NAMES = st.text(LETTERS, min_size=1, max_size=30)
SOME = [
    "naïve", "ジブリ", "(1)", "~", "~root", "a  b", " a ", "it's", "$x", "a\nb", "latest", "null", "1e3",
    "lora.rank=8,loss.guidance=7.5", "'a'", '"a"', "\\", "a\\'", "a\\\\", "\udce9", "#", "a,b", "[a]", "true",
]  # fmt: skip
PROGRAMS = ("python", "ghibli", "wandb", "tensorboard", "trackio")
STUB = "import os, sys; os.write(1, b'\\0'.join(map(os.fsencode, sys.argv[1:])))"


def can_be_a_name(name: str) -> bool:
    """Whether a folder can have it on this file system, as a name that Hydra can take."""
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:  # half of a surrogate pair, which no file name has
        return False
    return length <= 255 and name not in (".", "..") and "${" not in name


def pasted(command: str) -> list[str]:
    """The arguments that a program gets when the command is pasted into bash."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True, env={"PATH": os.defpath})
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")]


def value_in_hydra(override: str) -> object:
    """What a composed configuration holds after this override."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    cfg = OmegaConf.create({"path": None})
    OmegaConf.update(cfg, "path", parsed.value())
    return cfg.path


@given(st.lists(NAMES, min_size=25, max_size=25))
@example(SOME)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_resume_command_pasted_into_bash_names_the_folder(names: list[str]) -> None:
    """A batch of names in one bash; a stub echoes its arguments, which Hydra then parses."""
    folders = [Path(name) for name in names if can_be_a_name(name)]
    commands = [resume_command(folder) for folder in folders]
    assert all(command.isprintable() and " ".join(command.split()) == command for command in commands)
    stub = "python() { printf '%s\\0' \"$@\"; }\n"
    words = pasted(stub + "\n".join(commands))[:-1]
    assert words[::2] == ["train.py"] * len(folders)
    for typed, folder in zip(words[1::2], folders, strict=True):
        for sweeps in (False,):
            (override,) = with_typed_paths([typed], sweeps)
            assert os.path.normpath(str(value_in_hydra(override))) == str(folder), (typed, override)
            assert with_typed_paths([override], sweeps) == [override]


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_quoting_is_that_of_the_shell(word: str) -> None:
    if word.isprintable() and "  " not in word and word == word.strip():
        assert shlex.split(quoted(word)) == [word]
    assert quoted(word).isprintable()


@pytest.mark.parametrize(
    ("typed", "sweeps", "expected"),
    [
        ("data.root=~/x (1)", False, f"data.root='{Path.home()}/x (1)'"),
        ("data.root=null", False, "data.root=null"),
        ("model.path=OWNER/NAME", False, "model.path=OWNER/NAME"),
        ("model.path=demo", False, "model.path=demo"),
        ("data.root=1e3", False, "data.root='1e3'"),
        ("+data.root=a b", False, "+data.root='a b'"),
        ('data.root="a, b"', False, 'data.root="a, b"'),
        ("data.root=/x/a,/x/b", True, "data.root=/x/a,/x/b"),
        ("data.root=/x/a,/x/b", False, "data.root='/x/a,/x/b'"),
        ("lora.rank=4,8", True, "lora.rank=4,8"),
        ("hydra.run.dir=out/${now:%Y}", False, "hydra.run.dir=out/${now:%Y}"),
    ],
)
def test_what_is_a_path_and_what_is_hydras(typed: str, sweeps: bool, expected: str) -> None:
    assert with_typed_paths([typed], sweeps) == [expected]


def test_a_folder_that_exists_is_meant_even_in_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    typed = path_setting("data.root", tmp_path / "a,b")
    assert value_in_hydra(with_typed_paths([typed], sweeps=True)[0]) == str(tmp_path / "a,b")
    (tmp_path / "${x}").mkdir()
    with pytest.raises(UserError, match="rename that folder"):
        with_typed_paths([path_setting("data.root", tmp_path / "${x}")])


def test_paths_beside_other_commands_are_as_typed(make_config: object, tmp_path: Path) -> None:
    """`ghibli evaluate RUN data.reference=...` and `ghibli check data.root=...`."""
    odd = str(tmp_path / "a: b, (1) #x")
    config: Config = make_config()  # type: ignore[operator]
    assert apply_overrides(config, [f"data.reference={odd}"], ("data.reference",)).data.reference == odd
    assert apply_overrides(config, ["data.reference=null"], ("data.reference",)).data.reference is None
    assert compose_config([f"data.root={odd}", "data=ghibli", f"cache_dir={odd}"]).data.root == odd


def test_a_command_is_one_line_for_bash() -> None:
    words = ["train.py", "lora.targets=[to_q,to_k]", "a b", "\n", ""]
    said = command_line(sys.executable, "-c", STUB, *words)
    assert pasted(said) == words


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with .venv/bin/python and ghibli, which are this process's, and an empty PATH."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("place", ["activated", "below", "beside"])
def test_a_command_runs_as_printed_in_the_shell_at_hand(
    venv: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    """Bash in the same folder, with the same PATH, starts this installation's program with these words."""
    if place == "activated":
        monkeypatch.setenv("PATH", str(venv))
    if place == "beside":
        monkeypatch.chdir(venv)
    command = command_here(name, "a b", "$x")
    shown = {"activated": name, "below": f".venv/bin/{name}", "beside": f"./{name}"}
    assert command == f"{shown[place]} 'a b' '$x'"
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [name.encode(), b"a b", b"$x"]


def test_another_python_on_the_path_is_not_ours(
    venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "python").symlink_to(venv / "python")
    monkeypatch.setenv("PATH", str(other))
    assert command_here("python", "x.py") == ".venv/bin/python x.py"
    (venv / "ghibli").unlink()
    assert command_here("ghibli", "list") == ".venv/bin/python -m ghibli list"


def test_a_script_is_found_from_another_folder(venv: Path) -> None:
    assert (
        command_here("python", "train.py", "a=train.py") == f".venv/bin/python {REPO / 'train.py'} a=train.py"
    )
    Path("train.py").touch()
    assert command_here("python", "train.py") == ".venv/bin/python train.py"


def test_a_path_that_begins_with_a_dash_is_no_option() -> None:
    assert (
        command_line("ghibli", "import", Path("-x.safetensors"), "-x") == "ghibli import ./-x.safetensors -x"
    )


@pytest.mark.parametrize("key", PATH_KEYS)
def test_no_path_at_all_is_refused(key: str) -> None:
    """`hydra.run.dir=` would be the current folder."""
    with pytest.raises(UserError, match=f"^{key}=: expected a path; leave it out for the default$"):
        with_typed_paths([f"{key}="])


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", f"hydra.run.dir={LONG}"),
        ("train.py", "data=ghibli", f"data.root={LONG}/x"),
        ("-m", "ghibli", "compare", LONG, "x"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(words: tuple[str, ...]) -> None:
    done = run_python(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ") and LONG in done.stderr


def test_flags_of_hydra_that_exclude_each_other_are_one_line() -> None:
    done = run_python("train.py", "-m", "--cfg", "job")
    assert done.stderr.startswith("error: Only one of --run, --multirun, --cfg")
    assert done.stderr.count("\n") == 1


def test_a_home_that_is_none_is_left_as_typed(tmp_path: Path) -> None:
    (override,) = with_typed_paths(["data.root=~nobody-here/x"])
    assert value_in_hydra(override) == "~nobody-here/x"
    done = run_python("train.py", "data=ghibli", "data.root=~nobody-here/x", f"hydra.run.dir={tmp_path}/a")
    assert done.stderr == "error: data.root=~nobody-here/x: no such folder\n"


def test_a_long_text_is_no_path() -> None:
    assert not exists("data.caption=" + LONG) and not exists("a\0b")
    assert expanded("~nobody-here/x") == Path("~nobody-here/x")
