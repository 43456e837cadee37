"""Pickled weights to safetensors: the only place that reads a pickle, and it reads nothing but tensors."""

import warnings
from pathlib import Path

from ghibli.config.paths import PICKLES
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import require_stored, write_atomically

SHARED = 4  # times that the weights of an honest file may be used in it
RENAMED = {"pytorch_model": "model"}  # transformers' file names for the same weights, pickled and not


def to_safetensors(file: Path) -> Path:
    """Write the tensors of a pickled file beside it as .safetensors; return the new file, keep the old one.

    Raises:
        UserError: no such file, or a file that cannot be read without running code, or without tensors.
    """
    target = file.with_name(RENAMED.get(file.stem, file.stem) + ".safetensors")
    if file.suffix not in PICKLES:
        raise UserError(f"{file}: only {', '.join(PICKLES)} files are converted")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already: move it away first")
    import torch  # takes seconds, and what is wrong above is said at once
    from safetensors.torch import save

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: what cannot be read is an error
            require_stored(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for anything but a pickle of tensors
        raise UserError(
            f"{file} is damaged, or cannot be read without running code hidden in it: get the .safetensors "
            f"of the same model ({first_line(error)[:100]})"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no named weights")
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) > SHARED * file.stat().st_size:
        raise UserError(
            f"{file} holds tensors far larger than itself: get the .safetensors of the same model"
        )
    try:
        content = save(  # clones, because safetensors refuses tensors that share memory
            {name: t.detach().contiguous().clone() for name, t in tensors.items()}, {"format": "pt"}
        )
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} holds more than the named dense tensors that a .safetensors file can hold: get the "
            f".safetensors of the same model ({first_line(error)[:100]})"
        ) from error
    write_atomically(target, lambda opened: opened.write(content))
    return target
