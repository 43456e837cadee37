"""What an adapter file is, and the commands that use it, as `ghibli import` prints them."""

from ghibli.adapters.files import Adapter, format_number, is_dora


def describe_adapter(adapter: Adapter) -> list[str]:
    """Describe an adapter file in lines; the last two are commands that use it."""
    ranks, alphas = (", ".join(map(format_number, values)) for values in (adapter.ranks, adapter.alphas))
    kind = "DoRA" if is_dora(adapter) else "LoRA"
    metadata = {
        key: adapter.metadata[key]
        for key in ("modelspec.title", "modelspec.trigger_phrase", "ss_sd_model_name", "ss_training_comment")
        if adapter.metadata.get(key)
    }
    return [
        f"layout   {adapter.layout}, {kind} of {len(adapter.layers)} layers, rank {ranks}, alpha {alphas}",
        f"targets  {', '.join(adapter.targets)}{'; text encoder' if adapter.has_text_encoder else ''}",
        *(f"metadata {key}: {value[:200]}" for key, value in metadata.items()),
        f"train    {training_command(adapter)}",
        f"generate ghibli generate {adapter.file} --prompt TEXT",
    ]


def training_command(adapter: Adapter) -> str:
    """Return the command that continues training from a file, or why there is none."""
    if len(adapter.ranks) > 1 or len(adapter.alphas) > 1:
        return "not possible: its layers differ in rank or alpha"
    overrides = [
        f"lora.init={adapter.file}",
        f"lora.rank={adapter.ranks[0]}",
        f"lora.alpha={format_number(adapter.alphas[0])}",
        f"lora.targets=[{','.join(adapter.targets)}]",
        f"lora.text_encoder={str(adapter.has_text_encoder).lower()}",
        *(["lora.variant=dora"] if is_dora(adapter) else []),
    ]
    return f"python train.py {' '.join(overrides)}"
