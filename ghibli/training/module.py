"""GhibliModule: wires base, adapter and loss for Lightning. No maths of its own."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from ghibli.adapters import lora
from ghibli.adapters.files import Adapter, check_same_shape, read_adapter, start_from
from ghibli.config.schema import Config
from ghibli.diffusion.losses import denoising_losses, min_snr_weights
from ghibli.diffusion.process import add_noise, guided_noise, linear_betas, predict_branches, velocity
from ghibli.diffusion.samplers import make_scheduler
from ghibli.evaluation.gain import Diverged, Probe, expected_losses, significant_best
from ghibli.models.base import BaseModel, weights_hash
from ghibli.models.performance import PromptEmbeds, arrange, compiled, is_frozen, prompts_fit, shrink_frozen
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.resources import device_name
from ghibli.runtime.seeding import Stream, seed_global_rng
from ghibli.training.base_scores import cached_scores
from ghibli.training.optimizers import lr_factor, make_optimizer, use_average


class Examples(NamedTuple):
    """One forward pass of training: which images, at which timesteps, with which losses (B,)."""

    names: list[str]
    timesteps: torch.Tensor
    losses: torch.Tensor


class GhibliModule(L.LightningModule):
    """SD 1.5 with an adapter (or an unfrozen UNet) and the guidance-1 or guidance-w loss.

    Args:
        config: the run's configuration.
        base: the loaded base; its UNet and text encoder are trained in place.
    """

    strict_loading = False  # checkpoints hold trainable weights only; checked in on_load_checkpoint

    def __init__(self, config: Config, base: BaseModel):
        super().__init__()
        self.config, self.base = config, base
        self.base_hash = weights_hash(base)
        self.unet, self.text_encoder = base.unet, base.text_encoder
        own = make_scheduler("ddpm", base).alphas_cumprod
        self.register_buffer("base_alphas_cumprod", own, persistent=False)
        self.register_buffer("alphas_cumprod", training_schedule(config, own), persistent=False)
        self.register_buffer("empty_ids", base.tokenize([""]), persistent=False)
        self.start: Adapter | None = None  # what lora.init names
        if config.finetune == "lora":
            if config.lora.init is not None:
                self.start = read_adapter(config.lora.init, base, "lora.init")
                check_same_shape(self.start, config.lora)
            lora.attach(base, config.lora, config.seed)
        elif config.finetune == "full":
            lora.unfreeze_unet(base)
        self.trainable = lora.trainable(base)
        arrange(base, config.compute)
        self._predict_compiled = compiled(self.predict, config.compute)
        self.known_prompts: PromptEmbeds | None = None  # where the text encoder is not trained
        self.history: list[Probe] = []  # of the untouched model, then after every epoch
        self.seen: list[Examples] = []  # since the last optimiser step
        self._scores: list[torch.Tensor] = []

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def predict(self, noisy_latents: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The UNet's output (B, C, H, W) at timesteps and prompt_embeds."""
        return self.unet(noisy_latents, *inputs, return_dict=False)[0]

    def branches(
        self, batch: dict[str, Any], guidance_scale: float, alphas_cumprod: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(uncond or None at guidance 1, cond, target), each (B, C, H, W)."""
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
        prompt_embeds, negative_prompt_embeds = self.embed(batch["input_ids"], guidance_scale)
        uncond, cond = predict_branches(
            self._predict_compiled if self.training else self.predict,
            noisy_latents, timesteps, prompt_embeds, negative_prompt_embeds,
        )  # fmt: skip
        if self.base.prediction_type == "epsilon":
            return uncond, cond, noise
        return uncond, cond, velocity(latents, noise, timesteps, alphas_cumprod)

    def losses(self, batch: dict[str, Any]) -> torch.Tensor:
        """The training loss of each example before any weighting, (B,) float32."""
        guidance = self.config.loss.guidance
        uncond, cond, target = self.branches(batch, guidance, self.alphas_cumprod)
        return denoising_losses(cond if uncond is None else guided_noise(uncond, cond, guidance), target)

    def scores(self, batch: dict[str, Any], guidance: float, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Losses of a probe batch, (2, K): at this guidance, and of the conditional branch alone."""
        uncond, cond, target = self.branches(batch, guidance, alphas_cumprod)
        alone = denoising_losses(cond, target)
        if uncond is None:
            return torch.stack([alone, alone])
        return torch.stack([denoising_losses(guided_noise(uncond, cond, guidance), target), alone])

    def embed(
        self, input_ids: torch.Tensor, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds), each (B, L, D); the second only with guidance."""
        encode = self.known_prompts or self.base.encode_prompts
        if guidance_scale == 1:
            return encode(input_ids), None
        embeds = encode(torch.cat([self.empty_ids, input_ids]))
        return embeds[1:], embeds[:1].expand(len(input_ids), -1, -1)

    def on_train_start(self) -> None:
        """Fills in lora.init, after the base has been scored and drawn; switches the adapters' dropout on.

        Nothing in the base itself depends on the mode.
        """
        if self.start is not None and self.trainer.global_step == 0:
            start_from(self.start, self.trainable)
        self.unet.train()
        self.text_encoder.train()
        if self.known_prompts is not None:
            self.text_encoder.cpu()  # room for training; sampling fetches it

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """The batch's mean loss, and what the base is expected to score at its timesteps."""
        seed_global_rng(Stream.DROPOUT, self.config.seed, batch["example"][0])
        losses = self.losses(batch)
        self.seen.append(Examples(batch["name"], batch["timesteps"], losses.detach()))
        weighted, gamma = losses, self.config.loss.snr_gamma
        if gamma is not None:
            weighted = losses * min_snr_weights(
                batch["timesteps"], self.alphas_cumprod, gamma, self.base.prediction_type
            )
        expected = self.expected[batch["timesteps"]].mean()
        return {"loss": weighted.mean(), "plain": losses.detach().mean(), "expected": expected}

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        use_average(self.optimizers(use_pl_optimizer=False), wanted=False)

    def on_validation_epoch_start(self) -> None:
        """What is validated is kept as the epoch's result, until the next batch."""
        if self.trainer.state.fn == "fit":
            use_average(self.optimizers(use_pl_optimizer=False), wanted=True)
        self._scores = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._scores.append(self.scores(batch, self.config.loss.guidance, self.base_alphas_cumprod))

    def on_validation_epoch_end(self) -> None:
        """Adds a Probe to the history and logs what stops early and chooses the best epoch."""
        probe = self.probe(self.gather(torch.stack(self._scores)).cpu())
        if probe.broken:
            raise Diverged(self.named(probe.broken), len(self.history), self.config.optimizer.lr)
        self.history.append(probe)
        self.log("probe/val_gain", probe.val_gain.value, logger=False)
        self.log("probe/significant_best", significant_best(self.history).value, logger=False)

    def named(self, images: list[int]) -> list[tuple[str, list[int]]]:
        """(file name, timesteps) of images of the probe."""
        data = self.trainer.datamodule
        return [(data.probe_images[i].path.name, data.probe_batches[i]["timesteps"].tolist()) for i in images]

    def gather(self, scores: torch.Tensor) -> torch.Tensor:
        """(P + Q, 2, K) of the whole probe from this device's share of it; see data.share_of_probe."""
        if self.trainer.world_size == 1:
            return scores
        shares = self.all_gather(scores)  # (devices, images each, 2, K)
        return shares.transpose(0, 1).flatten(0, 1)[: len(self.trainer.datamodule.probe_batches)]

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Scores the still untouched base, or reads that from the cache: the reference of all gains.

        Lightning calls this before it restores a checkpoint, so a resumed run scores the same.
        """
        shrink_frozen(self.base, str(self.trainer.precision))
        self.to(self.trainer.strategy.root_device)
        self.eval()
        self.remember_prompts()
        guidance, own = self.config.loss.guidance, self.base_alphas_cumprod
        self.base_losses = self.score_base(1, own)[:, 0]
        start_scores = self.score_base(guidance, own)
        on_training_schedule = self.score_base(guidance, self.alphas_cumprod)[:, 0]
        timesteps = torch.cat([batch["timesteps"] for batch in self.trainer.datamodule.probe_batches])
        expected = expected_losses(timesteps, on_training_schedule.flatten(), self.num_train_timesteps)
        self.expected = expected.to(self.device)
        start = self.probe(start_scores)
        if start.broken:
            name, _ = self.named(start.broken)[0]
            raise UserError(
                f"the untouched base itself has a loss that is not finite, on {name} for one: use "
                "trainer.precision=32-true, and look at the base's weights (ghibli check)"
            )
        if stage == "fit":
            self.history = [start]

    def remember_prompts(self) -> None:
        """Encodes all captions once where the text encoder stays as it is."""
        input_ids = self.trainer.datamodule.all_input_ids
        if is_frozen(self.text_encoder) and prompts_fit(self.base, input_ids):
            with (
                counted("encoding the captions") as on_progress,
                self.trainer.precision_plugin.forward_context(),
            ):
                self.known_prompts = PromptEmbeds(self.base, input_ids.to(self.device), on_progress)

    def score_base(self, guidance: float, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """The base's scores on the whole probe, (P + Q, 2, K), from the cache where they are known.

        With several devices the first one scores and tells the others.
        """
        data, trainer = self.trainer.datamodule, self.trainer
        if not trainer.is_global_zero:
            return trainer.strategy.broadcast(None)
        settings = {
            "version": 1,  # to be raised when the probe's items or the scoring change
            "base": self.base_hash, "guidance": float(guidance), "resolution": self.config.model.resolution,
            "resize": self.config.data.resize, "items": self.config.validation.items_per_image,
            "schedule": hashlib.sha256(alphas_cumprod.cpu().numpy().tobytes()).hexdigest()[:16],
            "precision": str(trainer.precision), "device": device_name(self.device),
            "torch": torch.__version__,
        }  # fmt: skip
        folder = Path(self.config.cache_dir) / "base_scores"
        with counted("scoring the base") as on_progress, trainer.precision_plugin.forward_context():

            def score(index: int) -> torch.Tensor:
                batch = self.transfer_batch_to_device(data.probe_batches[index], self.device, 0)
                scores = self.scores(batch, guidance, alphas_cumprod)
                on_progress(index + 1, len(data.probe_batches))
                return scores

            return trainer.strategy.broadcast(cached_scores(folder, settings, data.probe_images, score))

    def probe(self, scores: torch.Tensor) -> Probe:
        """Scores of the whole probe, (P + Q, 2, K), beside the base's."""
        held_out = len(self.trainer.datamodule.val_images)
        return Probe(
            val=scores[:held_out, 0], val_g1=scores[:held_out, 1], train=scores[held_out:, 0],
            base_val=self.base_losses[:held_out], base_train=self.base_losses[held_out:],
        )  # fmt: skip

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser of the trainable weights; the learning rate is a pure function of the step."""
        options = self.config.optimizer
        optimizer = make_optimizer(options, self.trainable, on_gpu=self.device.type == "cuda")
        trainer = self.trainer
        steps = trainer.datamodule.steps_per_epoch(trainer.accumulate_grad_batches, trainer.world_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_factor(
                step, schedule=options.schedule, warmup_steps=options.warmup_steps,
                steps_per_epoch=steps, epochs=trainer.max_epochs,
            ),
        )  # fmt: skip
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trainable weights only, and the probe's history."""
        checkpoint["state_dict"] = {name: value.detach() for name, value in self.trainable.items()}
        checkpoint["probe"] = [vars(probe) for probe in self.history]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other trainable weights: loading it would change nothing."""
        stored, wanted = set(checkpoint["state_dict"]), set(self.trainable)
        if stored != wanted:
            different = sorted(stored ^ wanted)
            raise UserError(
                f"the checkpoint does not fit this run: {len(different)} weights differ, "
                f"the first is {different[0]}"
            )
        self.history = [Probe(**stored) for stored in checkpoint["probe"]]


def training_schedule(config: Config, own: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod (T,) of training: the base's own, or the slides' linear betas on purpose."""
    if config.loss.noise_schedule == "base":
        return own
    return torch.cumprod(1 - linear_betas(len(own)), dim=0)
