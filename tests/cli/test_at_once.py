"""What is named and not there is answered before torch is loaded, which takes seconds."""

import json

import pytest
from helpers.commands import REPO, run_python

WRONG = {  # a command -> what its only line begins with
    "generate nope --prompt x": "adapter nope: no such file or run",
    "generate --prompt x model.path=nope": "model.path=nope: no such folder or file",
    "generate --prompt x model.adapter=nope": "model.adapter=nope: no pytorch_lora_weights.safetensors there",
    "generate --prompt x model.adapter=cut.safetensors": "model.adapter=cut.safetensors is a file: put it in",
    "restyle nope.png": "nope.png: no such file or folder",
    "restyle image.png --prompt x --with nope": "adapter nope: no such file or run",
    "restyle image.png --prompt x --mask nope": "--mask nope: no such file or folder",
    "jury nope other": "adapter nope: no such file or run",
    "jury one": "name from 2 to 8 runs or adapter files to compare",
    "jury --count nope.json": "nope.json: no such file",
    "app model.path=nope": "model.path=nope: no such folder or file",
    "export nope": "nope holds no run",
    "push nope OWNER/NAME": "nope/export holds nothing to send",
    "import nope.safetensors": "import nope.safetensors: no such file or run",
    "import folder": "import folder: which .safetensors file? there are none",
    "import cut.safetensors": "import: cut.safetensors is cut off or damaged",
    "resize nope.safetensors --rank 2": "resize nope.safetensors: no such file or run",
    "resize nope.safetensors": "give one of --rank N and --keep SHARE",
    "merge nope.safetensors --to new.safetensors": "merge nope.safetensors: no such file or run",
    "merge nope.safetensors --to new": "--to new: the name must end in .safetensors",
    "extract nope demo --to new.safetensors --rank 2": "model.path=nope: no such folder or file",
    "extract demo nope --to new.safetensors --rank 2": "model.path=nope: no such folder or file",
    "slim nope": "nope holds no run",
    "evaluate nope": "nope holds no run",
    "influence nope": "nope holds no run",
    "report nope": "nope: no such folder",
    "compare nope other": "nope: no such folder",
    "watch nope": "nope: no such folder",
    "rm nope": "nope: no such folder",
    "caption nope": "folder=nope: no such folder",
    "convert nope.bin": "nope.bin: no such file",
    "prepare --data nope": "--data nope: no such folder or file, and not a hub dataset",
    "prepare --data /dev/null": "--data /dev/null: no such folder or file, and not a hub dataset",
    "prepare --data folder --base nope": "model.path=nope: no such folder or file",
    "check lora.rnk=2": "config: unknown key lora.rnk",
}  # fmt: skip
TRAININGS = {  # script and setting -> what its only line says
    "train.py model.path=nope": "model.path=nope: no such folder or file",
    "train.py model.adapter=nope": "model.adapter=nope: no pytorch_lora_weights.safetensors there",
    "train.py lora.init=nope": "lora.init nope: no such file or run",
    "sweep.py lora.init=nope": "lora.init nope: no such file or run",
}
WITHOUT_TORCH = """
import contextlib, io, json, runpy, sys
root = sys.argv[1]
sys.path.insert(0, root)
sys.modules["torch"] = None  # importing it raises
answers = {}
for command in json.loads(sys.argv[2]):
    script, word = command.split()
    sys.argv, said = [f"{root}/{script}", word], io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            answers[command] = end.code, said.getvalue()
print(json.dumps(answers))
"""
ANSWERS = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # importing it raises
from ghibli.cli import main
answers = {}
for command in json.loads(sys.argv[1]):
    sys.argv, said = ["ghibli", *command.split()], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main.main()
        except SystemExit as end:
            answers[command] = end.code, said.getvalue()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Return exit code and output of each command of ghibli, in a Python that cannot import torch."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "folder").mkdir()
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "image.png").write_bytes((REPO / "docs" / "experiments" / "noise.png").read_bytes())
    done = run_python("-c", ANSWERS, json.dumps(list(WRONG)), cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", WRONG)
def test_a_command_of_ghibli(answers: dict[str, tuple[int, str]], command: str) -> None:
    code, said = answers[command]
    assert code == 2
    assert said.startswith(f"error: {WRONG[command]}")
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Return exit code and stderr of each training, in such a Python; none leaves a file."""
    folder = tmp_path_factory.mktemp("here")
    done = run_python("-c", WITHOUT_TORCH, str(REPO), json.dumps(list(TRAININGS)), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training(refused: dict[str, tuple[int, str]], command: str) -> None:
    code, said = refused[command]
    assert code == 2
    assert TRAININGS[command] in said
    assert said.count("\n") == 1
