"""What a start has compiled before anything runs: it goes through all that graphs, pictures and choices launch, while
launches are only noted (see `huoyan.kernels.launching`)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from huoyan.engine.plain_tokens import PlainTokens

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.engine.decode_graph import DecodeGraphs
    from huoyan.engine.device_beams import DeviceBeams
    from huoyan.engine.picture_encoder import PictureEncoder
    from huoyan.engine.step_graph import StepGraphs
    from huoyan.kernels.compile_helper import CompileHelper

log = logging.getLogger(__name__)

BEAMS = 3
"""Of the search that is rehearsed: the published default."""


@torch.inference_mode()
def compile_ahead(
    device: torch.device,
    graphs: DecodeGraphs,
    step_graphs: StepGraphs,
    encoder: PictureEncoder,
    beams: DeviceBeams | None,
    helper: CompileHelper | None = None,
) -> None:
    """Compile what these will launch, side by side. What is missed, or fails, is compiled when it is launched."""
    from huoyan.kernels.launching import noted_launches

    try:
        with noted_launches() as noted:
            # What takes longest to compile comes first.
            encoder.rehearse()
            if beams is not None:
                beams.rehearse(BEAMS)
            for logits in graphs.rehearse():
                _choose(logits)
            step_graphs.rehearse()
        noted.compile(device, helper)
    except Exception as error:
        log.info("kernels are compiled when they are launched: %s", str(error).splitlines()[:1])


def _choose(logits: Tensor) -> None:
    """The likeliest tokens, drawn ones, and those drawn of some."""
    from huoyan.kernels.choose_rows import Draws
    from huoyan.kernels.sampling_floors import sampling_floors

    rows = len(logits)
    numbers = torch.ones(rows, device=logits.device)
    floors = sampling_floors(logits, numbers, numbers.int(), numbers, numbers)
    keys = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    for draws in (None, Draws(numbers, keys), Draws(numbers, keys, floors)):
        PlainTokens(logits, draws)
