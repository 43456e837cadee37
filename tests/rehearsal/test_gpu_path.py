"""A run of Stable Diffusion 1.5 on fake CUDA tensors: a wrong device or dtype fails.

The widths and the resolution are the real ones; of blocks and layers that repeat each other there is one.
At the end one `.to(device)` after another is taken out of a copy of the code, and the rehearsal fails.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import _disable_current_modes
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ghibli.adapters.lora import add_lora, trainable
from ghibli.config.registry import SAMPLERS
from ghibli.config.schema import Config
from ghibli.data import latents
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.latents import Moments
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.diffusion import samplers
from ghibli.diffusion.samplers import Cell
from ghibli.evaluation import features
from ghibli.evaluation.features import FeatureExtractor
from ghibli.models import sd15
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.performance import shrink_frozen
from ghibli.models.quantize import compute_in, quantize_frozen
from ghibli.prepare.fake_gpu import CUDA, FakeGpu, fake_gpu
from ghibli.prepare.rehearsal import autocast, fake_base
from ghibli.runs.folder import RunDir
from ghibli.training.callbacks.checkpoints import CleanStop, FolderCheckpoint
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import make_optimizer
from ghibli.training.probe import PairedProbe, gather
from ghibli.training.trainer import make_callbacks

SIZE = ("model.resolution=512", "data.batch_size=1", "data.accumulate=1", "lora.rank=32")
SHORT = ("validation.max_images=1", "validation.items_per_image=1", "data.resize=squash")
CLIP_L = {  # openai/clip-vit-large-patch14, of whose layers only the first
    "text_config": sd15.TEXT_ENCODER | {"num_hidden_layers": 2},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    },
    "projection_dim": 768,
}  # fmt: skip
APPLY = torch.nn.Module._apply  # as it is without a fake GPU
STEPS, EVERY = 6, 3  # rehearsed, and between two rows of metrics.csv
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")


@dataclass
class Rehearsed:
    """A run as it stands on the GPU when training begins."""

    module: Any  # a GhibliModule
    data: GhibliDataModule
    trainer: Any  # what Lightning's Trainer is asked for
    gpu: FakeGpu

    def batch(self, example: int = 0) -> dict[str, Any]:
        """A batch as the loader makes it, moved to the GPU by Lightning."""
        made = next(iter(self.data.train_dataloader()))
        return self.module.transfer_batch_to_device(made, self.module.device, 0)

    def step(self, batch: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The forward pass of a training step; what was asked of the GPU before is forgotten."""
        batch = self.batch() if batch is None else batch
        self.gpu.waits.clear()
        with autocast(self.trainer.precision):
            return self.module.train().training_step(batch, 0)

    def trains_with(self, **changes: Any) -> "Rehearsed":
        """The same weights under other settings of the loss."""
        module = self.module
        module.config = replace(module.config, loss=replace(module.config.loss, **changes))
        return self


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as found:
        yield found


@pytest.fixture(scope="module")
def set_up(
    make_config: Callable[..., Config], gpu: FakeGpu, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Rehearsed]:
    """Sets a run up as Lightning would: images encoded, the base scored, all parts where they train.

    The later ones take the latents of the first, and with its precision the base's scores.
    """
    cache, few = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("few")
    write_folder(few, "drawn", 4, FINETUNE_SEEDS.start)
    encode = GhibliDataModule._moments
    known: list[Moments] = []

    def moments(data: GhibliDataModule, images: list, device: torch.device, *, mirrored: bool) -> Moments:
        if not known:
            known.append(encode(data, images, device, mirrored=mirrored))
        return known[0]

    def make(*words: str, precision: str = "bf16-mixed") -> Rehearsed:
        folder = tmp_path_factory.mktemp("rehearsed")
        config = make_config(*SIZE, *SHORT, f"cache_dir={cache}", f"data.root={few}", *words)
        base = fake_base(few_layers(), gpu)
        module: Any = GhibliModule(config, base, base_hash="rehearsed")
        data = GhibliDataModule(config, base, RunDir(folder), module.num_train_timesteps)
        trainer = stand_in(config, data, precision)
        trainer.lightning_module, module.trainer, data.trainer = module, trainer, trainer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ghibli.data.datamodule.part_hash", lambda part: "rehearsed")
            patch.setattr(GhibliDataModule, "_moments", moments)
            data.setup("fit")
        module.setup("fit")
        module.trainable = trainable(module.base)  # moved fakes are new parameters
        return Rehearsed(module, data, trainer, gpu)

    return make


