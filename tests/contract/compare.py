"""What counts as the same: token ids up to a numerical tie, log-probabilities within a tolerance."""

from __future__ import annotations

from itertools import takewhile
from math import exp

from huoyan.api.outputs import CompletionOutput, RequestOutput, TokenLogprobs

TOP = 5
"""Log-probabilities that are asked for where answers are compared: enough to see a tie."""


def values_agree(native: TokenLogprobs, vllm: TokenLogprobs, tolerance: float) -> float:
    """Largest difference over the tokens that both report, which must be most of them."""
    shared = native.keys() & vllm.keys()
    assert len(shared) >= min(len(native), len(vllm)) - 2, (native, vllm)
    worst = 0.0
    for token in shared:
        mine, theirs = native[token].logprob, vllm[token].logprob
        assert near(mine, theirs, tolerance), (native, vllm)
        worst = max(worst, abs(mine - theirs))
    return worst


def near(one: float, other: float, tolerance: float) -> bool:
    """Whether two log-probabilities are the same but for rounding, which grows with the logits.

    What is far less likely than the rest is known less exactly; in 16 bits (`tolerance` of 0.1) so much less that
    probabilities are compared there.
    """
    if abs(one - other) <= tolerance * max(1.0, -one / 2):
        return True
    return tolerance >= 0.1 and abs(exp(one) - exp(other)) <= tolerance


def answers_agree(native: CompletionOutput, vllm: CompletionOutput, tolerance: float) -> float:
    """Two greedy answers with log-probabilities: equal, or parted at a tie.

    Until they part, what is reported must agree within `tolerance`; where they part, the two tokens must be no
    further apart than twice that. Equal ids must have equal text and ends. Returns the largest difference.
    """
    assert native.logprobs is not None
    assert vllm.logprobs is not None
    pairs = zip(native.token_ids, vllm.token_ids, strict=False)
    same = len(list(takewhile(lambda both: both[0] == both[1], pairs)))
    steps = min(same + 1, len(native.token_ids), len(vllm.token_ids))
    worst = max(values_agree(native.logprobs[i], vllm.logprobs[i], tolerance) for i in range(steps))
    if native.token_ids == vllm.token_ids:
        assert (native.text, native.finish_reason) == (vllm.text, vllm.finish_reason)
        assert native.stop_reason == vllm.stop_reason
        return worst
    assert same < len(native.token_ids), "vLLM's answer goes on where the native one has ended"
    assert same < len(vllm.token_ids), "the native answer goes on where vLLM's has ended"
    entries = native.logprobs[same]
    mine, theirs = native.token_ids[same], vllm.token_ids[same]
    assert theirs in entries, "they part where there is no tie"
    assert near(entries[mine].logprob, entries[theirs].logprob, 2 * tolerance)
    return worst


def outputs_agree(native: RequestOutput, vllm: RequestOutput, tolerance: float) -> float:
    """One request's outputs, with greedy answers."""
    assert (native.error, vllm.error) == (None, None)
    assert native.prompt_token_ids == vllm.prompt_token_ids
    assert native.prompt == vllm.prompt
    assert native.finished
    assert vllm.finished
    return max(
        answers_agree(mine, theirs, tolerance)
        for mine, theirs in zip(native.outputs, vllm.outputs, strict=True)
    )
