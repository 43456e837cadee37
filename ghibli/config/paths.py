"""Do the folders and files of a configuration exist? A look at the disk, before anything is loaded."""

from pathlib import Path

from ghibli.config.schema import Config
from ghibli.runtime.errors import UserError, require_folder

BASE_FILES = (
    "tokenizer/*.json", "text_encoder/config.json", "text_encoder/*.safetensors", "vae/config.json",
    "vae/*.safetensors", "unet/config.json", "unet/*.safetensors", "scheduler/scheduler_config.json",
)  # fmt: skip
RENAMED_BASES = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
NO_PICKLE = "only .safetensors files are read, because loading a .ckpt or .bin file can run code hidden in it"


def check_places(config: Config) -> None:
    """Checks what data.root and model.path name on this machine, as far as a look at the disk tells."""
    check_images(config)
    check_typed_base(config.model.path)
    if config.model.adapter is not None:
        check_adapter(Path(config.model.adapter))


def check_images(config: Config) -> None:
    """Raises a UserError unless data.root is there, or is a folder of the cache to be drawn."""
    root = config.data.root
    if config.data.draw is None:
        require_folder("data.root", root)
    elif not (Path(root) / "captions.txt").is_file() and not Path(root).is_relative_to(config.cache_dir):
        raise UserError(
            f"data.root={root}: data=demo would draw its own images there; "
            f"for yours use data=ghibli data.root={root}"
        )


def check_typed_base(path: str) -> None:
    """check_base for a path as typed; without a slash it may be a base of this package, looked up later."""
    if "/" in path:
        check_base(Path(path).expanduser(), path)


def check_adapter(folder: Path) -> None:
    """Raises a UserError for an adapter that is a pickle; that it is there is checked when it is merged."""
    place = folder.expanduser()
    pickled = [place] if place.suffix in PICKLES else sorted(place.glob("*"))
    pickled = [file for file in pickled if file.suffix in PICKLES]
    if pickled and not any(place.glob("*.safetensors")):
        raise UserError(f"model.adapter={folder}: {NO_PICKLE}; {convert(pickled)}, and give its folder")


def convert(files: list[Path]) -> str:
    """The command that makes safetensors of pickles."""
    return f"convert it once: python -m ghibli convert {' '.join(str(file) for file in files)}"


def check_base(place: Path, path: str) -> None:
    """Raises a UserError unless `place`, typed as `path`, can be a base or a hub id."""
    if path in RENAMED_BASES:
        raise UserError(f"model.path={path} is gone from the hub: use {RENAMED_BASES[path]}")
    if place.is_dir():
        missing = [pattern for pattern in BASE_FILES if not any(place.glob(pattern))]
        if missing:
            pickled = [file for file in sorted(place.glob("*/*")) if file.suffix in PICKLES]
            hint = f" ({NO_PICKLE}; {convert(pickled)})" if pickled else ""
            raise UserError(
                f"model.path={path} is no diffusers folder of Stable Diffusion 1.5: it has no "
                f"{', '.join(missing)}{hint}"
            )
    elif place.is_file():
        if place.suffix in PICKLES:
            raise UserError(f"model.path={path}: {NO_PICKLE}; {convert([place])}")
        if place.suffix != ".safetensors":
            raise UserError(f"model.path={path}: {NO_PICKLE}; get the .safetensors of the same model")
    elif path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"model.path={path}: no such folder or file, and no hub id (OWNER/NAME); model=demo needs neither"
        )
