"""`ghibli prepare`: base and images from any source, checked and saved; every error is one line."""

import json
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.data.folder import list_images, read_folder, recognised
from ghibli.data.split import first_by_content
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.evaluation import diagnosis
from ghibli.images.grid import COLUMNS, GAP, TILE, contact_sheet
from ghibli.images.read import open_image
from ghibli.models.base import weights_hash
from ghibli.models.load import load
from ghibli.prepare import download, preflight, prepare
from ghibli.runs.compose import check_overrides
from ghibli.runtime.errors import UserError


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


@pytest.fixture
def set_of_ten(tmp_path: Path) -> Path:
    """A folder with images/ and captions.txt."""
    write_folder(tmp_path / "ten", "drawn", 10, FINETUNE_SEEDS.start)
    return tmp_path / "ten"


def captions_of(root: Path) -> dict[str, str]:
    return {name: caption for name, _, caption in list_images(root)}


# Layouts


def test_three_kinds_of_tables_are_equivalent(set_of_ten: Path) -> None:
    """metadata.jsonl and metadata.csv as the hub's `datasets` writes them, in images/ or above it."""
    plain = captions_of(set_of_ten)
    rows = list(plain.items())
    (set_of_ten / "captions.txt").unlink()
    for place, prefix in ((set_of_ten, "images/"), (set_of_ten, ""), (set_of_ten / "images", "")):
        table = place / "metadata.jsonl"
        lines = [json.dumps({"file_name": prefix + name, "text": caption}) for name, caption in rows]
        table.write_text("\n".join(lines))
        assert captions_of(set_of_ten) == plain
        table.unlink()
    csv = set_of_ten / "metadata.csv"
    csv.write_text("file_name,text\n" + "".join(f'images/{name},"{text}"\n' for name, text in rows))
    assert captions_of(set_of_ten) == plain
    assert recognised(set_of_ten) == "images/ with metadata.csv"


def test_the_first_table_with_a_caption_wins(set_of_ten: Path) -> None:
    plain = captions_of(set_of_ten)
    first, second, *_ = plain
    table = set_of_ten / "captions.txt"
    table.write_text(table.read_text().replace(f"{second}|{plain[second]}", f"{second}|"))
    rows = f"file_name,text\nimages/{first},other\nimages/{second},from the second\n"
    (set_of_ten / "metadata.csv").write_text(rows)
    assert captions_of(set_of_ten) == plain | {second: "from the second"}
    assert recognised(set_of_ten) == "images/ with captions.txt, then metadata.csv"


def test_the_kaggle_set(tmp_path: Path, set_of_ten: Path) -> None:
    """{trainA, trainB_ghibli} without captions, as the zip unpacks it."""
    drawn = tmp_path / "kaggle" / "dataset" / "trainB_ghibli"
    shutil.copytree(set_of_ten / "images", drawn)
    shutil.copytree(set_of_ten / "images", tmp_path / "kaggle" / "dataset" / "trainA")
    assert {path.parent for _, path, _ in list_images(tmp_path / "kaggle")} == {drawn}
    assert recognised(tmp_path / "kaggle") == "dataset/trainB_ghibli/ without captions"
    with pytest.raises(UserError, match="images without captions: `ghibli caption .* or --caption TEXT"):
        prepare.read_images(tmp_path / "kaggle", None)
    assert len(prepare.read_images(tmp_path / "kaggle", "a scene").images) == 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"a"\n', "line 2 is not a JSON object"),
        ("metadata.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("metadata.jsonl", '{"text": "x"}\n', "line 1 has no file_name: expected file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}\n', "line 1: its text is not text: `3`"),
        ("metadata.csv", "file_name,words\na.png,x\n", "line 2 has no text"),
        ("metadata.csv", "name,text\na.png,x\n", "line 2 has no file_name"),
    ],
)
def test_a_table_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list_images(tmp_path)


# Where they come from


def zipped(folder: Path, file: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(inside) / path.relative_to(folder))
    return file


def test_a_zip_file(tmp_path: Path, set_of_ten: Path) -> None:
    """The zip wraps everything in a folder, with macOS metadata and unwanted files."""
    file = zipped(set_of_ten, tmp_path / "set.zip", "some folder")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("__MACOSX/._a.png", "x")
        archive.writestr("some folder/setup.exe", "x")
        archive.writestr("../../outside.png", "x")
    root = download.fetch(str(file), tmp_path / "data", no_progress)
    assert captions_of(root) == captions_of(set_of_ten)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not {"outside.png", "setup.exe", "._a.png"} & found
    (root / "mine.txt").touch()
    assert download.fetch(str(file), tmp_path / "data", no_progress) == root  # reused
    assert (root / "mine.txt").is_file()


