"""The demo base: small, complete, loadable without our code; its pretraining resumes bit for bit."""

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ghibli.config.paths import DEMO
from ghibli.demo.pretrain import architecture, stages
from ghibli.demo.pretrain.training_loop import Plan, train_stage
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(DEMO / "tokenizer")


def test_all_files_together_are_at_most_24_mb():
    size = sum(
        file.stat().st_size for file in DEMO.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )
    assert size <= 24e6


def test_vocabulary_fits_the_text_encoder(tokenizer):
    text_encoder = CLIPTextModel.from_pretrained(DEMO / "text_encoder")
    assert len(tokenizer) == text_encoder.config.vocab_size
    assert text_encoder.dtype == torch.float32
    assert tokenizer.model_max_length == 77
    ids = tokenizer("", padding="max_length").input_ids
    assert ids == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 76


def test_every_caption_word_is_one_piece(tokenizer):
    texts = [compose(seed).caption for seed in range(500)]
    texts += [
        "A panda on the top of the train, Studio Ghibli style",
        "A girl standing in a greenhouse, Studio Ghibli style",
    ]
    for word in {word for text in texts for word in text.replace(",", "").split()}:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_an_unknown_word_falls_back_to_pieces(tokenizer):
    ids = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(ids) > 1 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).strip() == "zebra"


@pytest.mark.slow
def test_the_pipeline_loads_and_draws_without_our_code(tmp_path):
    code = (
        f"import sys; from diffusers import StableDiffusionPipeline as P;"
        f"p = P.from_pretrained({str(DEMO)!r});"
        "image = p('a panda', num_inference_steps=2).images[0];"
        "assert image.size == (128, 128) and p.safety_checker is None;"
        "assert not any(name.split('.')[0] == 'ghibli' for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("look", "bar"), [("photo", 28.0), ("drawn", 26.0)])
def test_the_vae_keeps_held_out_scenes(look, bar):
    vae = AutoencoderKL.from_pretrained(DEMO / "vae").eval()
    images = stages.draw_images(64, look, EVALUATION_SEEDS.start, grain=False)
    assert stages.psnr(vae, images) >= bar
    posterior = vae.encode(stages.to_pixel_values(images[:8])).latent_dist
    assert 0.6 < posterior.mean.std().item() * vae.config.scaling_factor < 1.5


def test_clip_prefers_the_right_caption(tokenizer):
    clip = CLIPModel.from_pretrained(DEMO / "clip").eval()
    first = EVALUATION_SEEDS.start
    images = stages.to_pixel_values(stages.draw_images(16, "photo", first, grain=True))
    ids = stages.tokenize(tokenizer, [compose(first + i).caption for i in range(16)])
    with torch.no_grad():
        logits = clip(input_ids=ids, pixel_values=images).logits_per_image
    assert (logits.argmax(dim=1) == torch.arange(16)).float().mean() >= 0.5


class TinyLoss:
    """A tiny loss with what a stage's loss has: random batches and a model."""

    def __init__(self, model):
        self.model = model

    def __call__(self, step, generator):
        inputs = torch.randn((8, 4), generator=generator)
        return (self.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()


def run_tiny(checkpoint, stops, muon):
    for stop in stops:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
        plan = Plan(steps=20, learning_rate=1e-2, warmup=4, save_every=5, muon=muon)
        train_stage("tiny", model, TinyLoss(model), plan, checkpoint, stop_at=stop)
    return model.state_dict()


@pytest.mark.parametrize("muon", [False, True])
def test_pretraining_continues_exactly_from_a_checkpoint(tmp_path, muon):
    whole = run_tiny(tmp_path / "whole.pt", [20], muon)
    parts = run_tiny(tmp_path / "parts.pt", [5, 13, 20], muon)  # 13 resumes from the checkpoint of step 10
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_vae_stage_continues_exactly(tmp_path):
    pool = stages.draw_images(4, "drawn", 0, grain=False)
    results = []
    for name, stops in (("whole", [2]), ("parts", [1, 2])):
        for stop in stops:
            torch.manual_seed(0)
            vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
            loss = stages.VaeLoss(vae, [pool, pool], batch=3, full_size_from=9)
            train_stage(
                "vae",
                vae,
                loss,
                Plan(steps=2, learning_rate=1e-3, save_every=1),
                tmp_path / f"{name}.pt",
                stop_at=stop,
            )
        results.append(vae.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_the_unet_stage_continues_exactly(tmp_path, tokenizer):
    """The real stage, with text encoder and Muon, for 2 steps at once and for 1 + 1."""
    clip = CLIPModel.from_pretrained(DEMO / "clip")
    moments = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(1)).abs().half()
    alphas_cumprod = architecture.make_pndm_scheduler().alphas_cumprod
    results = []
    for name, stops in (("whole", [2]), ("parts", [1, 2])):
        for stop in stops:
            torch.manual_seed(0)
            unet, text_encoder = architecture.make_unet(), architecture.make_text_encoder(clip)
            both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
            loss = stages.UnetLoss(unet, text_encoder, tokenizer, moments, 0.5, alphas_cumprod, batch=3)
            plan = Plan(steps=2, learning_rate=4e-3, warmup=1, muon=True, save_every=1)
            train_stage("unet", both, loss, plan, tmp_path / f"{name}.pt", stop_at=stop)
        results.append(both.state_dict())
    fresh = architecture.make_unet().state_dict()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert any(not torch.equal(results[0][f"unet.{key}"], fresh[key]) for key in fresh)
