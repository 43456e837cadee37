"""Check that what a run reads is there, before anything is loaded."""

from ghibli.config.paths import check_paths
from ghibli.config.schema import Config
from ghibli.runs.find import adapter_named


def check_inputs(config: Config) -> None:
    """Check the images, the base, the adapters and the packages that a configuration names.

    Raises:
        UserError: one does not exist, or is not what its key names.
    """
    check_paths(config)
    if config.lora.init is not None:
        adapter_named(config.lora.init, "lora.init")
