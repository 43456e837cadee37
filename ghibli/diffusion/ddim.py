"""diffusers' DDIM scheduler with the stride between two timesteps read from the timesteps."""

from fractions import Fraction
from typing import Any

import torch
from diffusers import DDIMScheduler


class ExactDDIMScheduler(DDIMScheduler):
    """DDIM (Song et al. 2021, equation 12) whose every step ends at the timestep where the next one starts.

    diffusers' own takes T // num_inference_steps as the length of all steps. Where that division leaves a
    remainder, its steps of `trailing` or `linspace` end at another noise level than the next one starts from.
    """

    num_inference_steps: Any  # int, and within step() a fraction

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        """Return what DDIMScheduler.step does, x at the following timestep; after the last one, at `-1`.

        Args:
            model_output, sample: (B, C, H, W) float.
            timestep: one of `timesteps`.
            options: further arguments of DDIMScheduler.step.
        """
        planned = self.num_inference_steps
        length = int(timestep) - self.following(int(timestep))
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, length)  # T // it = length
        try:
            return super().step(model_output, timestep, sample, **options)
        finally:
            self.num_inference_steps = planned

    def following(self, timestep: int) -> int:
        """Return the timestep after this one; -1 after the last."""
        later = self.timesteps[self.timesteps < timestep]
        return int(later.max()) if len(later) else -1
