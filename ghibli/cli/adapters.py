"""`ghibli export`, `import`, `resize`, `merge`, `extract` and `push`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ghibli.cli.options import app, loading
from ghibli.config.checks import share
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import fitting
from ghibli.runtime.home import exists
from ghibli.runtime.terminal import one_line

if TYPE_CHECKING:
    from ghibli.adapters.factorize import Reworked
    from ghibli.evaluation.layer_map import LayerMap


@app.command("export")
def export_command(
    run: Annotated[str, typer.Argument(help="a run folder, or latest")],
    folder: Annotated[Path | None, typer.Option("--to", help="folder to fill; by default RUN/export")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="also write a pipeline with the adapter merged in")
    ] = False,
) -> None:
    """Write a run's adapter for diffusers, ComfyUI and A1111, with a model card, and verify every file."""
    from ghibli.runs.find import finished_run
    from ghibli.runs.settings import finished_config

    found = finished_run(run)
    found.refuse_links()
    config, target = finished_config(found), folder or found.path / "export"
    with loading():
        from ghibli.inference import export

    for check in export.export(found, config, target, merge=merge):
        console.print(f"{check.file}: {check.summary}")
    console.print(f"card     {target / 'README.md'}")


@app.command("push")
def push_command(
    run: Annotated[str, typer.Argument(help="a run folder that was exported, or latest")],
    hub_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="hub repository; created if missing")],
    really: Annotated[bool, typer.Option("--really", help="upload; without it, only list the files")] = False,
    public: Annotated[bool, typer.Option("--public", help="make a new repository public")] = False,
) -> None:
    """Upload adapter, card and grids of an exported run to the hub; without --really only list them."""
    with loading():
        from ghibli.inference import push
        from ghibli.runs.find import finished_run

    folder = finished_run(run).path / "export"
    for name, size in push.files_to_push(folder):
        console.print(one_line(f"{size / 2**20:8.2f} MiB  {name}"))
    if not really:
        console.print(f"nothing was sent; --really sends this to {hub_id}")
        return
    console.print(f"sent to {push.push(folder, hub_id, private=not public)}")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="an adapter file from elsewhere, a run folder, or latest")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py, for the base")
    ] = None,
) -> None:
    """Describe an adapter file, check that it fits the base, and print the commands that use it."""
    from ghibli.adapters.request import find_file
    from ghibli.runs.compose import base_config
    from ghibli.runs.find import path_named

    source = path_named(file)
    find_file(source, "import")
    config = base_config(overrides or [])
    with loading():
        from ghibli.adapters import apply, files
        from ghibli.adapters.describe import describe_adapter

    base = apply.load_base(config.model)
    for line in describe_adapter(files.read_adapter(source, base, "import"), base, overrides or []):
        console.print(one_line(line))  # titles and comments in the file are anyone's


RankOption = Annotated[int | None, typer.Option("--rank", help="rank of every layer, at most")]
KeepOption = Annotated[
    float | None, typer.Option("--keep", help="share of each layer's squared norm to keep, such as 0.95")
]
ToOption = Annotated[Path | None, typer.Option("--to", help="file to write, in kohya's layout")]
BaseArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py, for the base")
]


@app.command("resize")
def resize_command(
    file: Annotated[Path, typer.Argument(help="an adapter file, a run folder, or latest")],
    overrides: BaseArgument = None,
    rank: RankOption = None,
    keep: KeepOption = None,
    to: ToOption = None,
) -> None:
    """Shrink an adapter to its largest singular values, and say how much of its update is kept."""
    from ghibli.adapters import request
    from ghibli.runs.compose import base_config
    from ghibli.runs.find import path_named

    size = request.Size(rank, keep)
    source = request.find_file(path_named(file), "resize")
    ending = f"rank{rank}" if keep is None else f"keep{keep:g}"
    target = request.new_file(to, source.with_name(fitting(source.stem, f"_{ending}.safetensors")))
    config = base_config(overrides or [])
    with loading():
        from ghibli.adapters import apply, factorize, files, trained

    base = apply.load_base(config.model)
    adapter = files.read_adapter(source, base, "resize")
    if files.depends_on_base(adapter):
        trained.check_bases([file], config, base)
    found = factorize.resize(adapter, base, size)
    write_reworked(found, target, factorize.metadata_after([adapter], found, target.stem))


def write_reworked(found: "Reworked", target: Path, metadata: dict[str, str]) -> None:
    """Write layers in kohya's layout and say how much of the update they keep."""
    from ghibli.adapters import files, kohya

    kohya.write_kohya(files.Adapter(target, "kohya", found.layers, {}), target, metadata)
    console.print(one_line(f"{target}: {found.summary}"))


