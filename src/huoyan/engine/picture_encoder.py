"""Prepared pictures to embeddings: one packed batch over all that a step asks for.

On CUDA the originals are uploaded and everything else is done there: resize, cut, normalise, patches, encoder; beside
decodes on a stream of its own, so that they go on meanwhile, and in passes that take little memory beside theirs.
Elsewhere the host has cut the slices and they are encoded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from huoyan.engine.graph_memory import GraphMemory
from huoyan.engine.staging import Staging
from huoyan.kernels import picture_kernels_enabled
from huoyan.layers.packed_attention import to_device
from huoyan.media.originals import LARGEST
from huoyan.media.types import PreparedPicture, SlicePlan
from huoyan.models.patches import normalised_bytes
from huoyan.models.siglip import PackedGrids
from huoyan.planning.pieces import (
    BESIDE_GRAPH_PATCHES,
    BESIDE_PASS,
    BESIDE_PATCHES,
    BESIDE_SLICES,
    ENCODER_GRAPH_PATCHES,
    PASS_PATCHES,
    PASS_SLICES,
    runs_within,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.encoder_graph import EncoderGraphs
    from huoyan.kernels.picture_patches import Cut, ResizeTables
    from huoyan.models.minicpmv import MiniCPMV
    from huoyan.models.patches import Grid


log = logging.getLogger(__name__)
_RECENT_GRIDS = 16
"""Of which positions are kept on the device, some 60 KiB each."""


class Ready(Protocol):
    """Tells when work on another stream is done (a `torch.cuda.Event`)."""

    def query(self) -> bool: ...

    def wait(self) -> None:
        """Let the current stream wait; the host goes on."""


def resizes_on_device(model: MiniCPMV) -> bool:
    """Whether this model's device resizes pictures: CUDA, with the kernels on, and Pillow as we know it."""
    if model.device.type != "cuda" or not picture_kernels_enabled():
        return False
    from huoyan.layers.bicubic import agrees_with_pillow

    if not agrees_with_pillow():
        log.warning("this Pillow resizes in a way of its own, so pictures are resized by it, on the host")
        return False
    return True


@dataclass(frozen=True)
class _Upload:
    """Pixels to send, and what becomes of them: each cut with the first of its slices in the batch."""

    pixels: NDArray[np.uint8]
    cuts: tuple[tuple[Cut, int], ...]

    @property
    def kind(self) -> tuple[tuple[int, ...], tuple[Cut, ...]]:
        """What the pictures of one launch have in common."""
        return self.pixels.shape, tuple(cut for cut, _ in self.cuts)


