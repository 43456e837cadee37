"""GhibliModule: wires base, adapter and loss for Lightning. No maths of its own."""

import math
from typing import Any

import lightning as L
import torch

from ghibli import lora
from ghibli.base_model import BaseModel
from ghibli.diffusion import (
    add_noise,
    denoising_losses,
    linear_betas,
    min_snr_weights,
    predict_noise,
    velocity,
)
from ghibli.mistakes import UserMistake
from ghibli.randomness import Stream, seed_global_rng
from ghibli.sampling import make_scheduler
from ghibli.schema import Config
from ghibli.validation import Gain, paired_gain, require_finite


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
        self.unet, self.text_encoder = base.unet, base.text_encoder
        self.register_buffer("alphas_cumprod", training_schedule(config, base), persistent=False)
        self.register_buffer("empty_ids", base.tokenize([""]), persistent=False)
        if config.finetune == "lora":
            options = vars(config.lora)
            lora.attach(base, seed=config.seed, **options)
        elif config.finetune == "full":
            lora.unfreeze_unet(base)
        self.trainable = lora.trainable(base)
        self.base_losses: torch.Tensor | None = None  # (P, K) of the untouched base at guidance 1
        self.gain: Gain | None = None  # of the last validation
        self._val_losses: list[torch.Tensor] = []

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def losses(self, batch: dict[str, Any], guidance_scale: float) -> torch.Tensor:
        """The denoising loss of each example, (B,) float32, at this guidance."""
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy_latents = add_noise(latents, noise, timesteps, self.alphas_cumprod)
        prompt_embeds, negative_prompt_embeds = self.embed(batch["input_ids"], guidance_scale)
        noise_pred = predict_noise(
            lambda *inputs: self.unet(*inputs, return_dict=False)[0],
            noisy_latents, timesteps, prompt_embeds, negative_prompt_embeds, guidance_scale,
        )  # fmt: skip
        if self.base.prediction_type == "epsilon":
            return denoising_losses(noise_pred, noise)
        return denoising_losses(noise_pred, velocity(latents, noise, timesteps, self.alphas_cumprod))

    def embed(
        self, input_ids: torch.Tensor, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds), each (B, L, D); the second only with guidance."""
        if guidance_scale == 1:
            return self.base.encode_prompts(input_ids), None
        embeds = self.base.encode_prompts(torch.cat([self.empty_ids, input_ids]))
        return embeds[1:], embeds[:1].expand(len(input_ids), -1, -1)

    def on_train_start(self) -> None:
        """Switches the adapters' dropout on; nothing in the base itself depends on the mode."""
        self.unet.train()
        self.text_encoder.train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """The mean loss of the batch at the training guidance."""
        seed_global_rng(Stream.DROPOUT, self.config.seed, batch["example"][0])
        losses = self.losses(batch, self.config.loss.guidance)
        gamma = self.config.loss.snr_gamma
        if gamma is not None:
            losses = losses * min_snr_weights(
                batch["timesteps"], self.alphas_cumprod, gamma, self.base.prediction_type
            )
        return losses.mean()

    def on_validation_epoch_start(self) -> None:
        self._val_losses = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._val_losses.append(self.losses(batch, self.config.loss.guidance))

    def on_validation_epoch_end(self) -> None:
        """Logs probe/val_loss and the paired gain over the base with its standard error."""
        losses = self.by_picture(self._val_losses)
        require_finite(losses, self.current_epoch, self.config.optimizer.lr)
        self.gain = paired_gain(losses, self.base_losses)
        self.log("probe/val_loss", losses.mean(), logger=False)
        self.log("probe/val_gain", self.gain.value, logger=False)
        self.log("probe/val_gain_se", self.gain.standard_error, logger=False)

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Scores the still untouched base at guidance 1: the reference of all later gains.

        Lightning calls this before it restores a checkpoint, so a resumed run scores the same.
        """
        self.to(self.trainer.strategy.root_device)
        self.eval()
        batches = (
            self.transfer_batch_to_device(b, self.device, 0) for b in self.trainer.datamodule.val_dataloader()
        )
        with self.trainer.precision_plugin.forward_context():
            self.base_losses = self.by_picture([self.losses(batch, 1) for batch in batches])

    def by_picture(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The probe's chunks of losses as (P, K) on the CPU, the filling of the last chunk cut off."""
        items = self.config.validation.items_per_picture
        pictures = len(self.trainer.datamodule.val_pictures)
        return torch.cat(losses).cpu()[: pictures * items].view(pictures, items)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the trainable weights; the learning rate is a pure function of the step."""
        options = self.config.optimizer
        optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=options.lr, betas=tuple(options.betas),
            weight_decay=options.weight_decay,
        )  # fmt: skip
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
        """Keeps the trainable weights only."""
        checkpoint["state_dict"] = {name: value.detach() for name, value in self.trainable.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other trainable weights: loading it would change nothing."""
        stored, wanted = set(checkpoint["state_dict"]), set(self.trainable)
        if stored != wanted:
            different = sorted(stored ^ wanted)
            raise UserMistake(
                f"the checkpoint does not fit this run: {len(different)} weights differ, "
                f"the first is {different[0]}"
            )


def training_schedule(config: Config, base: BaseModel) -> torch.Tensor:
    """alphas_cumprod (T,) of training: the base's own, or the slides' linear betas on purpose."""
    own = make_scheduler("ddpm", base).alphas_cumprod
    if config.loss.noise_schedule == "base":
        return own
    return torch.cumprod(1 - linear_betas(len(own)), dim=0)


def lr_factor(step: int, *, schedule: str, warmup_steps: int, steps_per_epoch: int, epochs: int) -> float:
    """The share of the peak learning rate at an optimiser step, 0 .. 1.

    cosine_epochs is CosineAnnealingLR(T_max=epochs) stepped once an epoch, as in the slides.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (
        step // steps_per_epoch / epochs if schedule == "cosine_epochs" else step / (steps_per_epoch * epochs)
    )
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