@app.command("merge")
def merge_command(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE[:WEIGHT]...", help="adapters, runs or latest; then KEY=VALUE"),
    ],
    to: Annotated[Path, typer.Option("--to", help="file to write, in kohya's layout")],
    rank: RankOption = None,
    keep: KeepOption = None,
) -> None:
    """Add several adapters to one file: exactly, or with --rank or --keep at a smaller size."""
    from ghibli.adapters import request
    from ghibli.inference.sources import split_weight
    from ghibli.runs.compose import base_config

    size = request.Size(rank, keep) if (rank, keep) != (None, None) else None
    target = request.new_file(to, to)
    names = {word: split_weight(word) for word in sources}
    overrides = [word for word, (name, _) in names.items() if "=" in word and not exists(name)]
    named = [found for word, found in names.items() if word not in overrides]
    found_files = [(request.find_file(name, "merge"), weight) for name, weight in named]
    config = base_config(overrides)
    with loading():
        from ghibli.adapters import apply, factorize, files, trained

    base = apply.load_base(config.model)
    adapters = [(files.read_adapter(file, base, "merge"), weight) for file, weight in found_files]
    if any(files.depends_on_base(adapter) for adapter, _ in adapters):
        trained.check_bases([name for name, _ in named], config, base)
    found = factorize.combine(adapters, base, size)
    metadata = factorize.metadata_after([adapter for adapter, _ in adapters], found, target.stem)
    parts = ", ".join(f"{file.stem}:{weight:g}" for file, weight in found_files)
    write_reworked(found, target, metadata | {"modelspec.merged_from": parts})


@app.command("extract")
def extract_command(
    tuned: Annotated[
        str, typer.Argument(help="the fine-tuned model: a run, latest, a UNet folder or a file")
    ],
    base_path: Annotated[str, typer.Argument(metavar="BASE", help="what it was trained from, as model.path")],
    to: Annotated[Path, typer.Option("--to", help="file to write, in kohya's layout")],
    rank: RankOption = None,
    keep: KeepOption = None,
    config: Annotated[
        str | None, typer.Option("--config", help="for single files: a folder with configs, as model.config")
    ] = None,
) -> None:
    """Extract an adapter from a fully fine-tuned model by the singular values of its difference."""
    from ghibli.adapters.request import Size, check_tuned, new_file
    from ghibli.config.paths import check_base_path
    from ghibli.runs.find import path_named

    size, target, source = Size(rank, keep), new_file(to, to), str(path_named(tuned))
    check_base_path(base_path)
    check_tuned(source)
    with loading():
        from ghibli.adapters import factorize
        from ghibli.adapters.trained import tuned_model
        from ghibli.models.load import load

    base = load(base_path, config)
    found, left_out = factorize.extract(tuned_model(source, base, config), base, size)
    write_reworked(found, target, factorize.metadata_after([], found, target.stem))
    if left_out:
        what = f"{len(left_out)} weights that no LoRA holds (norms, biases, VAE), such as {left_out[0]}"
        console.print(one_line(f"left out {what}"))


@app.command("slim")
def slim_command(
    run: Annotated[str, typer.Argument(help="a finished LoRA run, or latest")],
    lose: Annotated[
        str, typer.Option("--lose", help="share of the gain that may be lost: 1% or 0.01")
    ] = "1%",
    folder: Annotated[Path | None, typer.Option("--to", help="folder to fill; by default RUN/slim")] = None,
) -> None:
    """Measure which layers carry a run's gain, and write the smallest adapter that loses less than --lose."""
    from ghibli.runs.compose import cache_of_this_machine
    from ghibli.runs.find import finished_run
    from ghibli.runs.here import on_this_machine
    from ghibli.runs.settings import finished_config

    limit = share("--lose", lose)
    found = finished_run(run)
    config = finished_config(found)
    if config.finetune != "lora":
        what = "trained all weights" if config.finetune == "full" else "only measured the base"
        raise UserError(f"{found.path} {what} (finetune={config.finetune}): there is no adapter to slim")
    found.refuse_links()
    with loading():
        from ghibli.inference import slim  # torch takes seconds to load

    here = on_this_machine(config, cache_of_this_machine())
    result = slim.slim(found, here, limit, folder or found.path / "slim")
    console.print(layer_table(result.map))
    console.print(one_line(f"map      {found.layer_map}, slim.csv: all {len(result.map.layers)} layers"))
    if not result.files:
        raise UserError(result.summary)
    console.print(one_line(f"slim     {result.summary}"))
    for file in result.files:
        console.print(one_line(f"file     {file}"))
    for note in result.notes:
        console.print(one_line(f"note     {note}"), style="yellow")


MOST_ROWS = 12  # layers in the terminal's table; slim.csv has all


def layer_table(found: "LayerMap") -> Table:
    """Build the table of the blocks, and of the layers that carry most, in 80 columns."""
    gain = f"{found.gain.signed_size} over the base on {found.images} held-out images"
    table = Table(title=f"Lost of the gain ({gain}) without:", box=None, pad_edge=False, title_justify="left")
    table.add_column("block or layer", overflow="fold")
    for name in ("lost", "rank", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.blocks:
        table.add_row(row.name, str(row.lost), "", "")
    largest = sorted(found.layers, key=lambda row: -row.lost.value)[:MOST_ROWS]
    for row in found.layers:
        if row in largest:
            table.add_row(f"  {short_name(row.name)}", str(row.lost), count(row.rank), count(row.kept_rank))
    return table


def short_name(layer: str) -> str:
    """Return a layer's name without what all names of its kind repeat."""
    for long, short in ((".transformer_blocks.0", ""), ("attentions.", "att."), ("_blocks.", ".")):
        layer = layer.replace(long, short)
    return layer


def count(value: int | None) -> str:
    """Format a rank that may be missing."""
    return "-" if value is None else str(value)
