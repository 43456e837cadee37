"""`ghibli caption`: the captions of transformers' own BLIP, one per image; existing captions are kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.image_folders import captions_of, read, write_image
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.images.read import open_image
from ghibli.prepare import captioning
from ghibli.prepare.captioning import Blip, caption_folder
from ghibli.runtime.errors import UserError

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
NOUNS = "a an the cat dog girl boy sea hill house tree sky"
OTHERS = "red blue green old two on in under with and of night"
WORDS = f"{NOUNS} {OTHERS}".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved BLIP with random weights, large enough that captions depend on the image."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join([*MARKS, *WORDS]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    text = {
        "vocab_size": len(MARKS) + len(WORDS), "hidden_size": 32, "encoder_hidden_size": 32,
        "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(1)
    network = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    )
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    network.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven different images: of several shapes, one with transparency, one rotated by its EXIF."""
    root = tmp_path / "set"
    for number, size in enumerate([(64, 48), (40, 90), (300, 200), (64, 64), (33, 65)]):
        write_image(root / f"{number}.png", size, (50 * number, 255 - 40 * number, 20 + 97 * number % 256))
    Image.linear_gradient("L").convert("RGB").save(root / "5.jpg", exif=rotated())
    Image.new("RGBA", (50, 50), (250, 10, 60, 128)).save(root / "6.png")
    return root


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def lines_of(folder: Path) -> dict[str, str]:
    return dict(line.split("|") for line in (folder / "captions.txt").read_text().splitlines())


BLIP = "Salesforce/blip-image-captioning-base"


def run(folder: Path, model: Path, batch_size: int = 3) -> captioning.CaptioningResult:
    return caption_folder(folder, captioning.blip_loader(str(model)), batch_size=batch_size)


def one_by_one(folder: Path, model: Path) -> dict[str, str]:
    """Caption each image alone with transformers, called as in its documentation."""
    network = BlipForConditionalGeneration.from_pretrained(model).eval()
    processor = BlipProcessor.from_pretrained(model)
    said = {}
    for path in sorted(folder.glob("*.*g")):
        inputs = processor(open_image(path), return_tensors="pt")
        tokens = network.generate(
            **inputs, max_new_tokens=30, num_beams=3, no_repeat_ngram_size=3, do_sample=False
        )
        said[path.name] = processor.decode(tokens[0], skip_special_tokens=True)
    return said


def test_a_batch_gives_the_captions_of_single_images(folder: Path, model: Path) -> None:
    expected = one_by_one(folder, model)
    assert len(set(expected.values())) >= 5  # otherwise captions would not depend on the image
    done = run(folder, model)
    assert done.written == expected == lines_of(folder)
    assert (done.already_captioned, done.skipped) == (0, {})
    assert captions_of(read(folder)) == {name: f"{words}, in ink" for name, words in expected.items()}
    before = (folder / "captions.txt").read_bytes()
    again = caption_folder(folder, lambda: pytest.fail("nothing to load"), batch_size=3)
    assert (again.written, again.already_captioned) == ({}, 7)
    assert (folder / "captions.txt").read_bytes() == before


def test_existing_captions_stay_as_they_are(folder: Path, model: Path) -> None:
    by_hand = "\ufeff1.png|by  hand \r\n3.png|\r\n\r\ngone.png|a gone one".encode()  # byte for byte
    (folder / "captions.txt").write_bytes(by_hand)
    (folder / "2.txt").write_text("beside")
    (folder / "4.txt").write_bytes(b"caf\xe9")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "json"}')
    done = run(folder, model)
    assert set(done.written) == {"3.png", "5.jpg", "6.png"}
    assert done.already_captioned == 4  # 0, 1, 2 and the missing one
    assert done.skipped == {"4.png": "4.txt is not UTF-8 text: save it as UTF-8"}
    content = (folder / "captions.txt").read_bytes()
    assert content.startswith(by_hand + b"\n3.png|")
    captions = captions_of(read(folder))
    assert [captions[f"{n}.png"] for n in (0, 1, 2)] == ["json, in ink", "by hand, in ink", "beside, in ink"]
    assert captions["3.png"] == f"{done.written['3.png']}, in ink"


def test_captioning_resumes_after_a_kill_and_keeps_edits(folder: Path, model: Path) -> None:
    expected = one_by_one(folder, model)
    captioner, calls = Blip(str(model), torch.device("cpu")), []

    def killed_in_the_third(images: list[Image.Image]) -> list[str]:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        if len(calls) == 2:  # the user edits a caption meanwhile
            table = folder / "captions.txt"
            table.write_text(table.read_text().replace(f"0.png|{expected['0.png']}", "0.png|mended"))
        return captioner(images)

    with pytest.raises(KeyboardInterrupt):
        caption_folder(folder, lambda: killed_in_the_third, batch_size=2)
    half = lines_of(folder)
    assert half == {"0.png": "mended"} | {f"{n}.png": expected[f"{n}.png"] for n in (1, 2, 3)}
    done = run(folder, model)
    assert set(done.written) == {"4.png", "5.jpg", "6.png"}
    assert lines_of(folder) == expected | {"0.png": "mended"}


def test_what_cannot_be_captioned_is_named(folder: Path, model: Path) -> None:
    write_image(folder / "a|b.png")
    (folder / "7.png").write_bytes(b"no image")
    done = run(folder, model, batch_size=50)
    assert len(done.written) == 7
    assert done.skipped == {
        "a|b.png": "captions.txt cannot hold this file name: rename the image",
        "7.png": "it is not an image, despite its name",
    }
    silent = caption_folder(folder, lambda: lambda images: [""] * len(images), batch_size=1)
    assert silent.written == {}
    write_image(folder / "8.png")
    silent = caption_folder(folder, lambda: lambda images: [""] * len(images), batch_size=1)
    assert silent.skipped["8.png"] == "the model returned an empty caption"


def test_captions_of_the_kaggle_set_are_above_its_folders(folder: Path, model: Path) -> None:
    home = folder.parent / "kaggle"
    (home / "dataset").mkdir(parents=True)
    folder.rename(home / "dataset" / "trainB_ghibli")
    write_image(home / "dataset" / "trainA" / "photo.png")
    done = run(home, model)
    assert done.table == home / "captions.txt"
    assert set(lines_of(home)) == set(done.written) == set(captions_of(read(home)))


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_cannot_be_used(folder: Path, model: Path, tmp_path: Path) -> None:
    def load(place: Path | str) -> str:
        return refused(lambda: Blip(str(place), torch.device("cpu")))

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no .safetensors weights: download its files into a folder" in load(empty)
    (empty / "pytorch_model.bin").write_bytes(b"PK")
    assert f"ghibli convert {empty / 'pytorch_model.bin'}" in load(empty)
    (empty / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    assert "model.safetensors is cut off or damaged" in load(empty)
    assert "no such folder, and not a hub id" in load(tmp_path / "nowhere")
    text = load(BLIP)
    assert text.startswith(f"--model {BLIP} is not on this machine and the hub cannot be reached; ")
    assert "--model FOLDER" in text


def test_the_command(folder: Path, model: Path) -> None:
    done = CliRunner().invoke(app, ["caption", str(folder), "--model", str(model), "--batch-size", "4"])
    assert done.exit_code == 0, done.output
    assert f"7 captions written to {folder / 'captions.txt'}" in done.output
    done = CliRunner().invoke(app, ["caption", str(folder), "--model", "nowhere"])
    assert "every image has a caption" in done.output
