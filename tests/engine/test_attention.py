"""The paged attention against one written out over dense tensors, on random batches."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from huoyan.engine import attention
from huoyan.engine.attention import PagedAttention, Workspace
from huoyan.engine.batch import Batch, build_batch
from huoyan.engine.kv_cache import KVCache
from huoyan.engine.schedule import Chunk, Schedule


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """Queries at positions start.. of one sequence whose keys and values are all given."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = torch.empty_like(q)
    for i in range(len(q)):
        seen = start + i + 1
        scores = torch.einsum("hd,khd->hk", q[i], k[:seen]) / q.shape[-1] ** 0.5
        out[i] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[:seen])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_dense_attention(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        monkeypatch.setattr(attention, "QUERY_PIECE", rng.choice([3, 512]))
        block_size = rng.choice([1, 4, 16])
        kv_heads = rng.choice([1, 2, 3])
        heads, dim = kv_heads * rng.choice([1, 2, 4]), rng.choice([8, 24])
        lengths = [rng.randint(1, 150) for _ in range(rng.randint(1, 7))]
        tables = [-(-n // block_size) for n in lengths]
        cache = KVCache(2, sum(tables) + 1, block_size, kv_heads, dim, dtype, torch.device("cpu"))
        blocks = list(range(1, sum(tables) + 1))
        rng.shuffle(blocks)
        cache.keys.numbers.fill_(1e4)  # what a block held before must not matter
        cache.values.numbers.fill_(1e4)
        layer = rng.randrange(2)
        schedule, dense = Schedule(), {}
        for n, count in zip(lengths, tables, strict=True):
            table = [blocks.pop() for _ in range(count)]
            k, v = torch.randn(2, n, kv_heads, dim, dtype=dtype)
            decode = rng.random() < 0.5
            start = n - 1 if decode else rng.randrange(n)
            rows = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(n)])
            cache.write(layer, rows[:start], k[:start], v[:start])
            seq = SimpleNamespace(
                block_table=table,
                output_ids=[7],
                num_known=n,
                group=SimpleNamespace(prompt_len=n - 1),
                token_ids=lambda a, b: np.arange(a, b),
            )
            chunk = Chunk(seq, start, n, True)  # type: ignore[arg-type]
            (schedule.decodes if decode else schedule.prefills).append(chunk)
            dense[id(chunk)] = (torch.randn(n - start, heads, dim, dtype=dtype), k, v)
        batch = build_batch(schedule, block_size)
        parts = [dense[id(chunk)] for chunk in batch.chunks]
        q = torch.cat([p[0] for p in parts])
        k = torch.cat([p[1][c.start :] for c, p in zip(batch.chunks, parts, strict=True)])
        v = torch.cat([p[2][c.start :] for c, p in zip(batch.chunks, parts, strict=True)])
        got = PagedAttention(cache, batch, dtype, Workspace())(layer, q, k, v)
        want = torch.cat(
            [_dense(p[0], p[1], p[2], c.start) for c, p in zip(batch.chunks, parts, strict=True)]
        )
        tolerance = 1e-5 if dtype is torch.float32 else 1e-12
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert batch.sampling == schedule.chunks
        assert [batch.chunks[_owner(batch, row)] for row in batch.sampled_rows.tolist()] == schedule.chunks


def _owner(batch: Batch, row: int) -> int:
    """The chunk whose last row it is."""
    return (batch.cu_seqlens_q[1:] - 1).tolist().index(row)


def test_batch_arrays(seed: int) -> None:
    """Positions, slots and ids, token by token."""
    rng = random.Random(seed)
    for _ in range(20):
        block_size = rng.choice([1, 3, 8])
        schedule = Schedule()
        for i in range(rng.randint(1, 6)):
            n = rng.randint(1, 40)
            decode = rng.random() < 0.5
            start = n - 1 if decode else rng.randrange(n)
            table = [rng.randrange(1000) for _ in range(-(-n // block_size) + rng.randrange(2))]
            seq = SimpleNamespace(
                block_table=table,
                output_ids=[i * 1000 + n - 1],
                num_known=n,
                group=SimpleNamespace(prompt_len=n - 1),
                token_ids=lambda a, b, i=i: i * 1000 + np.arange(a, b),
            )
            chunk = Chunk(seq, start, n, True)  # type: ignore[arg-type]
            (schedule.decodes if decode else schedule.prefills).append(chunk)
        batch = build_batch(schedule, block_size)
        assert batch.num_tokens == schedule.num_tokens == batch.cu_seqlens_q[-1]
        lengths = batch.seq_lens[: batch.num_decodes].tolist()
        assert lengths == sorted(lengths, reverse=True)
        for i, chunk in enumerate(batch.chunks):
            rows = slice(batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1])
            positions = list(range(chunk.start, chunk.end))
            table = chunk.sequence.block_table
            assert batch.positions[rows].tolist() == positions
            assert [t % 1000 for t in batch.token_ids[rows].tolist()] == positions
            assert batch.slot_mapping[rows].tolist() == [
                table[p // block_size] * block_size + p % block_size for p in positions
            ]
            assert batch.seq_lens[i] == chunk.end
            assert batch.block_tables[i, : -(-chunk.end // block_size)].tolist() == [
                *table[: -(-chunk.end // block_size)]
            ]
