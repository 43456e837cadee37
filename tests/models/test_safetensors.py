"""Nothing but tensors is ever unpickled: what is refused, how, and that the suggested command works."""

import ast
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import REPO
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ghibli.adapters import apply
from ghibli.cli.main import app
from ghibli.config.paths import ADAPTER_FILE, DEMO, adapter_in
from ghibli.models.base import BaseModel, weights_hash
from ghibli.models.convert import to_safetensors
from ghibli.models.load import load
from ghibli.models.safetensors import check_whole
from ghibli.runtime.errors import UserError

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ADAPTER = Path("ghibli/demo/near")


class Trap:
    """Creates a file when unpickled: a harmless stand-in for a hostile checkpoint."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


SOURCES = [REPO / "train.py", *sorted((REPO / "ghibli").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_load_is_of_tensors_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("load", "fit"):
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            name = ast.unparse(node.func)
            if name in ("torch.load", "trainer.fit"):
                assert options.get("weights_only") == "True", ast.unparse(node)
            assert options.get("allow_pickle", "False") == "False", ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and [name.name for name in node.names] == ["UnpicklingError"]:
            continue  # to catch it
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module} if isinstance(node, ast.ImportFrom) else {name.name for name in node.names}
            assert not names & UNSAFE_MODULES, ast.unparse(node)


def command_in(message: str) -> list[str]:
    """Extract the words after `ghibli` from the command in a message."""
    return ["convert", *message.split("ghibli convert ")[1].split(", and")[0].rstrip(")").split()]


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt", ".pkl"])
def test_a_pickled_adapter_is_refused_and_the_command_given_converts_it(
    tmp_path: Path, base: BaseModel, ending: str
) -> None:
    weights = load_file(REPO / ADAPTER / ADAPTER_FILE)
    file = tmp_path / f"pytorch_lora_weights{ending}"
    torch.save(weights, file)
    for place in (file, tmp_path):  # typed as the file, or as its folder
        with pytest.raises(UserError, match="only .safetensors files are read, because loading a") as caught:
            adapter_in(str(place))
        assert "\n" not in str(caught.value)
    done = CliRunner().invoke(app, command_in(str(caught.value)))
    assert done.exit_code == 0, done.output
    converted = load_file(adapter_in(str(tmp_path)))
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    apply.merge(base, tmp_path, 1.0)  # and it fits the base


def test_a_pickled_base_is_refused_and_the_command_given_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(DEMO, folder)
    names = {part: "diffusion_pytorch_model" for part in ("unet", "vae")} | {"text_encoder": "model"}
    for part, name in names.items():
        file = folder / part / f"{name}.safetensors"
        pickled = "pytorch_model.bin" if name == "model" else f"{name}.bin"
        torch.save(load_file(file), file.with_name(pickled))
        file.unlink()
    with pytest.raises(UserError, match="it has no text_encoder/.*vae/.*unet/") as caught:
        load(str(folder))
    done = CliRunner().invoke(app, command_in(str(caught.value)))
    assert done.exit_code == 0, done.output
    assert weights_hash(load(str(folder))) == weights_hash(load("demo"))


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_pickle_renamed_to_safetensors(tmp_path: Path, base: BaseModel, how: str) -> None:
    """As an adapter, as a part of a base and as a single file: one line, and nothing in it runs."""
    marker = tmp_path / "trapped"
    content = {"weights": torch.ones(2), "trap": Trap(marker)}

    def write(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if how == "zip":
            torch.save(content, file)
        else:
            file.write_bytes(pickle.dumps(content))

    write(tmp_path / "adapter" / ADAPTER_FILE)
    with pytest.raises(
        UserError, match=r"model.adapter=.* is a pickle under another name; .* rename it to"
    ) as a:
        apply.merge(base, tmp_path / "adapter", 1.0)
    folder = tmp_path / "base"
    shutil.copytree(DEMO, folder)
    write(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"model.path=.* is a pickle under another name; ") as b:
        load(str(folder))
    write(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"model.path=.* is a pickle under another name; ") as c:
        load(str(tmp_path / "one.safetensors"))
    assert not [caught for caught in (a, b, c) if "\n" in str(caught.value)]
    assert not marker.exists()


def test_a_damaged_adapter_is_named(tmp_path: Path, base: BaseModel) -> None:
    whole = (REPO / ADAPTER / ADAPTER_FILE).read_bytes()
    (tmp_path / ADAPTER_FILE).write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"model.adapter=.* is cut off or damaged; download it again"):
        apply.merge(base, tmp_path, 1.0)


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_convert_runs_nothing(tmp_path: Path, how: str) -> None:
    marker, file = tmp_path / "trapped", tmp_path / "model.bin"
    content = {"weights": torch.ones(2), "trap": Trap(marker)}
    if how == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    done = CliRunner().invoke(app, ["convert", str(file)])
    assert isinstance(done.exception, UserError)
    assert "cannot be read without running code hidden in it" in str(done.exception)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(AttributeError):
        pickle.loads(pickle.dumps(Trap(marker))).no_such_attribute  # noqa: B018  the trap is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", {"a": torch.ones(1)}, "only .bin, .ckpt,"),
        ("a.bin", {"epoch": 3}, "holds no named weights"),
        ("a.bin", [torch.ones(1)], "holds no named weights"),
        ("a.bin", {3: torch.ones(1)}, "named dense tensors"),
        ("a.bin", {"a": torch.eye(2).to_sparse()}, "named dense tensors"),
        ("a.bin", {"state_dict": torch.ones(1)}, "holds no named weights"),
        ("a.bin", "a text file\n", "cannot be read"),
        ("missing.bin", None, "no such file"),
    ],
)
def test_convert_names_what_it_cannot_read(tmp_path: Path, name: str, content: object, message: str) -> None:
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / name)])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_folder_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match="no such file"):
        to_safetensors(tmp_path / "a.bin")


def test_an_adapter_under_another_name_is_named(tmp_path: Path, base: BaseModel) -> None:
    torch.save(load_file(REPO / ADAPTER / ADAPTER_FILE), tmp_path / "mine.bin")
    to_safetensors(tmp_path / "mine.bin")
    with pytest.raises(UserError, match=f"no {ADAPTER_FILE} there; rename mine.safetensors to that"):
        apply.merge(base, tmp_path, 1.0)


def test_convert_takes_the_weights_of_a_checkpoint_and_keeps_files(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"state_dict": {"a": shared, "b": shared.T}, "epoch": 3}, tmp_path / "a.ckpt")
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "a.ckpt")]).exit_code == 0
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], shared) and torch.equal(found["b"], shared.T)
    again = CliRunner().invoke(app, ["convert", str(tmp_path / "a.ckpt")])
    assert "exists already" in str(again.exception)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_header_whose_length_looks_like_a_pickle_is_read(protocol: int, tmp_path: Path) -> None:
    """Bare pickles begin with 0x80 and their protocol; so does a header of 128 + 256 x protocol bytes."""
    file = tmp_path / ADAPTER_FILE
    save_file({"a": torch.ones(2)}, file, {"title": ""})
    missing = 128 + 256 * protocol - int.from_bytes(file.read_bytes()[:8], "little")
    save_file({"a": torch.ones(2)}, file, {"title": "x" * missing})
    assert file.read_bytes()[:2] == bytes([0x80, protocol])
    check_whole(file, "adapter")