def test_a_zip_file_may_have_the_longest_name(images: Path, tmp_path: Path) -> None:
    file = tmp_path / f"{'ä' * 125}.zip"
    shutil.make_archive(str(tmp_path / "it"), "zip", images)
    (tmp_path / "it.zip").rename(file)
    assert len(list_images(download.fetch(str(file), tmp_path / "into", lambda *_: None))) == 24


def test_another_zip_file_of_the_same_name_is_another_set(tmp_path: Path, set_of_ten: Path) -> None:
    file = zipped(set_of_ten, tmp_path / "archive.zip")
    root = download.fetch(str(file), tmp_path / "data", no_progress)
    (set_of_ten / "captions.txt").write_text(
        "".join(f"{path.name}|new\n" for _, path, _ in list_images(set_of_ten))
    )
    for other in (tmp_path / "archive.zip", tmp_path / "elsewhere" / "archive.zip"):
        other.parent.mkdir(exist_ok=True)
        other.unlink(missing_ok=True)
        zipped(set_of_ten, other)
        found = download.fetch(str(other), tmp_path / "data", no_progress)
        assert found != root and set(captions_of(found).values()) == {"new"}


def test_zip_files_that_cannot_be_used(
    tmp_path: Path, set_of_ten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zipped(set_of_ten, tmp_path / "set.zip")
    monkeypatch.setattr(download, "free_disk", lambda folder: 2**30)
    with pytest.raises(UserError, match="needs 0.0 GiB and .* has 1.0 free: free some space"):
        download.fetch(str(file), tmp_path / "data", no_progress)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete zip file: .*; download it again"):
        download.fetch(str(file), tmp_path / "data", no_progress)
    zipfile.ZipFile(file, "w").close()
    with pytest.raises(UserError, match="no images in it"):
        download.fetch(str(file), tmp_path / "data", no_progress)
    assert not (tmp_path / "data").exists()


def test_parquet_shards(tmp_path: Path, set_of_ten: Path) -> None:
    """Images and captions are extracted byte for byte."""
    pyarrow = pytest.importorskip("pyarrow", reason="extra of this project")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": name}, "text": caption}
        for name, path, caption in list_images(set_of_ten)
    ]
    shards = tmp_path / "hub" / "data"
    shards.mkdir(parents=True)
    for number in range(2):
        table = pyarrow.Table.from_pylist(rows[5 * number : 5 * number + 5])
        parquet.write_table(table, shards / f"train-{number:05d}-of-00002.parquet")
    root = download.fetch(str(tmp_path / "hub"), tmp_path / "data", no_progress)
    found = list_images(root)
    assert [caption for *_, caption in found] == [row["text"] for row in rows]
    assert [path.read_bytes() for _, path, _ in found] == [row["image"]["bytes"] for row in rows]


