"""Clip skip, weights and long prompts against diffusers' pipeline and the formulas."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from ghibli.adapters.apply import load_base
from ghibli.models.base import BaseModel, results_key
from ghibli.models.pipeline import make_pipeline
from ghibli.models.prompt_embeds import chunks_of, encode_weighted, same_length
from ghibli.runs.compose import compose_config
from ghibli.runtime.errors import UserError

LONG = " ".join(["a red train by a lake"] * 20)


@pytest.fixture(scope="module")
def pipeline(model: BaseModel) -> StableDiffusionPipeline:
    return make_pipeline(model)


def theirs(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize("skip", [1, 2, 3])
@torch.no_grad()
def test_clip_skip_is_a_text_encoder_with_fewer_layers(model: BaseModel, skip: int) -> None:
    """Made of the same weights. diffusers' own clip_skip fails with transformers 5.6 and later."""
    ours = replace(model, clip_skip=skip).encode_captions(["a red train"])
    config = copy.deepcopy(model.text_encoder.config)
    config.num_hidden_layers = 4 - skip
    shorter = CLIPTextModel(config).eval()
    found = shorter.load_state_dict(model.text_encoder.state_dict(), strict=False)
    assert not found.missing_keys and len(found.unexpected_keys) == 16 * (skip - 1)
    expected = shorter(model.tokenize(["a red train"])).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert skip == 1 or (ours - model.encode_captions(["a red train"])).abs().max() > 0.1


@torch.no_grad()
def test_results_are_cached_apart_where_they_differ(model: BaseModel) -> None:
    """By clip_skip, weights, and settings that are no weights."""
    bases = [replace(model, clip_skip=skip) for skip in (1, 2, 3)]
    keys = [results_key("weights", base) for base in bases]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        embeds = [bases[i].encode_captions(["a red train"]) for i in (one, other)]
        assert not torch.equal(*embeds) and keys[one] != keys[other]
    assert results_key("others", model) != keys[0] == results_key("weights", model)
    vae = copy.deepcopy(model.vae)
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    assert results_key("weights", replace(model, vae=vae)) != keys[0]


def test_more_layers_than_there_are() -> None:
    config = compose_config(["model=demo", "model.clip_skip=3"])
    assert load_base(config.model).clip_skip == 3
    with pytest.raises(UserError, match=r"^model.clip_skip=4 is out of range: from 1 to 3, its layers"):
        load_base(replace(config.model, clip_skip=4))
    with pytest.raises(UserError, match=r"^model.clip_skip=0 is out of range"):
        compose_config(["model=demo", "model.clip_skip=0"])


@torch.no_grad()
def test_a_plain_prompt_is_the_caption_bit_for_bit(model: BaseModel) -> None:
    for prompts in (["a red train"], ["", "a girl, Studio Ghibli style"], [" ".join(["train"] * 75)]):
        assert torch.equal(encode_weighted(model, prompts), model.encode_captions(prompts))


@torch.no_grad()
def test_a_long_prompt_is_its_pieces_one_behind_the_other(
    model: BaseModel, pipeline: StableDiffusionPipeline
) -> None:
    ids = model.tokenizer(LONG, add_special_tokens=False).input_ids
    pieces = [model.tokenizer.decode(ids[start : start + 75]) for start in range(0, len(ids), 75)]
    assert len(pieces) == 2
    expected = torch.cat([theirs(pipeline, piece) for piece in pieces], dim=1)
    torch.testing.assert_close(encode_weighted(model, [LONG]), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_weights_are_a1111s_formula(model: BaseModel) -> None:
    """z times the weights, then scaled to the mean that z had."""
    z = model.encode_captions(["a red train"])[0].double()
    (chunk,) = chunks_of(model, "a (red:1.5) train")
    assert chunk.input_ids == model.tokenize(["a red train"])[0].tolist()
    heavy = z.clone()
    at = [i for i, weight in enumerate(chunk.weights) if weight == 1.5]
    assert at and model.tokenizer.decode([chunk.input_ids[i] for i in at]).strip() == "red"
    heavy[at] *= 1.5
    expected = heavy * z.mean() / heavy.mean()
    torch.testing.assert_close(
        encode_weighted(model, ["a (red:1.5) train"])[0].double(), expected, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_weights_that_overflow_are_one_line(model: BaseModel) -> None:
    """And a weight of 0 alone, or negative ones, are numbers like others."""
    for prompt in ("(a lake:0)", "(a lake:-1)", "((a:1e-200):1e-200)"):
        assert encode_weighted(model, [prompt]).isfinite().all()
    with pytest.raises(UserError, match=r"^the weights in the prompt `\(a lake:1e39\)` are too large"):
        encode_weighted(model, ["a train", "(a lake:1e39)"])


@torch.no_grad()
def test_repeating_a_prompt_changes_no_prediction(model: BaseModel) -> None:
    """What a prompt beside a longer one is made: every key occurs as often as every other."""
    short, long = encode_weighted(model, ["a lake"]), encode_weighted(model, [LONG])
    one, two = same_length(short, long)
    assert one.shape == two.shape == long.shape and torch.equal(two, long)
    assert torch.equal(encode_weighted(model, ["a lake", LONG])[0], one[0])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500])
    expected, found = (model.unet(x, t, embeds).sample for embeds in (short, one))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (model.unet(x, t, long).sample - expected).abs().max() > 1e-3


@torch.no_grad()
def test_two_and_three_pieces_meet_at_six(model: BaseModel) -> None:
    """In any order; each prompt is its own pieces, repeated whole."""
    prompts = [LONG, "a lake", LONG + " train" * 60]
    alone = [encode_weighted(model, [prompt]) for prompt in prompts]
    assert [embeds.shape[1] for embeds in alone] == [2 * 77, 77, 3 * 77]
    together = encode_weighted(model, prompts)
    one, two = same_length(alone[0], alone[2])
    for found, expected in zip([*together, one[0], two[0]], [*alone, alone[0], alone[2]], strict=True):
        repeated = expected[0].repeat(6 * 77 // expected.shape[1], 1)
        torch.testing.assert_close(found, repeated, rtol=0, atol=1e-5)
