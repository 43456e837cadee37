"""Which pairs a ballot shows, and that its page tells nobody who drew them."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghibli.inference.generate import generate_images
from ghibli.inference.load import load_model
from ghibli.inference.request import ImageRequest
from ghibli.jury import ballot
from ghibli.jury.ballot import Drawing
from ghibli.runtime.errors import UserError


@pytest.mark.parametrize(("models", "prompts", "most"), [(2, 3, 40), (3, 2, 60), (5, 4, 24), (2, 2, 4)])
def test_every_two_models_meet_equally_often_from_the_same_noise(
    models: int, prompts: int, most: int
) -> None:
    meeting = models * (models - 1) // 2
    items = ballot.items_needed(models, prompts, most)
    pairs = ballot.plan(models, prompts, items, most)
    assert len(pairs) == most and len(set(pairs)) == len(pairs)
    together = [pair for pair in pairs if pair.a.model != pair.b.model]
    assert all(pair.a.item == pair.b.item < items for pair in together)
    counts = Counter(frozenset((pair.a.model, pair.b.model)) for pair in together)
    assert len(counts) == meeting and max(counts.values()) - min(counts.values()) <= 1
    alone = [pair for pair in pairs if pair.a.model == pair.b.model]
    assert all(p.a.item != p.b.item and (p.a.item - p.b.item) % prompts == 0 for p in alone)
    assert len(alone) == most // ballot.SAME_EVERY
    assert ballot.plan(models, prompts, items, most) == pairs


@pytest.fixture
def page(tmp_path: Path) -> Path:
    pairs = ballot.plan(2, 2, 6, 6)
    draws = torch.Generator().manual_seed(0)
    drawn = [torch.rand(6, 3, 16, 16, generator=draws) for _ in range(2)]
    names = ["outputs/train/secret", "other.safetensors"]
    return ballot.write(tmp_path, names, ballot.items_of(["a </script> cat", "b"], 6), pairs, drawn)


def test_the_page_names_no_model_and_embeds_each_image_once(page: Path) -> None:
    text = page.read_text()
    assert "secret" not in text and "safetensors" not in text and "://" not in text.replace("data:", "")
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])
    assert len(set(data["images"])) == len(data["images"])
    key = json.loads(page.with_suffix(".key.json").read_text())
    assert key["ballot"] == data["ballot"] and key["models"] == ["outputs/train/secret", "other.safetensors"]
    assert {pair["prompt"] for pair in data["pairs"]} == {"a </script> cat", "b"}
    shown = {}  # the key's model and item of each image
    for listed, known in zip(data["pairs"], key["pairs"], strict=True):
        for side, model, item in zip("ab", known["models"], known["items"], strict=True):
            assert shown.setdefault(listed[side], Drawing(model, item)) == Drawing(model, item)
    first = [shown[number].model for number in sorted(shown)]
    assert first not in (sorted(first), sorted(first, reverse=True)), "images are not in the models' order"


def test_the_same_ballot_has_the_same_name(page: Path, tmp_path: Path) -> None:
    before = page.read_bytes()
    pairs, draws = ballot.plan(2, 2, 6, 6), torch.Generator().manual_seed(0)
    drawn = [torch.rand(6, 3, 16, 16, generator=draws) for _ in range(2)]
    prompts = ballot.items_of(["a </script> cat", "b"], 6)
    assert (
        ballot.write(tmp_path, ["outputs/train/secret", "other.safetensors"], prompts, pairs, drawn) == page
    )
    assert page.read_bytes() == before
    with pytest.raises(UserError, match="same images under other names"):
        ballot.write(tmp_path, ["other.safetensors", "outputs/train/secret"], prompts, pairs, drawn)
    assert page.read_bytes() == before and "secret" in page.with_suffix(".key.json").read_text()
    drawn[1] = 1 - drawn[1]
    assert ballot.write(tmp_path, ["a", "b"], prompts, pairs, drawn) != page


def test_each_model_draws_each_item_as_generate_does() -> None:
    """Two strengths of one adapter: the same noise for an item, and the prompt of the item."""
    adapter = "ghibli/demo/near/pytorch_lora_weights.safetensors"
    prompts = ballot.items_of(["a red train", "a lake"], 3)
    request = ImageRequest(prompts, "ddim", 1.0, 2, 5, (512, 512))
    sources, words = [adapter, f"{adapter}:0.3"], ["model=demo"]
    drawn = ballot.draw(sources, words, request, guidance=3.0, size=(64, 64))
    for source, images in zip(sources, drawn, strict=True):
        model = load_model([source], words)
        wanted = generate_images(model, replace(request, guidance=3.0, size=(64, 64)))
        assert torch.equal(images, wanted) and images.shape == (3, 3, 64, 64)
    assert not torch.equal(*drawn)
