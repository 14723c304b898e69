"""Beam searches that advance on the device, so that the next step need not wait for the host.

The device decides (`huoyan.layers.beam_step`), and the host decides again when it reads the candidates: what it
says of a search comes from `BeamSearch` alone, and must be what the device has gone on with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from huoyan.engine.beam_ops import BeamOps
from huoyan.engine.beam_orders import search_orders
from huoyan.engine.beam_probe import probe, steps_on_trial
from huoyan.engine.host_copy import HostCopy
from huoyan.engine.sampler import BeamCandidates, as_candidates
from huoyan.layers.beam_step import FACTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from huoyan.engine.beam import BeamSearch, Survivor
    from huoyan.engine.kv_cache import KVCache
    from huoyan.engine.sequence import Group

log = logging.getLogger(__name__)
WIDEST_ON_TRIAL = 9


@dataclass(frozen=True)
class DecidedBeams:
    """A step of one search."""

    candidates: list[BeamCandidates]
    """For each of its beams; what stands beyond the live ones has no meaning."""
    survivors: list[tuple[int, int, int]]
    """The beams that live on, best first: their parents, their tokens, and whose current blocks they take."""

    def check(self, survivors: list[Survivor], width: int) -> None:
        """Raise RuntimeError where the host comes to others: the device has gone on with the wrong ones.

        `width`: of the search.
        """
        parents = [survivor.parent for survivor in survivors]
        childless = iter([place for place in range(width) if place not in parents])
        own = [
            (parent, survivor.token_id, next(childless) if parent in parents[:i] else parent)
            for i, (parent, survivor) in enumerate(zip(parents, survivors, strict=True))
        ]
        if own != self.survivors:
            raise RuntimeError(
                f"the beams are {own} by the host's sums, but the device went on with {self.survivors}"
            )


@dataclass(frozen=True)
class BeamStep:
    """A step of several searches, as it is on the device."""

    searches: dict[Group, int]
    """Their places in the tensors."""
    found: Tensor
    """See `huoyan.layers.beam_step.room_for_found`."""
    state: Tensor
    """See `huoyan.layers.beam_step.advance`."""
    copy: HostCopy

    def read(self) -> dict[Group, DecidedBeams]:
        """Waits until it is decided."""
        (found,) = self.copy.read()
        count = (found.shape[2] - FACTS) // 2
        facts, ids, bits = found.split((FACTS, count, count), 2)
        values = bits.contiguous().view(torch.float32)
        out = {}
        for group, place in self.searches.items():
            candidates = [
                as_candidates(*row, group.width, group.params.logprobs)
                for row in zip(
                    ids[place, : group.width].tolist(), values[place, : group.width].tolist(), strict=True
                )
            ]
            survivors = [(p, t, b) for p, t, b in facts[place].tolist() if p >= 0]
            out[group] = DecidedBeams(candidates, survivors)
        return out


class DeviceBeams:
    """Advances the searches of one engine."""

    def __init__(self, cache: KVCache, vocab_size: int) -> None:
        self.ops = BeamOps()
        # Not the cache itself, which is to be freed when the engine is closed.
        self._form = cache.of_the_same_form(1, 1)
        self._vocab_size = vocab_size
        self._kernels_fail = False
        self._works: dict[int, bool] = {}
        """By what widths are padded to, which kernels are compiled for."""

    def takes(self, search: BeamSearch) -> bool:
        """Whether a search can advance here: it depends on nothing but its model's logits, neither on text nor on
        what it has said, and the device does what it should, which the first of its width to come finds out."""
        return _needs_logits_alone(search) and self._try_out(search.width)

    def rehearse(self, width: int) -> None:
        """Go through what searches of that width launch (see `huoyan.kernels.launching`)."""
        from huoyan.engine.beam_ops_cuda import KernelBeamOps

        steps_on_trial(KernelBeamOps(), self._form, self._vocab_size, width)

    def _try_out(self, width: int) -> bool:
        # All that are too wide for the kernels that decide go one way.
        width = min(width, WIDEST_ON_TRIAL)
        padded = 1 << (width - 1).bit_length()
        if padded not in self._works:
            works = self._form.device.type == "cpu" or self._try_kernels(width) or self._try_plainly(width)
            self._works[padded] = works
        return self._works[padded]

    def _try_kernels(self, width: int) -> bool:
        if self._kernels_fail:
            return False
        try:
            from huoyan.engine.beam_ops_cuda import KernelBeamOps

            ops = KernelBeamOps()
            probe(ops, self._form, self._vocab_size, width)
        except Exception:
            log.warning(
                "the kernels of beam searches do not work here: torch's take their place", exc_info=True
            )
            self._kernels_fail = True
            self.ops = BeamOps()
            return False
        self.ops = ops
        return True

    def _try_plainly(self, width: int) -> bool:
        try:
            probe(self.ops, self._form, self._vocab_size, width)
        except Exception:
            log.warning("beam searches do not work on this device: the host advances them", exc_info=True)
            return False
        return True

    @torch.inference_mode()
    def advance(self, logits: Tensor, rows: Mapping[Group, list[int]], before: BeamStep | None) -> BeamStep:
        """Take a step that counts as launched.

        Args:
            logits: [R, vocab], float32 or 16 bits
            rows: of each search the rows of its beams.
            before: the step that the host has not seen yet, if there is one.
        """
        orders = search_orders(rows, before.searches if before else {}, logits.device)
        found, state = self.ops.advance(logits, orders, before.state if before else None, 2 * orders.width)
        searches = {group: i for i, group in enumerate(rows)}
        return BeamStep(searches, found, state, HostCopy(found))


def _needs_logits_alone(search: BeamSearch) -> bool:
    params = search.params
    return (
        not params.stop_strings
        and not params.has_penalties
        and not params.logit_bias
        and not params.min_tokens
        and params.structured_outputs is None
        and params.prompt_logprobs is None
        # Those asked for are among the candidates.
        and (params.logprobs or 0) <= 2 * search.width
    )
