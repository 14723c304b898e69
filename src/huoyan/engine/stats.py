"""What an engine is doing, in numbers: for metrics, progress bars and bug reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Gauges of now, and counts since the start."""

    num_running: int
    """Requests that hold blocks."""
    num_waiting: int
    blocks_used: int
    blocks_total: int
    blocks_cached: int
    """Full blocks whose contents can be found again, held or free."""
    picture_bytes: int
    picture_hits: int
    """Times a request found its picture encoded."""
    picture_misses: int
    steps: int
    prompt_tokens: int
    """Computed by prefills; cached ones are not among them, those computed again after a preemption are."""
    generated_tokens: int
    preemptions: int
    draft_tokens: int = 0
    """Guessed by speculation, right or wrong."""
    accepted_tokens: int = 0
    """Those that were right: tokens that took no step of their own."""
