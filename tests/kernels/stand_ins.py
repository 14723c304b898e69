"""Run by test_launching.py in a process of its own, where Triton compiles: what stands for a launch's arguments must be
compiled like these. Prints how many launches were looked at."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from huoyan.kernels import launching
from huoyan.kernels.add_layer_norm import add_layer_norm
from huoyan.kernels.add_rms_norm import add_rms_norm
from huoyan.kernels.choose_rows import Draws, choose_rows
from huoyan.kernels.dense_matmul import dense_matmul
from huoyan.kernels.int4_matmul import int4_matmul
from huoyan.kernels.int4_unpack import dequantize
from huoyan.kernels.int4_words import pack_meta, pack_words
from huoyan.kernels.paged_decode import paged_decode
from huoyan.kernels.picture_patches import Cut, ResizeTables, picture_patches
from huoyan.kernels.silu_mul import silu_mul
from huoyan.kernels.slice_attention import slice_attention
from huoyan.kernels.wide_matmul import wide_matmul


class Beside(launching.NotedLaunches):
    """Keeps the real arguments too."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().note(kernel, arguments, options)
        self.all.append((kernel, arguments, options))


def work(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for rows in (1, 3, 16, 17, 32, 200):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(rows, 256, generator=g).to(dtype)
            q = torch.randint(0, 16, (128, 256), generator=g, dtype=torch.uint8)
            words, meta = pack_words(q), pack_meta(torch.ones(128, 2), torch.ones(128, 2), dtype)
            bias = torch.randn(129, generator=g).to(dtype)[1:]
            int4_matmul(x, words, meta, bias)
            int4_matmul(x, words, meta, parts=True)
            int4_matmul(x, words, meta, gated=True)
            dequantize(words, meta, 0, 128, torch.empty(128, 256, dtype=dtype))
            if rows <= 16:
                dense_matmul(x, torch.randn(128, 256).to(dtype), parts=True)
            elif rows <= 128:
                wide_matmul(x, torch.randn(320, 256).to(dtype), gated=True)
            add_rms_norm(x, x.clone(), torch.ones(256, dtype=dtype), 1e-6)
            silu_mul(torch.randn(2, rows, 512))
            cache = torch.randn(5, 16, 2, 64).to(dtype)
            tables = torch.zeros(rows, 3, dtype=torch.int32)
            paged_decode(
                torch.randn(rows, 4, 64).to(dtype), cache, cache, tables, torch.ones(rows, dtype=torch.int32)
            )
            ones, starts = torch.ones(256, dtype=dtype), torch.tensor([0, rows], dtype=torch.int32)
            add_layer_norm(x, x.clone(), ones, ones, 1e-6, ones)
            slice_attention(*torch.randn(3, rows, 2, 72).to(dtype).unbind(0), starts, rows)
            keys = torch.zeros(rows, dtype=torch.int64)
            for place in range(2):
                # Results that begin anywhere.
                choose_rows(x, to_host=torch.empty(3 * rows + 2, dtype=torch.int32)[2 * place :][: 3 * rows])
                choose_rows(x, Draws(torch.ones(rows + 1)[place:][:rows], keys))
            for height, width in ((40, 61), (61, 40), (28, 48)):
                picture_patches(
                    torch.zeros(1, height, width, 3, dtype=torch.uint8),
                    Cut((28, 28)),
                    14,
                    torch.zeros(3, 256, dtype=dtype),
                    torch.zeros(1, dtype=torch.int32),
                    torch.empty(4, 588, dtype=dtype),
                    ResizeTables(torch.device("cpu")),
                )


def main() -> None:
    noted = Beside()
    launching._noting.now = noted
    work(0)
    launching._noting.now = None
    backend = make_backend(GPUTarget("cuda", 90, 32))
    different = set()
    for kernel, arguments, options in noted.all:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        stand_ins = noted._stand_ins(kernel, arguments)[0]
        own = {name: value for name, value in options.items() if name in kernel.signature.parameters}
        assert binder(*arguments, **own)[1] == binder(*stand_ins, **own)[1], kernel
        different.add((kernel, str(binder(*stand_ins, **own)[1]), str(sorted(options.items()))))
    assert len(different) == len(noted) < len(noted.all), "what is compiled alike is noted once"
    print(len(noted.all))


if __name__ == "__main__":
    main()
