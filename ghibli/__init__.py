"""Ghibli LoRA Lab: fine-tune Stable Diffusion 1.5 with LoRA and see whether it learns.

`from ghibli import Run, show` are those of ghibli.api, which is loaded when they are asked for.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Return Run or show of ghibli.api (PEP 562): no command pays for loading it."""
    if name not in ("Run", "show"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ghibli import api

    return getattr(api, name)
