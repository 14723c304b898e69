"""What the host tells the device of beam searches before a step: `SearchOrders`, laid out from groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from huoyan.layers.beam_step import EARLY, EOS, HEAD, LAST, NEVER, POWER, SOURCE, WIDTH, SearchOrders
from huoyan.layers.packed_attention import to_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from huoyan.engine.sequence import Group


def search_orders(
    rows: Mapping[Group, list[int]], before: Mapping[Group, int], device: torch.device
) -> SearchOrders:
    """For a step that counts as launched already.

    Args:
        rows: of each search the rows of its beams' logits.
        before: the place of each search in the step whose tokens the host does not know yet, where it is in one.
    """
    width = max(group.width for group in rows)
    stops = max(1, *(len(_stops(group)) for group in rows))
    table = np.full((len(rows), SearchOrders.columns(width, stops)), -1, np.int64)
    floats: NDArray[np.float64] = table.view(np.float64)
    first_sum = HEAD + width + stops
    floats[:, first_sum:] = NEVER
    for i, (group, own) in enumerate(rows.items()):
        search, seq = group.beams, group.sequences[0]
        assert search is not None
        source = before[group] if seq.num_in_flight > 1 else -1
        length = search.prompt_len + seq.num_outputs
        table[i, WIDTH] = group.width
        table[i, SOURCE] = source
        table[i, EARLY] = search.early
        table[i, LAST] = seq.num_outputs >= seq.answer.max_tokens
        table[i, EOS] = -1 if search.eos_token_id is None else search.eos_token_id
        powers = (search.power(length), search.power(length - 1), search.power(search.longest))
        floats[i, POWER:HEAD] = powers
        table[i, HEAD : HEAD + len(own)] = own
        found = _stops(group)
        table[i, HEAD + width : HEAD + width + len(found)] = found
        if source < 0:
            sums = [answer.cumulative_logprob for answer in group.live_answers]
            scores = [search.score(answer) for answer in search.finished]
            floats[i, first_sum : first_sum + len(sums)] = sums
            floats[i, first_sum + width : first_sum + width + len(scores)] = scores
    return SearchOrders(to_device(torch.from_numpy(table), device), width, stops)


def _stops(group: Group) -> list[int]:
    """Every token that ends an answer of the group."""
    rules = group.sequences[0].answer.rules
    own = () if rules.eos_token_id is None else (rules.eos_token_id,)
    return [*rules.token_ids, *own]
