"""MiniCPM-V 2.6: picture encoder, resampler, language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from huoyan.layers.linear import reads_few_rows
from huoyan.layers.packed_attention import to_device
from huoyan.models.config import ModelConfig
from huoyan.models.patches import Grid, cut_patches, normalise
from huoyan.models.qwen2 import Attend, Qwen2
from huoyan.models.resampler import Resampler
from huoyan.models.siglip import PackedGrids, SiglipEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MiniCPMV(nn.Module):
    """The whole model. It knows nothing of requests: flat batches in, hidden states and logits out.

    Attributes named as in the published checkpoints (`vpm`, `resampler`, `llm`), with q, k, v and gate, up
    stacked. `norm_mean` and `norm_std` are the checkpoint's picture normalisation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_mean: Sequence[float] = (0.5, 0.5, 0.5)
        self.norm_std: Sequence[float] = (0.5, 0.5, 0.5)
        self.vpm = SiglipEncoder(config.vision)
        self.resampler = Resampler(config)
        self.llm = Qwen2(config.text)

    @property
    def device(self) -> torch.device:
        return self.resampler.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.resampler.query.dtype

    def encode_slices(self, slices: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Embeddings of uint8 slices [height, width, 3] with sides divisible by the patch size.

        Slices are encoded together, those of equal grids side by side; no slice sees another.

        Returns:
            [len(slices), query_num, hidden], in the order given.
        """
        order = sorted(range(len(slices)), key=lambda i: slices[i].shape)
        pixels, grids = cut_patches([slices[i] for i in order], self.config.vision.patch_size)
        on_device = to_device(torch.from_numpy(pixels), self.device)
        patches = normalise(on_device, self.norm_mean, self.norm_std, self.dtype)
        embeddings = self.encode_patches(patches, grids)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return embeddings.index_select(0, to_device(back, self.device))

    def encode_patches(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        layers: Callable[[Tensor, PackedGrids], Tensor | None] | None = None,
    ) -> Tensor:
        """Normalised patches [P, 3 * patch_size**2] of packed slices -> [slices, query_num, hidden].

        `layers` may take the place of the encoder's own, whose part is [P, hidden] -> [P, hidden], or give None.
        """
        grids = PackedGrids.of(grids)
        x = self.vpm.embeddings(patches, grids)
        seen = layers(x, grids) if layers is not None else None
        if seen is None:
            seen = self.vpm.layers(x, grids.lengths)
        del x
        out: Tensor = self.resampler(seen, grids)
        return out

    def embed(self, token_ids: Tensor) -> Tensor:
        """Integers [T] -> [T, hidden]."""
        out: Tensor = self.llm.model.embed_tokens(token_ids)
        return out

    def decoder(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        out: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """x [T, hidden] at positions [T] -> normed hidden states [T, hidden]; `out`, `layers`: see `Decoder`."""
        hidden: Tensor = self.llm.model(x, positions, attend, out, layers)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """[B, hidden] -> logits [B, vocab]: float32 where the kernel of few rows makes them so, else as wide as the
        model's dtype."""
        if reads_few_rows(hidden, self.config.text.hidden_size):
            return self.logits(hidden)
        return self.llm.lm_head.padded(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, hidden] -> float32 [B, vocab]."""
        return self.llm.lm_head.in_float32(hidden)
