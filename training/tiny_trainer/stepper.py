"""One training step after the other, as one CUDA graph where that works."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiny_trainer import slice_attention
from tiny_trainer.fixed import QUERIES, FixedBatch, Shape
from tiny_trainer.losses import PLAIN, Way
from tiny_trainer.optimizer import RATES
from tiny_trainer.pool import Pool
from tiny_trainer.trainer import Trainer

WAYS = (
    Way(packed=True, fused=True, graphed=True),
    Way(packed=True, graphed=True),
    Way(fused=True, graphed=True),
    Way(graphed=True),
    Way(packed=True, fused=True),
    Way(packed=True),
)
"""On CUDA, best first; after them the plain way, which every device has."""
_LOSS_APART = 0.05
_NORM_APART = 1.15
_ALIKE = 0.95
_PARAMETER_ALIKE = 0.4
_SHARE_THAT_COUNTS = 0.01
_STAGES = 4
_AHEAD = 2


class Stepper:
    """Owns a step's inputs on the device, and the host's memory they are sent from.

    `stage()` gives the memory for the next batch, `step` learns from it. The host stays at most two steps ahead of the
    device, so that the clock tells the truth and no memory is written that is still being sent.
    """

    def __init__(self, trainer: Trainer, pool: Pool, shape: Shape, log: Callable[[str], None]) -> None:
        self.trainer, self.pool, self.shape, self.log = trainer, pool, shape, log
        device = trainer.device
        self.cuda = device.type == "cuda"
        self.way = PLAIN
        self.graph: torch.cuda.CUDAGraph | None = None
        self.count = 0
        total = shape.numbers + len(RATES) + 1
        self.stages = [torch.zeros(total, dtype=torch.int32, pin_memory=self.cuda) for _ in range(_STAGES)]
        self.inputs = torch.zeros(total, dtype=torch.int32, device=device)
        self.batch = FixedBatch.of(self.inputs[: shape.numbers], shape)
        self.rates: Tensor = self.inputs[shape.numbers :].view(torch.float32)
        self._running: list[torch.cuda.Event] = []

    def stage(self) -> NDArray[np.int32]:
        """Memory for the next batch, [shape.numbers]."""
        return self.stages[self.count % _STAGES].numpy()[: self.shape.numbers]

    def step(self, *, scale: float, auxiliary: float, rounded: float = 0.0) -> None:
        """Learn from what `stage` was filled with, at `scale` times the learning rates; with `rounded` the next step
        sees the decoder's weights in four bits."""
        self._send(scale, auxiliary, rounded)
        self.count += 1
        if self.graph is not None:
            self.graph.replay()
        else:
            self._learn()
        if self.cuda:
            event = torch.cuda.Event()
            event.record()
            self._running.append(event)
            if len(self._running) > _AHEAD:
                self._running.pop(0).synchronize()

    def _send(self, scale: float, auxiliary: float, rounded: float = 0.0) -> None:
        stage = self.stages[self.count % _STAGES]
        rates = [*self.trainer.optimizer.rates(self.count + 1, scale, rounded), auxiliary]
        stage[self.shape.numbers :].view(torch.float32).numpy()[:] = rates
        self.inputs.copy_(stage, non_blocking=True)

    def _learn(self) -> None:
        self.trainer.learn(self.pool, self.shape, self.batch, self.rates, self.way)

    def prepare(self) -> None:
        """Find the fastest way that works here, on the batch that is staged; nothing is learned by it.

        What fails, or differs from the plain way, is logged and left.
        """
        self.count = 0
        self._send(scale=0.0, auxiliary=1.0)
        with self._random_weights():
            self._find_way()
        self.trainer.read_log()
        milliseconds = min(self._timed() for _ in range(3 if self.cuda else 1))
        self.log(f"a step takes {milliseconds:.1f} ms ({self.way}); losses {self.trainer.read_log()[0]}")
        self.trainer.optimizer.forget()

    @contextmanager
    def _random_weights(self) -> Iterator[None]:
        """Trained attention is so sharp that an answer near a tie sends back a gradient many times the usual, and 16
        bits move answers into ties and out of them: two ways that are both right have shown a cosine of 0.1. Of random
        matrices, 16 bits leave the gradient a cosine of 0.999."""
        optimizer = self.trainer.optimizer
        kept = [m.clone() for m in optimizer.masters]
        generator = torch.Generator(self.trainer.device).manual_seed(0)
        try:
            for m in optimizer.masters:
                if m.dim() > 1:
                    m.normal_(0.0, m.shape[-1] ** -0.5, generator=generator)
            optimizer.show_masters()
            yield
        finally:
            torch._foreach_copy_(optimizer.masters, kept)
            optimizer.show_masters()

    def _find_way(self) -> None:
        expected: dict[str, float] = {}
        gradients: list[Tensor] = []
        try:
            expected = self._run_once()
            gradients = self._gradients()
        except Exception as error:
            if not self.cuda:
                raise
            self.log(
                f"a plain step fails here, nothing is compared: {type(error).__name__}: {str(error)[:300]!r}"
            )
        for way in WAYS if self.cuda else ():
            self.way = way
            try:
                self._check_kernels(way)
                self.graph = self._capture() if way.graphed else None
                self._check(expected, gradients)
            except Exception as error:
                self.log(f"a step ({way}) fails here: {type(error).__name__}: {str(error)[:300]!r}")
                self.way, self.graph = PLAIN, None
                torch.cuda.empty_cache()
            else:
                break

    def _run_once(self) -> dict[str, float]:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._learn()
        return self.trainer.read_log()[0]

    def _timed(self) -> float:
        begin = time.monotonic()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._learn()
        if self.cuda:
            torch.cuda.synchronize()
        return 1000 * (time.monotonic() - begin)

    def _gradients(self) -> list[Tensor]:
        """Of the last step, also of a graph's: it writes them to the same memory each time."""
        return [
            torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float().clone()
            for p in self.trainer.optimizer.parameters
        ]

    def _check_kernels(self, way: Way) -> None:
        trainer = self.trainer
        if way.packed:
            vision, resampler = trainer.model.config.vision, trainer.model.resampler
            heads = vision.num_attention_heads
            within = (heads, vision.hidden_size // heads)
            across = (resampler.attn.heads, resampler.query.shape[1] // resampler.attn.heads)
            slice_attention.check(
                self.batch.starts, self.shape.patches, QUERIES, within, across, trainer.dtype
            )
        if way.fused:
            from tiny_trainer import fused_steps

            text = trainer.model.config.text
            sizes = (
                text.num_attention_heads,
                text.num_key_value_heads,
                text.head_dim,
                text.intermediate_size,
            )
            fused_steps.check(*sizes, trainer.device, trainer.dtype)

    def _check(self, expected: dict[str, float], gradients: Sequence[Tensor]) -> None:
        self.trainer.read_log()
        found = self._run_once()
        if not all(math.isfinite(value) for value in found.values()):
            raise RuntimeError(f"losses that are not numbers: {found}")
        for name, value in expected.items():
            # Rounded to 16 bits in other places; a mistake would be another number altogether.
            if name != "grad_norm" and not abs(found[name] - value) <= _LOSS_APART * abs(value) + 1e-3:
                raise RuntimeError(f"{name} is {found[name]}, not {value}")
        if gradients:
            compare_gradients(self._gradients(), gradients)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Gradients are to be made on the stream of the capture, so the steps before it run there too.
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._learn()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for p in self.trainer.optimizer.parameters:
            p.grad = None
        graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._learn()
        finally:
            # A capture that fails stays on its stream.
            torch.cuda.set_stream(usual)
        return graph


def compare_gradients(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """RuntimeError where two ways to compute a step of random weights disagree by more than rounding does.

    Of 16 bits it leaves, on a CPU, norms equal to a hundredth and a cosine of 0.999, 0.88 over a single parameter.
    A mistake gives zeros, or another direction.
    """
    pairs = list(zip(found, expected, strict=True))
    products = torch.stack([(a * b).sum() for a, b in pairs]).tolist()
    norms = torch.stack([torch.stack((a.norm(), b.norm())) for a, b in pairs]).double()
    ours, theirs = norms.square().sum(0).sqrt().tolist()
    alike = sum(products) / (ours * theirs) if ours * theirs > 0 else float(ours == theirs)
    if not theirs / _NORM_APART <= ours <= _NORM_APART * theirs:
        raise RuntimeError(f"the gradient's norm is {ours}, not {theirs}")
    if not alike >= _ALIKE:
        raise RuntimeError(f"the gradient points elsewhere: a cosine of {alike:.3f}")
    for i, (product, (a, b)) in enumerate(zip(products, norms.tolist(), strict=True)):
        if b > _SHARE_THAT_COUNTS * theirs and not product >= _PARAMETER_ALIKE * a * b > 0:
            raise RuntimeError(f"the gradient of parameter {i} has norm {a}, not {b}, and product {product}")