def few_layers() -> BaseModel:
    """SD 1.5 with one block and layer of each kind; the VAE keeps its four widths."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"layers_per_block": 1, **two_blocks(sd15.UNET)}.items():
            patch.setitem(sd15.UNET, name, value)
        patch.setitem(sd15.VAE, "layers_per_block", 1)
        patch.setitem(sd15.TEXT_ENCODER, "num_hidden_layers", 2)
        return sd15.sd15_shapes()


def two_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's settings for its first and its last block alone."""
    names = "block_out_channels", "down_block_types", "up_block_types"
    return {name: (config[name][0], config[name][-1]) for name in names}


def stand_in(config: Config, data: GhibliDataModule, precision: str) -> Any:
    """What this package asks of Lightning's Trainer on one GPU."""
    progress = SimpleNamespace(is_last_batch=False)
    return SimpleNamespace(
        precision=precision, datamodule=data, world_size=1, global_rank=0, global_step=0, current_epoch=0,
        is_global_zero=True, accumulate_grad_batches=1, log_every_n_steps=EVERY, loggers=[], optimizers=[],
        state=SimpleNamespace(fn="fit"), estimated_stepping_batches=STEPS,
        precision_plugin=SimpleNamespace(forward_context=lambda: autocast(precision)),
        strategy=SimpleNamespace(
            root_device=CUDA, broadcast=lambda value: value, reduce=lambda value, reduce_op: value
        ),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(set_up: Callable[..., Rehearsed]) -> Rehearsed:
    return set_up("loss.guidance=7.5")


# Training


@pytest.mark.parametrize("guidance", [1, 7.5])
def test_a_training_step(run: Rehearsed, guidance: float) -> None:
    found = run.trains_with(guidance=guidance).step()
    assert {name: (value.device, value.dtype) for name, value in found.items()} == {
        name: (CUDA, torch.float32) for name in ("loss", "plain", "expected")
    }
    assert found["loss"].requires_grad and run.gpu.waits == []


def test_what_is_where(run: Rehearsed) -> None:
    """Frozen matrices in 16 bits, the adapter in fp32, the VAE back on the CPU."""
    weights = dict(run.module.unet.named_parameters())
    matrices = {w.dtype for name, w in weights.items() if name.endswith("base_layer.weight")}
    adapter = {w.dtype for name, w in weights.items() if ".lora_" in name}
    assert (matrices, adapter) == ({torch.bfloat16}, {torch.float32})
    parts = run.module.unet, run.module.text_encoder
    assert {w.device for part in parts for w in part.parameters()} == {CUDA}
    assert run.module.base.vae.device.type == "cpu"
    assert run.data.moments.mean[0].device.type == "cpu"


def test_a_step_in_fp16_with_every_caption_encoded_before(set_up: Callable[..., Rehearsed]) -> None:
    run = set_up("lora.text_encoder=false", "loss.weighting=min_snr", precision="16-mixed")
    assert run.module.known_prompts.embeds.device == CUDA
    found = run.step()
    assert found["loss"].dtype == torch.float32 and run.gpu.waits == []


def test_compute_options(set_up: Callable[..., Rehearsed]) -> None:
    """All but compute.compile: what it compiles is what the other tests run."""
    run = set_up("compute.channels_last=true", "compute.checkpoint_every=1")
    assert run.step()["loss"].device == CUDA and run.gpu.waits == []


@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_bits(make_config: Callable[..., Config], gpu: FakeGpu, bits: int) -> None:
    """At the demo's widths: bitsandbytes rounds real weights, and has fake kernels for the rest."""
    pytest.importorskip("bitsandbytes", reason="extra of this project")
    with pytest.MonkeyPatch.context() as patch, _disable_current_modes():
        patch.setattr(torch.nn.Module, "_apply", APPLY)
        base = load("demo")
        base.unet = UNet2DConditionModel.from_config({**base.unet.config, **two_blocks(base.unet.config)})
        base.unet.requires_grad_(False)
        quantize_frozen(base, bits)
        add_lora(base, make_config("lora.rank=4").lora, 0)
    shrink_frozen(base, "bf16-mixed")
    compute_in(base, torch.bfloat16)
    for part in base.adaptable.values():
        part.to(CUDA)
    noise, timesteps = torch.zeros(1, 4, 8, 8).to(CUDA), torch.zeros(1, dtype=torch.long).to(CUDA)
    with autocast("bf16-mixed"):
        embeds = base.encode_prompts(base.tokenize(["a house"]).to(CUDA))
        found = base.unet(noise, timesteps, embeds, return_dict=False)[0]
    assert found.device == CUDA and found.requires_grad


def test_steps_ask_nothing_of_the_gpu_but_where_they_log(
    set_up: Callable[..., Rehearsed], tmp_path: Path
) -> None:
    """Neither .item(), .cpu(), bool() nor synchronize, with everything that listens to a step.

    The UNet, which asks nothing in the tests above, is stood in for. Checkpoints, which read all weights,
    have a period of their own.
    """
    run = set_up("optimizer.ema_decay=0.99", "lora.text_encoder=false")
    module, trainer = run.module, run.trainer
    module._predict_compiled = light_unet
    optimizer = make_optimizer(module.config.optimizer, module.trainable, on_gpu=True)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    trainer.optimizers = [optimizer]
    module.optimizers = lambda use_pl_optimizer: optimizer
    made = make_callbacks(module.config, RunDir(tmp_path), CleanStop(RunDir(tmp_path)))
    callbacks = [callback for callback in made.ordered if not isinstance(callback, FolderCheckpoint)]
    made.doctor.setup(trainer, module, "fit")
    batch, waits = run.batch(), {}
    for number in range(1, STEPS + 1):
        call(callbacks, "on_train_batch_start", trainer, module, batch, 0)
        module.on_train_batch_start(batch, 0)
        found = run.step(batch)
        for parameter in module.trainable.values():
            parameter.grad = torch.zeros_like(parameter)  # stands in for the backward pass
        call(callbacks, "on_before_optimizer_step", trainer, module, optimizer)
        torch.nn.utils.clip_grad_norm_(module.trainable.values(), 1.0)
        optimizer.step()
        schedule.step()
        trainer.global_step = number
        call(callbacks, "on_train_batch_end", trainer, module, found, batch, 0)
        waits[number] = len(run.gpu.waits)
    assert {number for number, count in waits.items() if count} == {EVERY, 2 * EVERY}
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert {value.device for value in state} == {CUDA}


def call(callbacks: list[Any], hook: str, *arguments: Any) -> None:
    for callback in callbacks:
        getattr(callback, hook)(*arguments)


# The probe, sampling, evaluation


def test_the_probe(run: Rehearsed) -> None:
    """Guided; at guidance 1 it has scored the base when the run was set up."""
    run.trains_with(guidance=7.5).module.eval()
    run.module.probe.begin_epoch()
    with torch.no_grad(), autocast("bf16-mixed"):
        for batch in run.data.val_dataloader():
            run.module.validation_step(run.module.transfer_batch_to_device(batch, CUDA, 0), 0)
    scores = run.module.probe.collected()
    assert scores.shape == (2, 2, 1) and scores.device == CUDA and scores.dtype == torch.float32
    run.module.probe.end_epoch(run.module)
    assert run.module.probe.history[-1].val.shape == (1, 1)


def light_unet(noisy: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor, **_: Any) -> Any:
    """Stands in for the UNet where what is around it is rehearsed."""
    found = noisy + timesteps[:, None, None, None] + prompt_embeds.mean((1, 2))[:, None, None, None]
    return (found,) if "return_dict" in _ else found


def sampled(base: BaseModel, sampler: str, steps: int) -> torch.Tensor:
    plain_sample = inspect.unwrap(samplers.sample)  # without inference mode, which fakes do not follow
    with torch.no_grad(), autocast("bf16-mixed"):
        return plain_sample(
            base, ["a house"], Cell(sampler, 7.5), num_inference_steps=steps, seeds=[0], resolution=512
        )


def drawn(base: BaseModel) -> torch.Tensor:
    with samplers.in_eval_mode(base):
        return sampled(base, "ddim", steps=2)


def test_sampling(run: Rehearsed) -> None:
    images = drawn(run.module.base)
    assert images.shape == (1, 3, 512, 512) and images.device.type == "cpu"
    assert next(run.module.base.vae.parameters()).device.type == "cpu"  # back at home


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of a fake
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_samplers_own_arithmetic(run: Rehearsed, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run.module.base
    monkeypatch.setattr(base.unet, "forward", light_unet)
    monkeypatch.setattr(base.vae, "decode", lambda latents: SimpleNamespace(sample=latents[:, :3]))
    monkeypatch.setattr(base.text_encoder, "forward", light_text_encoder)
    assert sampled(base, sampler, steps=3).shape == (1, 3, 64, 64)


def light_text_encoder(input_ids: torch.Tensor, **_: Any) -> Any:
    embeds = input_ids[:, :, None] + torch.zeros(1, 1, 768).to(CUDA)
    return SimpleNamespace(last_hidden_state=embeds)


@contextmanager
def vae_on_gpu(base: BaseModel) -> Iterator[BaseModel]:
    home = base.vae.device
    base.vae.to(CUDA)
    try:
        yield base
    finally:
        base.vae.to(home)


@pytest.fixture
def extract(run: Rehearsed, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Evaluates three images of 512 px as `ghibli evaluate` does, with CLIP's real widths."""
    for name in ("weights_hash", "part_hash"):
        monkeypatch.setattr(f"ghibli.evaluation.features.{name}", lambda part: "rehearsed")

    def load_clip(name: str) -> tuple[CLIPModel, CLIPImageProcessor]:
        with gpu.all_fake():
            return CLIPModel(CLIPConfig(**CLIP_L)).eval(), CLIPImageProcessor()

    def measure(config: Config) -> dict[str, torch.Tensor]:
        with vae_on_gpu(run.module.base) as base:
            return FeatureExtractor(config, base).measure(torch.zeros(3, 3, 512, 512), ["a house"] * 3)

    monkeypatch.setattr("ghibli.evaluation.features.load_clip", load_clip)
    return measure


def test_features_and_caption_fit(
    run: Rehearsed, extract: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CLIP on the CPU the score of an evaluation at 512 px would take hours."""
    seen: list[torch.device] = []
    score = CLIPModel.forward
    monkeypatch.setattr(
        CLIPModel, "forward",
        lambda clip, **inputs: seen.append(next(clip.parameters()).device) or score(clip, **inputs),
    )  # fmt: skip
    found = extract(run.module.config)
    assert seen == [CUDA]
    assert {name: (rows.device.type, len(rows)) for name, rows in found.items()} == {
        "features": ("cpu", 3), "layout": ("cpu", 3), "caption_fit": ("cpu", 3),
    }  # fmt: skip


def test_devices_put_their_scores_together(gpu: FakeGpu) -> None:
    """DDP's gather, with Lightning's collective stood in for: the probe's images in their order."""
    shares = torch.zeros(2, 3, 2, 4).to(CUDA)
    data = SimpleNamespace(scored_batches=[0] * 5)
    module: Any = SimpleNamespace(
        trainer=SimpleNamespace(world_size=2, datamodule=data), all_gather=lambda scores: shares
    )
    found = gather(module, shares[0])
    assert found.device == CUDA and found.shape == (5, 2, 4)


# Without one of the moves to the device


def trains(run: Rehearsed, extract: Callable[..., Any], images: Path) -> None:
    run.module._predict_compiled = light_unet
    run.module.probe.score_untouched(run.module, "fit")
    run.step()


def encodes_captions(run: Rehearsed, extract: Callable[..., Any], images: Path) -> None:
    run.module.base.encode_captions(["a house"])


def draws(run: Rehearsed, extract: Callable[..., Any], images: Path) -> None:
    drawn(run.module.base)


def encodes(run: Rehearsed, extract: Callable[..., Any], images: Path) -> None:
    with vae_on_gpu(run.module.base) as base:
        latents.encode(base, sorted(images.rglob("*.png"))[:1], resolution=512, resize="squash")


def evaluates(run: Rehearsed, extract: Callable[..., Any], images: Path) -> None:
    extract(run.module.config)


@pytest.mark.parametrize(
    ("owner", "name", "text", "becomes", "rehearse"),
    [
        (latents, "encode_chunk", "pixel_values.to(device)", "pixel_values", encodes),
        (
            PairedProbe,
            "score_untouched",
            "expected.to(module.device)",
            "expected",
            trains,
        ),
        (BaseModel, "encode_captions", ".to(device)", "", encodes_captions),
        (samplers, "predictor", "t.to(latents.device)", "t", draws),
        (features, "style_features", "images.to(vae.device)", "images", evaluates),
        (FeatureExtractor, "_caption_fit", "clip.to(device)", "pass", evaluates),
        (FeatureExtractor, "_caption_fit", "input_ids.to(device)", "input_ids", evaluates),
    ],
)
def test_without_a_move_the_rehearsal_fails(
    run: Rehearsed, extract: Callable[..., Any], images: Path, monkeypatch: pytest.MonkeyPatch,
    owner: Any, name: str, text: str, becomes: str, rehearse: Callable[..., None],
) -> None:  # fmt: skip
    monkeypatch.setattr(run.module, "_predict_compiled", run.module._predict_compiled)
    monkeypatch.setattr(run.module.probe, "expected", run.module.probe.expected)
    monkeypatch.setattr(owner, name, mutated(getattr(owner, name), text, becomes))
    with pytest.raises(RuntimeError, match="device"):
        rehearse(run, extract, images)


def mutated(function: Callable, text: str, becomes: str) -> Callable:
    """A copy of a function whose source has `becomes` where it has `text`, which must stand there once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(text) == 1, f"{function.__qualname__} has changed: {text}"
    names = dict(inspect.unwrap(function).__globals__)
    exec(compile(source.replace(text, becomes), function.__qualname__, "exec"), names)
    return names[function.__name__]
