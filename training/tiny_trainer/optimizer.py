"""Muon for the matrices between layers, AdamW for the rest, on float32 masters of whatever the model runs in.

What changes from step to step is read from a tensor (`Optimizer.rates`), so that a CUDA graph may hold a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from huoyan.quantize.rounding import fake_quantize

_ADAM_NAMES = ("embed_tokens", "lm_head", "position_embedding", "query", "heads.")


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values near 1. g [N, rows, columns].

    Newton-Schulz with the quintic of Jordan et al. (Muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16) if g.is_cuda else g
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


RATES = ("matrix", "adam", "second", "average", "rounded")
"""Of `Optimizer.rates`: Muon's rate, Adam's with its correction, the correction of Adam's second moment (to
multiply its root by), how far the average moves, 1 where the next step sees the decoder in four bits."""

_IN_FOUR_BITS = "llm.model.layers."
_GROUP_SIZE = 64
"""As `make_tiny_int4` has it."""


class Optimizer:
    """Steps float32 masters and an average of them, and copies the masters into the model.

    A parameter that stacks several of the checkpoint's matrices is orthogonalised piece by piece.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter, tuple[int, ...]]],
        *,
        matrix_lr: float,
        adam_lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        average_decay: float = 0.998,
        clip: float = 1.0,
        four_bits: bool = False,
    ) -> None:
        self.parameters = [p for _, p, _ in named]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.averages = [m.clone() for m in self.masters]
        self.average_decay = average_decay
        self.matrix_lr, self.adam_lr, self.weight_decay = matrix_lr, adam_lr, weight_decay
        self.momentum, self.betas, self.clip = momentum, betas, clip
        self.by_shape: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        self.adam: list[int] = []
        self.matrix: list[int] = []
        for i, (name, p, splits) in enumerate(named):
            if p.dim() == 2 and not any(part in name for part in _ADAM_NAMES):
                start = 0
                for rows in splits or (p.shape[0],):
                    self.by_shape[rows, p.shape[1]].append((i, start, start + rows))
                    start += rows
                self.matrix.append(i)
            else:
                self.adam.append(i)
        # Gradients of the rounded weights move the exact ones, whose average is what is kept.
        self.rounded = [i for i in self.matrix if four_bits and named[i][0].startswith(_IN_FOUR_BITS)]
        self.buffers = {i: torch.zeros_like(self.masters[i]) for i in self.matrix}
        self.first = [torch.zeros_like(self.masters[i]) for i in self.adam]
        self.second = [torch.zeros_like(self.masters[i]) for i in self.adam]

    def rates(self, step: int, scale: float, rounded: float = 0.0) -> list[float]:
        """RATES of step number `step` (from 1) at `scale` times the learning rates; 0 changes nothing."""
        beta1, beta2 = self.betas
        return [
            self.matrix_lr * scale,
            self.adam_lr * scale / (1 - beta1**step),
            (1 - beta2**step) ** -0.5,
            # A short memory at first: the first averages would otherwise be of what training started from.
            1 - min(self.average_decay, step / (step + 9)),
            rounded,
        ]

    @torch.no_grad()
    def step(self, rates: Tensor) -> Tensor:
        """One update by `rates`, float32 [len(RATES)]. Returns the gradient's norm, unclipped."""
        matrix, adam, second, average, rounded = rates.unbind()
        grads = [
            torch.zeros_like(m) if p.grad is None else p.grad.float()
            for p, m in zip(self.parameters, self.masters, strict=True)
        ]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        # A step whose gradient is not finite counts as a gradient of zero instead of ending the run.
        factor = torch.nan_to_num((self.clip / (norm + 1e-6)).clamp(max=1.0), nan=0.0)
        grads = [g.nan_to_num_(0.0, 0.0, 0.0) for g in torch._foreach_mul(grads, factor)]
        self._adam_step([grads[i] for i in self.adam], adam, second)
        self._matrix_step(grads, matrix)
        ahead = torch._foreach_sub(self.masters, self.averages)
        torch._foreach_mul_(ahead, average)
        torch._foreach_add_(self.averages, ahead)
        self.show_masters()
        for i in self.rounded:
            exact = self.masters[i]
            self.parameters[i].data.copy_(torch.lerp(exact, fake_quantize(exact, _GROUP_SIZE), rounded))
        return norm

    def _adam_step(self, grads: list[Tensor], rate: Tensor, correction: Tensor) -> None:
        beta1, beta2 = self.betas
        torch._foreach_lerp_(self.first, grads, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(self.second)
        torch._foreach_mul_(denominator, correction)
        torch._foreach_add_(denominator, 1e-8)
        change = torch._foreach_div(self.first, denominator)
        torch._foreach_mul_(change, rate)
        torch._foreach_sub_([self.masters[i] for i in self.adam], change)

    def _matrix_step(self, grads: list[Tensor], rate: Tensor) -> None:
        buffers = [self.buffers[i] for i in self.matrix]
        of_matrix = [grads[i] for i in self.matrix]
        torch._foreach_lerp_(buffers, of_matrix, 1 - self.momentum)
        ahead = dict(zip(self.matrix, torch._foreach_lerp(of_matrix, buffers, self.momentum), strict=True))
        torch._foreach_mul_([self.masters[i] for i in self.matrix], 1 - rate * self.weight_decay)
        for (rows, columns), pieces in self.by_shape.items():
            # Entries of about 0.2, the size of Adam's steps, whatever the shape.
            strength = rate * (0.2 * max(rows, columns) ** 0.5)
            update = orthogonalise(torch.stack([ahead[i][a:b] for i, a, b in pieces])) * strength
            torch._foreach_sub_([self.masters[i][a:b] for i, a, b in pieces], list(update.unbind()))

    @torch.no_grad()
    def forget(self) -> None:
        """Start over with moments of zero and an average of the present weights."""
        for tensors in (self.buffers.values(), self.first, self.second):
            for t in tensors:
                t.zero_()
        torch._foreach_copy_(self.averages, self.masters)

    @torch.no_grad()
    def show_masters(self) -> None:
        """Put the current weights into the model."""
        torch._foreach_copy_([p.data for p in self.parameters], self.masters)

    @torch.no_grad()
    def show_averages(self) -> None:
        """Put the averaged weights into the model (undo with `show_masters`)."""
        torch._foreach_copy_([p.data for p in self.parameters], self.averages)
