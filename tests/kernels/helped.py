"""Run by test_compile_helper.py in a process of its own, where Triton compiles: has a helper compile, and then looks
whether all is found. Prints how many launches were noted, how many kernels were found, and how many were not."""

from __future__ import annotations

import torch
import triton
from stand_ins import work
from triton.backends.compiler import GPUTarget

from huoyan.kernels import launching
from huoyan.kernels.compile_helper import CompileHelper
from huoyan.kernels.compile_worker import _Driver
from huoyan.kernels.jobs import compiled


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(_Driver(target))
    with launching.noted_launches() as noted:
        work(0)
    found: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)

    # Found, but there is nothing to load it.
    launching._compile = compiled
    helper = CompileHelper()
    noted.compile(torch.device("cpu"), helper)
    helper.close()
    print(len(noted), sum(found), len(found) - sum(found))


if __name__ == "__main__":
    main()
