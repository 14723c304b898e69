"""When a step is better left to prompts alone, and decodes wait for the next one.

Of a few requests that all run at once the last to begin decides when all are done. Each decode that shares a full step
of prompts makes it longer by what its arithmetic takes, and none of the steps that follow fewer; so the decodes wait.
With more requests than can run at once it is the other way round: what ends early makes room for the next, and a decode
in a full step costs less than one in a step of decodes alone, which reads all weights for it.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from huoyan.engine.sequence import GroupStatus

if TYPE_CHECKING:
    from huoyan.engine.scheduler import Scheduler
    from huoyan.engine.sequence import Group


def prompts_come_first(scheduler: Scheduler) -> bool:
    """Whether prompts fill the next step, and all that would decode in it are single sequences that may wait."""
    waiting, running = scheduler.waiting, scheduler.running
    # What most steps of a long run have, before what takes longer to find out.
    if not waiting or len(running) >= scheduler.max_num_seqs:
        return False
    blocks = scheduler.pool.num_free - scheduler.watermark
    size = scheduler.pool.block_size
    if blocks < _blocks_to_begin(waiting[0], size):
        return False
    unready = []
    for group in running:
        if not group.ready:
            unready.append(group)
        elif group.width > 1 or not group.request.in_bulk:
            return False
    if len(unready) == len(running):
        return False
    left, slices = scheduler.max_num_batched_tokens, scheduler.max_encoder_slices
    seats = scheduler.max_num_seqs - sum(group.seats for group in running)
    for group in chain(unready, waiting):
        if group.finished:
            continue
        if group.status is GroupStatus.WAITING:
            seats -= group.seats
            blocks -= _blocks_to_begin(group, size)
        slices -= sum(use.num_slices for use in group.pictures if use.key not in scheduler.pictures)
        if min(seats, blocks, slices) < 0 or group.resumes_late:
            return False
        left -= sum(seq.length - seq.num_computed for seq in group.sequences)
        if left <= 0:
            return True
    return False


def _blocks_to_begin(group: Group, block_size: int) -> int:
    """Blocks that admitting a group takes at most."""
    return sum(-(-seq.length // block_size) for seq in group.sequences)
