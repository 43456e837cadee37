"""Pickled weights -> safetensors. The one place that reads a pickle, and only tensors come out of it."""

import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save

from ghibli.base_model import first_line
from ghibli.mistakes import UserMistake
from ghibli.places import PICKLES
from ghibli.run_dir import write_atomically


def to_safetensors(file: Path) -> Path:
    """Writes the file's tensors beside it as .safetensors and returns that file; the old one stays.

    Raises:
        UserMistake: no such file, a file that holds more than tensors, or nothing but other things.
    """
    target = file.with_suffix(".safetensors")
    if file.suffix not in PICKLES:
        raise UserMistake(f"{file}: only {', '.join(PICKLES)} files are converted")
    if target.exists():
        raise UserMistake(f"{target} is there already: move it away first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how it was pickled
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, FileNotFoundError) as error:
        raise UserMistake(
            f"{file} cannot be read without running code hidden in it, or is damaged: get the .safetensors "
            f"of the same model ({first_line(error)[:100]})"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().contiguous().clone()  # safetensors refuses shared memory
    if not tensors:
        raise UserMistake(f"{file} holds no weights by name")
    content = save(tensors, {"format": "pt"})
    write_atomically(target, lambda opened: opened.write(content))
    return target
