"""Check that what a configuration names is there, folders, files and packages, before anything is loaded."""

from importlib.util import find_spec
from pathlib import Path

from ghibli.config.registry import DASHBOARDS
from ghibli.config.schema import Config, ModelConfig
from ghibli.runtime.commands import command_here, install_command, path_setting, quoted
from ghibli.runtime.errors import UserError, require_folder
from ghibli.runtime.files import ROOT
from ghibli.runtime.home import expanded

DEMO = ROOT / "ghibli" / "demo"  # the embedded demo base, a diffusers folder
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' default name
BASE_FILES = (
    "tokenizer/*.json", "text_encoder/config.json", "text_encoder/*.safetensors", "vae/config.json",
    "vae/*.safetensors", "unet/config.json", "unet/*.safetensors", "scheduler/scheduler_config.json",
)  # fmt: skip
RENAMED_BASES = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
NO_PICKLE = "only .safetensors files are read, because loading a .ckpt or .bin file can run code hidden in it"


def check_paths(config: Config) -> None:
    """Check data.root, model.path, model.adapter and the packages that settings need as the disk has them.

    Raises:
        UserError: one does not exist, or is not what its key names.
    """
    bits = config.model.frozen_bits
    if bits is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.frozen_bits={bits} needs bitsandbytes, which is not installed: "
            f"{install_command('bitsandbytes')}, or leave it out"
        )
    for name in config.logger:
        check_dashboard(name)
    check_images(config)
    if config.data.regularization is not None:
        require_folder("data.regularization", config.data.regularization)
    check_model(config.model)


def resolve_path(path: str) -> Path:
    """Resolve a path as typed: `demo` and what is below it lie in this package, `~` is the home folder."""
    return DEMO / path[5:] if path == "demo" or path.startswith("demo/") else expanded(path)


def check_dashboard(name: str) -> None:
    """Raise a UserError unless the optional package of a dashboard is installed."""
    extra = DASHBOARDS[name].extra
    if extra is not None and find_spec(extra) is None:
        raise UserError(f"logger={name}: {extra} is not installed: pip install -e '.[{extra}]'")


def check_images(config: Config) -> None:
    """Raise a UserError unless data.root exists, or is a folder of the cache to draw in, and data.exclude."""
    root = config.data.root_folder
    if config.data.exclude is not None and not expanded(config.data.exclude).is_file():
        raise UserError(f"{path_setting('data.exclude', config.data.exclude)}: no such file")
    if config.data.draw is None:
        require_folder("data.root", root)
    elif not (Path(root) / "captions.txt").is_file() and not Path(root).is_relative_to(config.cache_dir):
        raise UserError(
            f"data.root={root}: data=demo would draw its own images there; "
            f"for yours use data=ghibli {quoted(path_setting('data.root', root))}"
        )


def check_model(model: ModelConfig) -> None:
    """Check that model.path can be a base, and that model.adapter holds an adapter.

    Raises:
        UserError: as check_base and adapter_in.
    """
    check_base_path(model.path)
    if model.adapter is not None:
        adapter_in(model.adapter)


def check_base_path(model_path: str) -> None:
    """Check that model.path, as typed, can be a base.

    Raises:
        UserError: as check_base.
    """
    check_base(resolve_path(model_path), model_path)


def check_base(path: Path, model_path: str) -> None:
    """Check that `path`, given as `model_path`, can be a base model: a folder, a file or a hub id.

    Raises:
        UserError: it cannot.
    """
    if model_path in RENAMED_BASES:
        raise UserError(f"model.path={model_path} is gone from the hub: use {RENAMED_BASES[model_path]}")
    if path.is_dir():
        check_base_folder(path, model_path)
    elif path.is_file():
        if path.suffix in PICKLES:
            raise UserError(f"model.path={model_path}: {NO_PICKLE}; {convert_command([path])}")
        if path.suffix != ".safetensors":
            raise UserError(f"model.path={model_path}: {NO_PICKLE}; get the .safetensors of the same model")
    elif model_path.count("/") != 1 or model_path.startswith((".", "/", "~")):
        raise UserError(
            f"model.path={model_path}: no such folder or file, and not a hub id (OWNER/NAME); "
            "model=demo needs neither"
        )


def check_base_folder(folder: Path, model_path: str) -> None:
    """Raise a UserError unless the folder, given as `model_path`, has the files of Stable Diffusion 1.5."""
    missing = [pattern for pattern in BASE_FILES if not any(folder.glob(pattern))]
    if missing:
        pickles = [file for file in sorted(folder.glob("*/*")) if file.suffix in PICKLES]
        hint = f" ({NO_PICKLE}; {convert_command(pickles)})" if pickles else ""
        raise UserError(
            f"model.path={model_path} is not a diffusers folder of Stable Diffusion 1.5: it has no "
            f"{', '.join(missing)}{hint}"
        )


def adapter_in(path: str) -> Path:
    """Return the adapter file of model.adapter, a folder.

    Raises:
        UserError: there is none, or it is a pickle.
    """
    folder = resolve_path(path)
    file = folder / ADAPTER_FILE
    if file.is_file():
        return file
    candidates = [folder] if folder.suffix in PICKLES else sorted(folder.glob("*"))
    pickles = [other for other in candidates if other.suffix in PICKLES]
    others = [other.name for other in candidates if other.suffix == ".safetensors"]
    if pickles and not others:
        raise UserError(f"model.adapter={path}: {NO_PICKLE}; {convert_command(pickles)}, and give its folder")
    if folder.suffix == ".safetensors" and folder.is_file():
        raise UserError(f"model.adapter={path} is a file: put it in a folder, named {ADAPTER_FILE}, for that")
    hint = f"; rename {others[0]} to that" if others else ""
    raise UserError(f"model.adapter={path}: no {ADAPTER_FILE} there{hint}")


def convert_command(files: list[Path]) -> str:
    """Advise the command that converts pickles to safetensors."""
    return f"convert it once: {command_here('ghibli', 'convert', *files)}"
