"""What an adapter file holds for a given base."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ghibli.adapters.layers import OFT, UNSCALED, InputOFT, Layer, LoRA
from ghibli.adapters.names import target_of
from ghibli.adapters.read import read_layers
from ghibli.adapters.request import find_file
from ghibli.models.base import BaseModel


@dataclass(frozen=True)
class Adapter:
    """An adapter file whose layers all fit a given base."""

    file: Path
    layout: str  # diffusers, PEFT, kohya or ComfyUI
    layers: dict[str, Layer]  # by name: `unet.` or `text_encoder.`, then the layer's name in the base
    metadata: dict[str, str]  # of the file, unchanged

    @property
    def hash(self) -> str:
        """sha256 of the file, hex."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    @property
    def kinds(self) -> list[str]:
        """What it holds, the most frequent first: LoRA, DoRA, LoHa, ..."""
        return [kind for kind, _ in Counter(layer.kind for layer in self.layers.values()).most_common()]

    @property
    def ranks(self) -> list[int]:
        return sorted({layer.rank for layer in self.layers.values() if layer.rank is not None})

    @property
    def alphas(self) -> list[float]:
        """Every alpha that scales a layer by alpha / rank."""
        scaled = [
            each for each in self.layers.values() if not isinstance(each, UNSCALED) and each.rank is not None
        ]
        return sorted({layer.alpha for layer in scaled if layer.alpha is not None})

    @property
    def targets(self) -> list[str]:
        """The kinds of UNet layers it changes, as lora.targets takes them."""
        return sorted({target_of(name) for name in self.layers if name.startswith("unet.")})

    @property
    def has_text_encoder(self) -> bool:
        return any(name.startswith("text_encoder.") for name in self.layers)


def is_dora(adapter: Adapter) -> bool:
    """Tell whether an adapter has DoRA's magnitudes."""
    return any(layer.magnitude is not None for layer in adapter.layers.values())


def depends_on_base(adapter: Adapter) -> bool:
    """Tell whether W' - W depends on the values of the base's W, as that of DoRA and OFT does."""
    return any(
        layer.magnitude is not None or isinstance(layer, OFT | InputOFT) for layer in adapter.layers.values()
    )


def is_plain(adapter: Adapter) -> bool:
    """Tell whether an adapter is two factors a layer and nothing else."""
    return all(isinstance(layer, LoRA) and layer.is_plain for layer in adapter.layers.values())


def format_number(value: float) -> str:
    """Format a number so that it reads back as the same one, whole numbers without a point."""
    return str(int(value)) if value == int(value) else repr(value)


def read_adapter(path: str | Path, base: BaseModel, what: str) -> Adapter:
    """Read an adapter of any known layout and kind for a base; every key is used, or the file is refused.

    Args:
        path, what: as for find_file.

    Raises:
        UserError: as find_file and adapters.read.read_layers.
    """
    file = find_file(path, what)
    return Adapter(file, *read_layers(file, base, f"{what} {path}"))
