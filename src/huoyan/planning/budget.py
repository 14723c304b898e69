"""How much of a card is for the KV cache, and where torch is told to stop."""

from __future__ import annotations

from dataclasses import dataclass

from huoyan.planning.driver import context_bytes
from huoyan.planning.sizes import gib


@dataclass(frozen=True)
class CardState:
    """A card once the weights are on it, in bytes, as the driver and torch say."""

    total: int
    free: int
    reserved: int
    """By torch's allocator in this process."""


@dataclass(frozen=True)
class Budget:
    """What was told, and what that leaves."""

    allowed: int
    """Bytes that may be in use: by this process under `gpu_memory`, else by everybody on the card."""
    kv: int
    """Of the KV cache; negative where even without one it would be too much."""
    torch: int
    """Bytes that torch's allocator may reserve in all."""
    source: str
    """For messages."""


def card_budget(
    card: CardState,
    utilization: float,
    gpu_memory: int | None,
    beside: int,
    driver: int = 0,
    context: int | None = None,
) -> Budget:
    """Divide a card.

    Args:
        utilization: the part of the card that may be in use when `gpu_memory` is None.
        gpu_memory: what this process may take, its CUDA context included.
        beside: bytes of everything but weights (which lie there), KV cache and context.
        driver: how many of those the driver takes and not torch (of captured graphs).
        context: what the CUDA context comes to; None as planned.
    """
    used = card.total - card.free
    # What is in use beyond torch's own is our context, and other processes if it is far more than a context.
    outside = used - card.reserved
    known = context_bytes() if context is None else context
    context = max(outside, known) if outside <= 2 * known else known
    to_come = max(context - outside, 0)
    left_on_card = card.free - to_come - beside
    if gpu_memory is None:
        allowed = int(card.total * utilization)
        kv = min(allowed - max(used, card.reserved + context) - beside, left_on_card)
        source = f"gpu_memory_utilization={utilization:g} of {gib(card.total)}, {gib(used)} in use"
    else:
        allowed = gpu_memory
        kv = min(allowed - card.reserved - context - beside, left_on_card)
        source = f"gpu_memory={gib(gpu_memory)}, {gib(card.reserved)} of it taken"
        if left_on_card == kv:
            source += f", {gib(card.free)} free"
    return Budget(allowed, kv, card.reserved + beside - driver + max(kv, 0), source)


def host_budget(gpu_memory: int, weights: int, beside: int) -> Budget:
    """The same where there is no card: what may be taken of main memory."""
    kv = gpu_memory - weights - beside
    return Budget(gpu_memory, kv, gpu_memory, f"gpu_memory={gib(gpu_memory)}")