class PictureEncoder:
    """Owned by the runner. One thread calls it."""

    def __init__(
        self,
        model: MiniCPMV,
        max_slices: int,
        max_patches: int = BESIDE_PATCHES,
        *,
        on_device: bool | None = None,
        graphs: bool = False,
        shared: GraphMemory | None = None,
    ) -> None:
        """`max_slices` are asked for at once, and `PASS_SLICES` of `max_patches` patches go through the encoder
        together at most (one slice may have more), `PASS_PATCHES` and beside decodes `BESIDE_PASS` where the device
        resizes. `on_device` overrides `resizes_on_device`; `graphs` captures passes as CUDA graphs, those that run on
        the step's stream with the memory that its other graphs have."""
        self._model = model
        self._max_slices = max_slices
        self._max_patches = max_patches
        self._stream: torch.cuda.Stream | None = None
        self._graphs: dict[bool, EncoderGraphs] = {}
        """Of passes on the step's stream, and of those aside."""
        self._packer: _Packer | None = None
        # What was sent to the device for them is used again, on the same stream.
        self._known = lru_cache(maxsize=_RECENT_GRIDS)(lambda grids, aside: PackedGrids(grids))
        # Embeddings that stay would keep torch from giving back what lay around them: on CUDA they have memory apart,
        # which torch keeps by the stream that was current when it was taken. Nothing runs there.
        self._shelf = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        if resizes_on_device(model) if on_device is None else on_device:
            self._packer = _Packer(model)
            if model.device.type == "cuda":
                self._stream = torch.cuda.Stream(model.device)
                if graphs:
                    from huoyan.engine.encoder_graph import CudaCapture, EncoderGraphs

                    kinds = {
                        False: (ENCODER_GRAPH_PATCHES, shared or GraphMemory.of(model)),
                        True: (BESIDE_GRAPH_PATCHES, GraphMemory.of(model, beside=True)),
                    }
                    for aside, (sizes, memory) in kinds.items():
                        self._graphs[aside] = EncoderGraphs(CudaCapture(model, sizes[-1], memory), sizes)
                # Weights may still be on their way there.
                self._stream.wait_stream(torch.cuda.current_stream(model.device))

    @property
    def takes_originals(self) -> bool:
        """Whether pictures that the host has not cut are better than those it has."""
        return self._packer is not None

    @property
    def runs_beside(self) -> bool:
        """Whether `encode` returns before it is done, and decode steps go on beside it."""
        return self._stream is not None

    def rehearse(self) -> None:
        """Go through what a pass launches (see `huoyan.kernels.launching`), and pictures of which the one side is
        resized first, the other, and none."""
        self.warm_up()
        if self._packer is None:
            return
        side = self._model.config.vision.patch_size
        plan = SlicePlan((side, side))
        for height, width in ((side, side), (side, 3 * side), (3 * side, side), (2 * side, 2 * side)):
            pixels = np.zeros((height, width, 3), np.uint8)
            self._packer.pack([PreparedPicture(b"", plan, original=pixels)])

    def warm_up(self) -> None:
        """Compile the kernels of a pass before the first picture comes, some seconds where they were never compiled."""
        side = 16
        pixels = 3 * self._model.config.vision.patch_size**2
        patches = self._model.resampler.query.new_zeros(side * side, pixels)
        self._model.encode_patches(patches, [(side, side)])

    def capture_all(self) -> None:
        """Capture every graph: those of the step's stream on the current one."""
        for aside, graphs in self._graphs.items():
            with torch.cuda.stream(self._stream) if aside else contextlib.nullcontext():
                graphs.capture_all()

    def encode(
        self, pictures: Sequence[PreparedPicture], beside: bool = True
    ) -> tuple[list[Tensor], Ready | None]:
        """The embeddings [slices, query_num, hidden] of each picture, and what must be waited for before reading
        them. `beside`: whether there are decodes, which go on meanwhile; where there are none, larger passes take the
        memory that a step would have."""
        patches = [count for picture in pictures for count in self._counts(picture)]
        # A strip has only room where the step's memory is, without what is uploaded.
        if self._packer is None or sum(patches) > self._most_together or max(patches) > BESIDE_PASS:
            return self._encode_passes(pictures), None
        stream = self._stream if beside or sum(patches) <= BESIDE_PASS else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            packed, grids, back = self._packer.pack(pictures, aside=stream is not None)
            encoded = self._encode(packed, grids, stream is not None).index_select(0, back)
            own = self._places(pictures)
            for place, part in zip(own, encoded.split([len(place) for place in own]), strict=True):
                place.copy_(part)
            if stream is None:
                return own, None
            done = torch.cuda.Event()
            done.record()
        reader = torch.cuda.current_stream(self._model.device)
        for embeddings in own:
            # Their memory must not be used again while the other stream may still read it.
            embeddings.record_stream(reader)
        return own, done

    def together(self, pictures: Sequence[PreparedPicture]) -> list[list[PreparedPicture]]:
        """Runs of neighbours that one call should encode: one pass's slices and patches, or one picture."""
        runs: list[list[PreparedPicture]] = []
        slices = patches = 0
        for picture in pictures:
            own = sum(self._counts(picture))
            if not runs or picture.num_slices > slices or own > patches:
                runs.append([])
                slices, patches = self._max_slices, self._most_together
            runs[-1].append(picture)
            slices -= picture.num_slices
            patches -= own
        return runs

    @property
    def _most_together(self) -> int:
        """Patches of a call; where the device resizes, its uploads and their patches stay to the end, and passes are
        smaller."""
        return self._max_patches if self._packer is None else BESIDE_PATCHES

    def _counts(self, picture: PreparedPicture) -> list[int]:
        """Patches of each slice."""
        return picture.patches(self._model.config.vision.patch_size)

    def _encode_passes(self, pictures: Sequence[PreparedPicture]) -> list[Tensor]:
        """Slices that the host has cut, in passes that fit the workspace; a pass may end inside a picture."""
        own = self._places(pictures)
        places = [place for embeddings in own for place in embeddings]
        slices = [piece for picture in pictures for piece in picture.slices]
        for first, last in self.passes(slices):
            encoded = self._model.encode_slices(slices[first:last])
            for place, embeddings in zip(places[first:last], encoded, strict=True):
                place.copy_(embeddings)
        return own

    def passes(self, slices: Sequence[NDArray[np.uint8]]) -> list[tuple[int, int]]:
        """Runs (first, last) of as many slices, and patches, as are encoded at once."""
        side = self._model.config.vision.patch_size
        counts = [(piece.shape[0] // side) * (piece.shape[1] // side) for piece in slices]
        return runs_within(counts, self._max_patches, min(self._max_slices, PASS_SLICES))

    def _encode(self, patches: Tensor, grids: list[Grid], aside: bool) -> Tensor:
        """In passes; `aside`: on the stream of its own."""
        parts = []
        at = 0
        graphs = self._graphs.get(aside)
        slices, most = min(self._max_slices, PASS_SLICES), min(self._max_patches, PASS_PATCHES)
        if aside:
            slices, most = min(slices, BESIDE_SLICES), min(most, BESIDE_PASS)
        passes = runs_within([rows * columns for rows, columns in grids], most, slices)
        for first, last in passes:
            packed = self._known(tuple(grids[first:last]), aside)
            some = patches[at : at + sum(packed.lengths)]
            at += len(some)
            parts.append(self._model.encode_patches(some, packed, graphs.run if graphs else None))
        return _joined(parts)

    def _places(self, pictures: Sequence[PreparedPicture]) -> list[Tensor]:
        """Where the embeddings of each picture are to be, for work on the current stream: each has memory of its own,
        so that dropping one picture frees it."""
        sizes = (self._model.config.query_num, self._model.config.text.hidden_size)
        with torch.cuda.stream(self._shelf) if self._shelf else contextlib.nullcontext():
            own = [
                torch.empty(picture.num_slices, *sizes, dtype=self._model.dtype, device=self._model.device)
                for picture in pictures
            ]
        if self._shelf is not None:
            for place in own:
                place.record_stream(torch.cuda.current_stream(self._model.device))
        return own


class _Packer:
    """Pictures, cut or not, to one batch of normalised patches on the device."""

    def __init__(self, model: MiniCPMV) -> None:
        from huoyan.kernels.picture_patches import ResizeTables

        self._device = model.device
        self._patch_size = model.config.vision.patch_size
        self._values = normalised_bytes(model.norm_mean, model.norm_std, model.dtype, model.device)
        # Each stream its own: what one was sent, another would have to wait for.
        self._tables = {aside: ResizeTables(model.device, 64) for aside in (False, True)}
        self._staging = Staging(model.device, LARGEST)

    def pack(
        self, pictures: Sequence[PreparedPicture], aside: bool = False
    ) -> tuple[Tensor, list[Grid], Tensor]:
        """Patches [P, 3 * patch_size**2] of all slices, those of equal grids side by side; the grids in that order;
        and where each slice of the pictures, in theirs, stands there: int32 [slices]."""
        uploads, grids = self._uploads(pictures)
        order = sorted(range(len(grids)), key=grids.__getitem__)
        back = np.empty(len(grids), np.int32)
        back[order] = np.arange(len(grids), dtype=np.int32)
        counts = np.array([rows * columns for rows, columns in grids])
        ends = np.cumsum(counts[order])
        first_rows = (ends - counts[order])[back]

        kinds: dict[object, list[_Upload]] = {}
        for upload in uploads:
            kinds.setdefault(upload.kind, []).append(upload)
        batches = [batch for alike in kinds.values() for batch in _within(alike, LARGEST)]
        cells = [
            [first + i for first in (upload.cuts[c][1] for upload in batch) for i in range(cut.num_cells)]
            for batch in batches
            for c, (cut, _) in enumerate(batch[0].cuts)
        ]
        # One copy for all the small numbers.
        numbers = np.concatenate([back, first_rows[[i for some in cells for i in some]]]).astype(np.int32)
        on_device = to_device(torch.from_numpy(numbers), self._device)
        where = iter(on_device[len(grids) :].split([len(some) for some in cells]))
        patches = self._values.new_empty(int(ends[-1]), 3 * self._patch_size**2)
        for batch in batches:
            self._resize(batch, where, patches, self._tables[aside])
        return patches, [grids[i] for i in order], on_device[: len(grids)]

    def _uploads(self, pictures: Sequence[PreparedPicture]) -> tuple[list[_Upload], list[Grid]]:
        """What to send, and the grid of every slice in the order of the pictures."""
        from huoyan.kernels.picture_patches import Cut

        uploads = []
        grids: list[Grid] = []
        for picture in pictures:
            if picture.original is None:
                for pixels in picture.slices:
                    cut = Cut((pixels.shape[1], pixels.shape[0]))
                    uploads.append(_Upload(pixels, ((cut, len(grids)),)))
                    grids.append(self._grid(cut))
                continue
            plan = picture.plan
            cuts = [Cut(plan.overview)]
            if plan.cell is not None and plan.grid is not None:
                cuts.append(Cut(plan.cell, plan.grid))
            placed = []
            for cut in cuts:
                placed.append((cut, len(grids)))
                grids.extend([self._grid(cut)] * cut.num_cells)
            uploads.append(_Upload(picture.original, tuple(placed)))
        return uploads, grids

    def _grid(self, cut: Cut) -> Grid:
        return cut.cell[1] // self._patch_size, cut.cell[0] // self._patch_size

    def _resize(
        self, batch: list[_Upload], where: Iterator[Tensor], patches: Tensor, tables: ResizeTables
    ) -> None:
        from huoyan.kernels.picture_patches import picture_patches

        sent = self._staging.upload([upload.pixels for upload in batch])
        pixels = sent.view(len(batch), *batch[0].pixels.shape)
        for cut, _ in batch[0].cuts:
            picture_patches(pixels, cut, self._patch_size, self._values, next(where), patches, tables)


def _within(uploads: list[_Upload], most: int) -> list[list[_Upload]]:
    """Neighbours of one size together, at most `most` bytes unless one alone has more."""
    each = max(1, most // uploads[0].pixels.nbytes)
    return [uploads[i : i + each] for i in range(0, len(uploads), each)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