def test_parquet_rows_without_an_image_or_with_several_captions(tmp_path: Path, set_of_ten: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="extra of this project")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = list_images(set_of_ten)[0][1].read_bytes()
    rows = [
        {"image": {"bytes": content, "path": "a.png"}, "text": ["the first", "the second"]},
        {"image": None, "text": ["of nothing"]},
        {"image": {"bytes": content, "path": "b.png"}, "text": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    root = download.fetch(str(tmp_path / "set.parquet"), tmp_path / "data", no_progress)
    folder = read_folder(root, default_caption="a scene", style="", min_side=8)
    assert [image.caption for image in folder.images] == ["the first", "a scene"]
    assert list(folder.unusable) == ["000001.png"]


def test_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kagglehub", reason="extra of this project")
    with pytest.raises(UserError, match="kaggle.com cannot be reached: download the set .* with a browser"):
        download.fetch("kaggle", tmp_path, no_progress)
    with pytest.raises(UserError, match="a/b: no such folder here, and the hub cannot be reached"):
        download.fetch("a/b", tmp_path, no_progress)
    with pytest.raises(UserError, match="--data nowhere: no such folder or file"):
        download.fetch("nowhere", tmp_path, no_progress)


# The contact sheet


def test_the_sheet_shows_images_above_their_captions(set_of_ten: Path) -> None:
    images = first_by_content(prepare.read_images(set_of_ten, None).images, 8)
    sheet = contact_sheet([(open_image(p.path), p.caption) for p in images])
    assert sheet.width == COLUMNS * (TILE + GAP) + GAP
    for place, left in enumerate(range(GAP, sheet.width - TILE, TILE + GAP)):
        tile = sheet.crop((left, GAP, left + TILE, GAP + TILE))
        assert tile.tobytes() == Image.open(images[place].path).resize((TILE, TILE), Image.BICUBIC).tobytes()
        below = sheet.crop((left, GAP + TILE, left + TILE, GAP + TILE + 60)).convert("L")
        assert below.getextrema() == (0, 255)


# The command


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ in the current folder, so that the project's conf/local stays as it is."""
    shutil.copytree("conf", tmp_path / "here" / "conf", ignore=shutil.ignore_patterns("local"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "conf" / "local"


@pytest.mark.slow
def test_train_takes_what_was_saved(local: Path, set_of_ten: Path) -> None:
    result = CliRunner().invoke(app, ["prepare", "--base", "demo", "--data", str(set_of_ten)])
    assert result.exit_code == 0, result.output
    assert "images/ with captions.txt; 10 usable" in result.output
    assert Image.open(local / "images.png").width > 1000
    noted, _, errors = check_overrides([])
    assert errors == []
    assert (noted.model.path, noted.data.root) == ("demo", str(set_of_ten))
    base = load("demo")
    assert json.loads((local / "prepared.json").read_text())["base_hash"] == weights_hash(base)
    assert preflight.changed_since_prepared(noted, base) == []
    assert not [finding for finding in preflight.check([]) if "has changed since" in finding.text]
    next(base.vae.parameters()).data += 1
    (finding,) = preflight.changed_since_prepared(noted, base)
    assert "has changed since `ghibli prepare` checked it" in finding.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "runwayml/stable-diffusion-v1-5"], "use stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (["--base", "nobody/nothing"], "not downloaded yet, and the hub cannot be reached"),
        (["--base", "nowhere"], "no such folder or file, and not a hub id"),
    ],
)
def test_a_base_that_is_not_available(local: Path, set_of_ten: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["prepare", *words, "--data", str(set_of_ten)])
    assert message in str(result.exception)
    assert not (local / "default.yaml").exists()


def test_nothing_is_saved_with_errors(local: Path, set_of_ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = diagnosis.Finding("memory", "too little", "error")
    monkeypatch.setattr(preflight, "check", lambda words: [finding])
    result = CliRunner().invoke(app, ["prepare", "--base", "demo", "--data", str(set_of_ten)])
    assert result.exit_code == 2
    assert "error: memory: too little" in result.output and "nothing was saved" in result.output
    assert not (local / "default.yaml").exists()


def test_the_demo_base_keeps_its_own_resolution_and_learning_rate(
    local: Path, set_of_ten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model=demo data=ghibli` with these images, and not the demo's weights as Stable Diffusion 1.5."""
    asked: list[list[str]] = []
    monkeypatch.setattr(preflight, "check", lambda words: asked.append(words) or [])
    result = CliRunner().invoke(app, ["prepare", "--base", "demo", "--data", str(set_of_ten)])
    assert result.exit_code == 0, result.output
    saved, typed, there = (
        check_overrides(words)[0]
        for words in ([], asked[0], ["model=demo", "data=ghibli", f"data.root={set_of_ten}"])
    )
    assert saved is not None and typed is not None and there is not None
    assert saved.model == typed.model == there.model and saved.model.resolution == 128
    assert saved.optimizer.lr == there.optimizer.lr and saved.data == there.data


def test_defaults_written_by_hand_are_kept(local: Path, set_of_ten: Path) -> None:
    """conf/train.yaml asks for them there."""
    local.mkdir()
    own = "# @package _global_\nlocal:\n  sd15: /models/mine\n"
    (local / "default.yaml").write_text(own)
    result = CliRunner().invoke(app, ["prepare", "--base", "demo", "--data", str(set_of_ten)])
    assert "default.yaml was not written by `ghibli prepare`" in str(result.exception)
    assert [path.name for path in local.iterdir()] == ["default.yaml"]
    assert (local / "default.yaml").read_text() == own
    ours = prepare.LOCAL.format(mark=prepare.MARK, model="sd15")
    (local / "default.yaml").write_text(f"{ours}  sd15: demo\n")
    prepare.refuse_own_defaults(local / "default.yaml")


def test_the_caption_command_can_be_pasted(tmp_path: Path, set_of_ten: Path) -> None:
    odd = tmp_path / "it's (1)"
    shutil.copytree(set_of_ten / "images", odd)
    with pytest.raises(UserError) as caught:
        prepare.read_images(odd, None)
    assert shlex.split(str(caught.value).split("`")[1]) == ["ghibli", "caption", str(odd)]
