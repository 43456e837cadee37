"""Muon: momentum with orthogonalised updates of weight matrices (Jordan et al. 2024).

These small networks need several times fewer steps with it than with AdamW.
"""

import torch


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """Approximate the nearest orthogonal matrix of an update (rows, columns) by five Newton-Schulz steps.

    A step multiplies from the left by a polynomial of the small Gram matrix; only the Gram matrix is
    iterated, so the long side is touched just twice.
    """
    tall = update.shape[0] > update.shape[1]
    matrix = update.T if tall else update
    matrix = matrix / (matrix.norm() + 1e-7)
    gram = matrix @ matrix.T
    unit = torch.eye(len(gram))
    factor = unit
    for _ in range(5):
        step = 3.4445 * unit - 4.775 * gram + 2.0315 * gram @ gram
        factor, gram = step @ factor, step @ gram @ step
    matrix = factor @ matrix
    return matrix.T if tall else matrix


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, Adam for vectors and for the weights in `plain`.

    A Muon update has a root mean square of 0.2 * lr, about that of AdamW.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, plain=()):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})
        self.plain = {id(weight) for weight in plain}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                use_adam = weight.ndim < 2 or id(weight) in self.plain
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                    state["step"] = torch.zeros(())
                    if use_adam:
                        state["square"] = torch.zeros_like(weight)
                state["step"] += 1
                (self.adam if use_adam else self.muon)(weight, state, group)

    @staticmethod
    def muon(weight, state, group):
        state["mean"].lerp_(weight.grad, 1 - group["momentum"])
        update = weight.grad.lerp(state["mean"], group["momentum"]).flatten(1)
        size = 0.2 * max(update.shape) ** 0.5
        weight.add_(orthogonalise(update).reshape(weight.shape), alpha=-group["lr"] * size)

    @staticmethod
    def adam(weight, state, group):
        state["mean"].lerp_(weight.grad, 0.1)
        state["square"].lerp_(weight.grad.square(), 0.01)
        count = state["step"].item()
        mean = state["mean"] / (1 - 0.9**count)
        square = state["square"] / (1 - 0.99**count)
        weight.addcdiv_(mean, square.sqrt() + 1e-8, value=-group["lr"])
