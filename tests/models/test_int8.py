"""The vocabulary's tables in eight bits: rounding, products, reading, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from huoyan.errors import ModelError
from huoyan.layers.int8 import Int8Embedding, Int8Linear, Int8Weight, round_to_int8
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import load_model, published_state, write_shards
from huoyan.planning import pieces
from huoyan.planning.weights import weights
from tests.models.small import small_model, write_checkpoint
from tests.models.test_forward import causal

HEAD, EMBEDDING = "llm.lm_head", "llm.model.embed_tokens"


def write_int8(
    folder: Path, model: MiniCPMV, tables: tuple[str, ...], **changes: object
) -> dict[str, Tensor]:
    """Write `model` with these tables in eight bits, and put what they stand for into it."""
    write_checkpoint(folder, model, **changes)
    for file in folder.glob("model*"):
        file.unlink()
    state = dict(published_state(model))
    for table in tables:
        weight = round_to_int8(state[f"{table}.weight"])
        state[f"{table}.weight"].copy_(weight.dequantize())
        state[f"{table}.weight"], state[f"{table}.weight_scale"] = weight.q, weight.scales
    write_shards({n: v.contiguous() for n, v in state.items()}, folder, 300_000)
    return state


def logits(model: MiniCPMV, seed: int) -> Tensor:
    ids = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(seed))
    return model.logits(model.decoder(model.embed(ids), torch.arange(9), causal))


def test_rounding_is_to_the_nearest(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(40, 96, generator=g) * torch.logspace(-9, 3, 40).unsqueeze(1)
    dense[7] = 0
    weight = round_to_int8(dense)
    assert torch.equal(weight.scales, weight.scales.bfloat16().float())
    step = weight.scales.unsqueeze(1)
    assert ((weight.dequantize() - dense).abs() <= 0.5001 * step).all()
    peak = dense.abs().amax(1)
    assert (weight.scales <= (peak / 127 * 1.01).clamp(min=1.01e-12)).all()
    assert torch.equal(weight.dequantize()[7], torch.zeros(96))


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("shape", [(300, 256), (17, 32), (65, 36)])
def test_linear(
    seed: int, dtype: torch.dtype, bound: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = round_to_int8(torch.randn(shape, generator=g))
    layer = Int8Linear(weight)
    assert all(t.element_size() == 1 or t.numel() == shape[0] for t in layer.state_dict().values())
    for block in (64 << 20, 7 * shape[1]):
        monkeypatch.setattr(pieces, "DENSE_VALUES", block)
        for rows in (1, 2, 3, 40):
            x = torch.randn(rows, shape[1], generator=g).to(dtype)
            expected = x.float() @ weight.dequantize().T
            got = layer(x)
            assert got.dtype is dtype
            assert (got.float() - expected).norm() / expected.norm() < bound


def test_embedding(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = round_to_int8(torch.randn(50, 24, generator=g))
    ids = torch.randint(0, 50, (13,), generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        got = Int8Embedding(weight, dtype)(ids)
        assert torch.equal(got, weight.dequantize()[ids].to(dtype))
        assert torch.equal(got, Int8Embedding(weight, dtype)(ids.int()))


@pytest.mark.parametrize("tables", [(HEAD,), (EMBEDDING,), (HEAD, EMBEDDING)])
def test_read_from_files(tmp_path: Path, seed: int, tables: tuple[str, ...]) -> None:
    dense = small_model(seed)
    write_int8(tmp_path / "m", dense, tables)
    loaded = load_model(open_checkpoint(tmp_path / "m"))
    assert isinstance(loaded.llm.lm_head, Int8Linear) == (HEAD in tables)
    assert isinstance(loaded.llm.model.embed_tokens, Int8Embedding) == (EMBEDDING in tables)
    assert loaded.dtype is torch.float32
    torch.testing.assert_close(logits(loaded, seed), logits(dense, seed), rtol=1e-4, atol=1e-4)


def test_a_tied_head_shares_the_bytes(tmp_path: Path, seed: int) -> None:
    dense = small_model(seed, tie_word_embeddings=True)
    write_int8(tmp_path / "m", dense, (EMBEDDING,), tie_word_embeddings=True)
    dense.llm.lm_head.weight = dense.llm.model.embed_tokens.weight
    loaded = load_model(open_checkpoint(tmp_path / "m"))
    assert loaded.llm.lm_head.q.data_ptr() == loaded.llm.model.embed_tokens.q.data_ptr()
    torch.testing.assert_close(logits(loaded, seed), logits(dense, seed), rtol=1e-4, atol=1e-4)


def test_compressed_tensors_scales_of_a_column(tmp_path: Path, seed: int) -> None:
    dense = small_model(seed)
    state = write_int8(tmp_path / "m", dense, (HEAD,))
    rewrite(tmp_path / "m", state, {f"{HEAD}.weight_scale": state[f"{HEAD}.weight_scale"].unsqueeze(1)})
    loaded = load_model(open_checkpoint(tmp_path / "m"))
    torch.testing.assert_close(logits(loaded, seed), logits(dense, seed), rtol=1e-4, atol=1e-4)


def rewrite(folder: Path, state: dict[str, Tensor], changes: dict[str, Tensor | None]) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    wanted = {**state, **changes}
    write_shards({n: v.contiguous() for n, v in wanted.items() if v is not None}, folder, 300_000)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({f"{HEAD}.weight_scale": None}, "weight_scale"),
        ({f"{HEAD}.weight_scale": torch.ones(7)}, "scales"),
        ({f"{HEAD}.weight": torch.zeros(300, 100, dtype=torch.int8)}, "lm_head"),
        ({f"{HEAD}.weight_zero_point": torch.zeros(300, 1)}, "weight_zero_point"),
    ],
)
def test_bad_tables_are_named_in_one_line(
    tmp_path: Path, seed: int, changes: dict[str, Tensor | None], words: str
) -> None:
    state = write_int8(tmp_path / "m", small_model(seed), (HEAD,))
    rewrite(tmp_path / "m", state, changes)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(open_checkpoint(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_eight_bits_elsewhere_are_refused(tmp_path: Path, seed: int) -> None:
    state = write_int8(tmp_path / "m", small_model(seed), (HEAD,))
    name = "llm.model.layers.0.self_attn.o_proj.weight"
    rewrite(tmp_path / "m", state, {name: torch.zeros(256, 256, dtype=torch.int8)})
    with pytest.raises(ModelError, match="8-bit integers"):
        load_model(open_checkpoint(tmp_path / "m"))


def test_weight_moves_whole(seed: int) -> None:
    weight = Int8Weight(torch.ones(4, 6, dtype=torch.int8).T, torch.ones(6))
    assert weight.to(torch.device("cpu")).q.is_contiguous()


def test_the_plan_counts_the_bytes(tmp_path: Path, seed: int) -> None:
    write_int8(tmp_path / "m", small_model(seed), (HEAD, EMBEDDING))
    checkpoint = open_checkpoint(tmp_path / "m")
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    loaded = load_model(checkpoint, dtype="bfloat16")
    held = [
        sum(t.nbytes for t in m.state_dict().values())
        for m in (loaded.llm.lm_head, loaded.llm.model.embed_tokens)
    ]
    said = weights(checkpoint.config, shapes, 2)
    assert [said.head, said.embeddings] == held == [300 * 256 + 4 * 300] * 2
