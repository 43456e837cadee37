"""GhibliModule: wires base, adapter, loss and probe for Lightning; the formulas are in ghibli.diffusion."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from ghibli.adapters import lora
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.start import check_same_shape, start_from
from ghibli.config.schema import Config
from ghibli.diffusion.losses import check_weighting, loss_function, loss_weights, mse, term_functions
from ghibli.diffusion.process import add_noise, guided_noise, linear_betas, predict_branches, velocity
from ghibli.diffusion.samplers import make_scheduler
from ghibli.diffusion.timesteps import timestep_function
from ghibli.models.base import BaseModel, results_key, weights_hash
from ghibli.models.performance import PromptEmbeds, arrange, compiled, is_frozen, prompts_fit, shrink_frozen
from ghibli.models.quantize import quantize_frozen
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.seeding import Stream, seed_global_rng
from ghibli.training.optimizers import check_optimizer, lr_factor, make_optimizer, use_average
from ghibli.training.price import price_items
from ghibli.training.probe import PairedProbe

LossListener = Callable[[dict[str, Any], torch.Tensor, torch.Tensor], None]
"""(batch, denoising losses (B,), the loss () that they and all terms make) of a forward pass."""


class GhibliModule(L.LightningModule):
    """SD 1.5 with an adapter (or an unfrozen UNet) and the guidance-1 or guidance-w loss.

    Args:
        config: the run's configuration.
        base: the loaded base; its UNet and text encoder are trained in place.
        base_hash: weights_hash of the base; None = compute it.
    """

    strict_loading = False  # checkpoints hold trainable weights only; checked in on_load_checkpoint

    def __init__(self, config: Config, base: BaseModel, base_hash: str | None = None):
        super().__init__()
        self.config, self.base = config, base
        self.base_hash = weights_hash(base) if base_hash is None else base_hash
        self.results_key = results_key(self.base_hash, base)
        self.unet, self.text_encoder = base.unet, base.text_encoder
        own = make_scheduler("ddpm", base).alphas_cumprod
        self.register_buffer("base_alphas_cumprod", own, persistent=False)
        self.register_buffer(
            "alphas_cumprod", training_schedule(config.loss.noise_schedule, own), persistent=False
        )
        check_weighting(config.loss, self.alphas_cumprod, base.prediction_type)
        timestep_function(config.loss, self.num_train_timesteps)  # refuses a range that the base has not
        self.register_buffer("empty_ids", base.tokenize([""]), persistent=False)
        self.start: Adapter | None = None  # lora.init
        if config.finetune == "lora" and config.lora.init is not None:
            self.start = read_adapter(config.lora.init, base, "lora.init")
            check_same_shape(self.start, config.lora, base)
        if config.model.frozen_bits is not None:
            quantize_frozen(base, config.model.frozen_bits)
        if config.finetune == "lora":
            lora.add_lora(base, config.lora, config.seed)
        elif config.finetune == "full":
            lora.unfreeze_unet(base)
        self.trainable = lora.trainable(base)
        check_optimizer(config.optimizer, self.trainable)
        arrange(base, config.compute)
        self._predict_compiled = compiled(self.predict, config.compute)
        self.known_prompts: PromptEmbeds | None = None  # when the text encoder is not trained
        self.probe = PairedProbe(config, self.results_key)
        self.loss_listeners: list[LossListener] = []

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def predict(self, noisy_latents: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the UNet's output (B, C, H, W) for timesteps (B,) and prompt_embeds (B, L, D)."""
        return self.unet(noisy_latents, *inputs, return_dict=False)[0]

    def branches(
        self, batch: dict[str, Any], guidance_scale: float, alphas_cumprod: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return (uncond or None at guidance 1, cond, target), each (B, C, H, W)."""
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
        prompt_embeds, negative_prompt_embeds = self.embed(batch["input_ids"], guidance_scale)
        uncond, cond = predict_branches(
            self._predict_compiled if self.training and torch.is_grad_enabled() else self.predict,
            noisy_latents, timesteps, prompt_embeds, negative_prompt_embeds,
        )  # fmt: skip
        if self.base.prediction_type == "epsilon":
            return uncond, cond, noise
        return uncond, cond, velocity(latents, noise, timesteps, alphas_cumprod)

    def prediction(
        self, batch: dict[str, Any], wanted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is trained and its target, each (B, C, H, W): the guided loss, or a guided target.

        The guided target, uncond + s (noise - uncond) without a gradient, is ai-toolkit's do_guidance_loss.

        Args:
            wanted: what is learned in place of the noise, or of v, (B, C, H, W); None = these.
        """
        loss = self.config.loss
        if loss.share_dropout or loss.unconditional == "base":
            uncond, cond, target = self.branches_apart(batch)
        else:
            uncond, cond, target = self.branches(batch, loss.own_guidance, self.alphas_cumprod)
        target = target if wanted is None else wanted
        if uncond is None:
            return cond, target
        if loss.guidance_target is not None:
            return cond, guided_noise(uncond.detach(), target, loss.guidance_target)
        if loss.unconditional != "trained":
            uncond = uncond.detach()
        return guided_noise(uncond, cond, loss.guidance), target

    def branches_apart(self, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return branches() of training from two calls: the same dropout in both, or uncond of the base."""
        loss, input_ids = self.config.loss, batch["input_ids"]
        uncond = None
        if loss.own_guidance != 1:
            empty = batch | {"input_ids": self.empty_ids.expand(len(input_ids), -1)}
            devices = [self.device] if torch.cuda.is_available() and self.device.type == "cuda" else []
            with torch.random.fork_rng(devices, enabled=loss.share_dropout):
                if loss.unconditional == "base":
                    with torch.no_grad(), lora.without_adapters(self.base):
                        uncond = self.branches(empty, 1, self.alphas_cumprod)[1]
                else:
                    uncond = self.branches(empty, 1, self.alphas_cumprod)[1]
        _, cond, target = self.branches(batch, 1, self.alphas_cumprod)
        return uncond, cond, target

    @torch.no_grad()
    def base_prediction(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return what the frozen base predicts at guidance 1 on the batch's other captions, (B, C, H, W).

        It is this very network without its adapter, so it takes no memory of its own.
        """
        with lora.without_adapters(self.base):
            return self.branches(on_other_captions(batch), 1, self.alphas_cumprod)[1]

    def losses(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the training loss of each example before any weighting, (B,) float32."""
        return loss_function(self.config.loss)(*self.prediction(batch))

    def scores(self, batch: dict[str, Any], guidance: float, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Return the MSE of a probe batch, (2, K): at this guidance, and of the conditional branch alone.

        The probe is a measure: it stays the MSE whatever loss.function trains.
        """
        uncond, cond, target = self.branches(batch, guidance, alphas_cumprod)
        alone = mse(cond, target)
        if uncond is None:
            return torch.stack([alone, alone])
        return torch.stack([mse(guided_noise(uncond, cond, guidance), target), alone])

    def embed(
        self, input_ids: torch.Tensor, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (prompt_embeds, negative_prompt_embeds), each (B, L, D); the second None at guidance 1."""
        encode = self.known_prompts or self.base.encode_prompts
        if guidance_scale == 1:
            return encode(input_ids), None
        embeds = encode(torch.cat([self.empty_ids, input_ids]))
        return embeds[1:], embeds[:1].expand(len(input_ids), -1, -1)

    def on_train_start(self) -> None:
        """Load lora.init, now that the base is scored and sampled, and switch on the adapters' dropout.

        Nothing in the base itself depends on the mode.
        """
        if self.start is not None and self.trainer.global_step == 0:
            start_from(self.start, self.trainable, self.config.lora)
        self.unet.train()
        self.text_encoder.train()
        if self.known_prompts is not None:
            self.text_encoder.cpu()  # frees memory for training; sampling fetches it

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Return the batch's mean loss, what the base is expected to score there, and each term."""
        kept = self.base_prediction(batch) if self.config.loss.keep > 0 else None
        seed_global_rng(Stream.DROPOUT, self.config.seed, batch["example"][0])
        prediction, target = self.prediction(batch)
        losses = loss_function(self.config.loss)(prediction, target)
        loss, terms = self.weighted(losses, batch["timesteps"]).mean(), {}
        for name, function in term_functions(self.config.loss).items():
            terms[name] = function(prediction, target).mean()
            loss = loss + self.config.loss.terms[name] * terms[name]
        if kept is not None:
            terms["keep"] = mse(*self.prediction(on_other_captions(batch), kept)).mean()
            loss = loss + self.config.loss.keep * terms["keep"]
        if "regularization_latents" in batch:
            besides = loss_function(self.config.loss)(*self.prediction(of_regularization(batch)))
            terms["regularization"] = self.weighted(besides, batch["timesteps"]).mean()
            loss = loss + self.config.loss.regularization * terms["regularization"]
        for listen in self.loss_listeners:
            listen(batch, losses.detach(), loss.detach())
        expected = self.probe.expected[batch["timesteps"]].mean()
        plain = mse(prediction.detach(), target).mean()  # as `expected`, whatever loss.function trains
        if self.config.loss.guidance_target is not None:  # the error of the noise is 1 / s of the target's
            plain = plain / self.config.loss.guidance_target**2
        return {"loss": loss, "plain": plain, "expected": expected, **prefixed(terms)}

    def weighted(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the losses of examples (B,) times the weights of their timesteps under loss.weighting."""
        options = self.config.loss
        if options.weighting_name is None:
            return losses
        return losses * loss_weights(options, timesteps, self.alphas_cumprod, self.base.prediction_type)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        use_average(self.optimizers(use_pl_optimizer=False), wanted=False)

    def on_validation_epoch_start(self) -> None:
        """Validate the averaged weights of a schedule-free optimiser, and keep them until the next batch."""
        if self.trainer.state.fn == "fit":
            use_average(self.optimizers(use_pl_optimizer=False), wanted=True)
        self.probe.begin_epoch()

    def validation_step(self, batch: tuple[list[int], dict[str, Any]], batch_idx: int) -> None:
        places, items = batch
        scores = self.scores(items, self.config.loss.own_guidance, self.base_alphas_cumprod)
        self.probe.add(scores, places)

    def on_validation_epoch_end(self) -> None:
        """Log what stops early and chooses the best epoch."""
        for name, value in self.probe.end_epoch(self).items():
            self.log(name, value, logger=False)

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Score the still untouched base. Lightning calls this before it restores a checkpoint, so a
        resumed run scores the same.
        """
        shrink_frozen(self.base, str(self.trainer.precision))
        self.to(self.trainer.strategy.root_device)
        self.eval()
        with lora.without_adapters(self.base):  # a new one would add exactly 0, and take time
            self.add_price_items()
        self.remember_prompts()
        with lora.without_adapters(self.base):
            self.probe.score_untouched(self, stage)

    def add_price_items(self) -> None:
        """Give the probe its items of what the base was made for; a base that trains nothing has no price."""
        count, data = self.config.validation.price_images, self.trainer.datamodule
        if count > 0 and self.config.finetune != "none":
            images, batches = price_items(self, count)
            data.price_images, data.price_batches = images, batches

    def remember_prompts(self) -> None:
        """Encode all captions once, if the text encoder is not trained."""
        data = self.trainer.datamodule
        input_ids = torch.cat([data.all_input_ids, *(batch["input_ids"] for batch in data.price_batches)])
        if is_frozen(self.text_encoder) and prompts_fit(self.base, input_ids):
            with (
                counted("encoding the captions") as on_progress,
                self.trainer.precision_plugin.forward_context(),
            ):
                self.known_prompts = PromptEmbeds(self.base, input_ids.to(self.device), on_progress)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return optimiser and schedule; the learning rate is a pure function of the step."""
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
        """Store the trainable weights only, and the probe's history."""
        checkpoint["state_dict"] = {name: value.detach() for name, value in self.trainable.items()}
        checkpoint["probe"] = self.probe.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the probe's history.

        Raises:
            UserError: the checkpoint has other trainable weights, so loading it would change nothing.
        """
        stored, wanted = set(checkpoint["state_dict"]), set(self.trainable)
        if stored != wanted:
            different = sorted(stored ^ wanted)
            raise UserError(
                f"the checkpoint does not fit this run: {len(different)} weights differ, "
                f"the first is {different[0]}"
            )
        self.probe.restore(checkpoint["probe"])


def on_other_captions(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a training batch with the captions on which loss.keep holds it to the base."""
    return batch | {"input_ids": batch["keep_ids"]}


def of_regularization(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the images of data.regularization in a training batch, as a batch at the same timesteps."""
    names = {"latents": "latents", "noise": "noise", "input_ids": "ids"}
    return batch | {name: batch[f"regularization_{key}"] for name, key in names.items()}


def prefixed(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the values of loss terms under the names of their columns, detached."""
    return {f"train/{name}": value.detach() for name, value in terms.items()}


def training_schedule(noise_schedule: str, own: torch.Tensor) -> torch.Tensor:
    """Return alphas_cumprod (T,) of training: the base's own, or the reference study's linear betas."""
    if noise_schedule == "base":
        return own
    return torch.cumprod(1 - linear_betas(len(own)), dim=0)
