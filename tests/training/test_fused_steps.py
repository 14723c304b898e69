"""The trainer's Triton kernels against what they stand for, forwards and backwards, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_SCRIPT = """
import torch
from huoyan.layers.fused import silu_mul as plain_silu_mul
from huoyan.layers.rope import RotaryTable, apply_rope
from tiny_trainer.fused_steps import silu_mul, split_rotated

torch.manual_seed({seed})
for heads, kv_heads, head_dim in ((4, 2, 64), (2, 1, 16)):
    rows = 5
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, requires_grad=True)
    cos, sin = RotaryTable(head_dim, 1e6, 1000).lookup(torch.randint(0, 1000, (rows,)))
    by_head = qkv.unflatten(-1, (-1, head_dim))
    rotated = apply_rope(by_head[:, : heads + kv_heads], cos, sin)
    expected = (*rotated.split((heads, kv_heads), dim=1), by_head[:, heads + kv_heads :])
    found = split_rotated(qkv, cos, sin, heads, kv_heads)
    weights = [torch.randn_like(e) for e in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    wanted, given = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), qkv)[0] for out in (expected, found)
    )
    torch.testing.assert_close(given, wanted)
for width in (48, 768):
    gate_up = (3 * torch.randn(4, 2 * width)).requires_grad_()
    weight = torch.randn(4, width)
    torch.testing.assert_close(silu_mul(gate_up), plain_silu_mul(gate_up))
    wanted, given = (
        torch.autograd.grad((f(gate_up) * weight).sum(), gate_up)[0] for f in (plain_silu_mul, silu_mul)
    )
    torch.testing.assert_close(given, wanted)
print("equal")
"""


_CHECK = """
import torch
from tiny_trainer import fused_steps

sizes = (4, 2, 64, 768, torch.device("cpu"))
for dtype in (torch.float32, torch.bfloat16):
    fused_steps.check(*sizes, dtype, rows=9)
silu_mul, split = fused_steps.silu_mul, fused_steps.split_rotated
wrong = (
    ("silu_mul", lambda x: silu_mul(x).detach() + 0.9 * (silu_mul(x) - silu_mul(x).detach())),
    ("split_rotated", lambda qkv, cos, sin, *heads: split(qkv, cos, -sin, *heads)),
)
for name, mistaken in wrong:
    right = getattr(fused_steps, name)
    setattr(fused_steps, name, mistaken)
    try:
        fused_steps.check(*sizes, torch.bfloat16, rows=9)
    except AssertionError:
        setattr(fused_steps, name, right)
    else:
        raise SystemExit(name + " is wrong and nobody minds")
print("equal")
"""


_DECODER = """
import torch
from pathlib import Path
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.weights import load_model
from tiny_trainer.fixed import FixedBatch, QUERIES, Shape
from tiny_trainer.losses import PLAIN, Way, hidden_states

torch.manual_seed({seed})
model = load_model(open_checkpoint(Path("{checkpoint}")), device="cpu", dtype=torch.float32).requires_grad_(True)
shape = Shape(patches=64, slices=1, rows=((2, 8), (1, 16)))
batch = FixedBatch.of(torch.zeros(shape.numbers, dtype=torch.int32), shape)
batch.ids.random_(0, 1000)
batch.positions.copy_(torch.arange(shape.tokens) % 8)
batch.slots.fill_(shape.tokens)
batch.slots[:2] = torch.tensor([1, 17], dtype=torch.int32)
embeddings = torch.randn(QUERIES, model.config.text.hidden_size)
weights = torch.randn(shape.tokens, model.config.text.hidden_size)
parameters = list(model.llm.model.layers.parameters())
# Trained weights answer words at random so sharply that two roundings of float32 part.
with torch.no_grad():
    for p in parameters:
        p.normal_(0, 0.05) if p.dim() > 1 else p.uniform_(0.5, 1.5)
results = []
for way in (PLAIN, Way(fused=True)):
    hidden = hidden_states(model, batch, shape, embeddings, way)
    results.append((hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), parameters)))
for plain, fused in zip(*results, strict=True):
    torch.testing.assert_close(fused, plain, atol=2e-4 * float(plain.abs().max()), rtol=1e-3)
print("equal")
"""


def test_kernels_compute_what_they_stand_for(seed: int) -> None:
    _run(_SCRIPT.format(seed=seed))


def test_a_mistake_in_a_kernel_is_found_and_rounding_is_not_one() -> None:
    _run(_CHECK)


def test_the_decoder_uses_them_and_learns_the_same(seed: int) -> None:
    checkpoint = Path(__file__).parents[2] / "src" / "huoyan" / "tiny" / "checkpoint"
    _run(_DECODER.format(seed=seed, checkpoint=checkpoint))


def _run(script: str) -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(root / name) for name in ("src", "training"))
    # The interpreter is chosen when Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
