"""How much is done at once where a step works in pieces: the engine goes by these, and the plan counts with them."""

from __future__ import annotations

from collections.abc import Sequence

MLP_ROWS = 1024
"""Tokens that go through the decoder's MLP at once on a GPU: it is busy with fewer already."""
UP_VALUES = 4 << 20
"""Products that int4 gates are multiplied by, which lie beside the gates of all tokens: of the published width some 120
tiles of a Hopper's 132 processors."""
GATHER_TOKENS = 32768
"""Tokens whose keys and values the plain attention gathers at once, save that one sequence's always are."""
MASK_VALUES = 1 << 24
"""Values of an attention mask."""
DENSE_VALUES = 1 << 24
"""Values of an int4 matrix that are dequantized."""
DENSE_VALUES_CUDA = 66 << 20
"""On a GPU, where few outputs leave processors idle: the published model's `down`, half of its `gate_up`."""
UNPACKED_VALUES = 1 << 20
"""The same on a CPU in bfloat16, for many rows: what stays in its cache."""
FEW_ROWS = 192
"""Rows that our int4 kernel multiplies without a dense matrix on any card (`huoyan.kernels.int4_cuts`)."""
INT4_ROWS = 1024
"""Rows that it does where a program has room for more, at most."""
INT4_PARTS_ROWS = 2304
"""Rows of the parts in float32 that it gives of more than `FEW_ROWS`, together."""
WIDE_ROWS = 128
"""Rows that our kernel multiplies with a large dense matrix (`huoyan.kernels.wide_matmul`)."""
WIDE_PARTS = 4
"""Parts in float32 that it gives the next kernel to add, at most."""
FEW_ROWS_CPU = 128
"""Rows that torch's int4 product multiplies in less time than unpacking takes (`huoyan.layers.int4_cpu`)."""
PROMPT_LOGITS = 1 << 22
"""Logits of a prompt's own tokens (16 MiB in float32)."""
CHOICE_LOGITS = 6 << 18
"""Logits that tokens are chosen from: filters and grammars take some thirty bytes for each."""
SORTED_LOGITS = 1 << 19
"""Logits that are sorted: some seventy bytes for each."""
NOISE_LOGITS = 1 << 17
"""Logits that noise is made for: what stays in a core's cache."""
NOISE_LOGITS_CUDA = 1 << 20
"""On a GPU, where each piece costs its launches."""
COPIED_BLOCKS = 16
"""Blocks of the KV cache that are copied, by way of as much memory."""
PICTURE_SLICES = 64
"""Slices that one picture may have even where the picture cache holds fewer."""
PROJECTED_PATCHES = 2048
"""Patches whose keys or values the resampler makes at once, over what they are made of."""
RESAMPLED_PATCHES = 2 * 1056
"""Patches of whole slices that the resampler looks at together; one slice may have more."""
KEPT_POSITIONS = 128
"""Rows and columns of a slice whose positions are computed once. A square slice of the published size has 32."""
PASS_SLICES = 8
"""Slices that go through the encoder at once: what the resampler makes of them is held several times."""
PASS_PATCHES = 7 * 1056
"""Patches of a pass where the device resizes and nothing decodes, beside what was uploaded: all of a picture of
1344x896, since launching a pass takes the host as long for one slice as for seven."""
BESIDE_PATCHES = 11 * 1024
"""Patches that are resized and encoded in one go on CUDA: a picture of ten slices."""
BESIDE_PASS = 3 * 1100
"""Patches of a pass beside decodes, in memory that they do not share: enough to fill a device while the host launches
the next ones."""
BESIDE_SLICES = 8
"""Slices of such a pass."""
BESIDE_PIXELS = 40 << 20
"""Bytes of originals that are uploaded at once (`huoyan.media.originals.LARGEST`)."""
ENCODER_GRAPH_PATCHES = (1056, 2112, BESIDE_PASS, 4224, 5280, 6336, PASS_PATCHES)
"""Patches that CUDA graphs of the encoder have room for."""
BESIDE_GRAPH_PATCHES = ENCODER_GRAPH_PATCHES[:3]
"""Those of graphs that run beside decodes."""
ENCODER_GRAPH_SLICES = PASS_SLICES
"""Slices that such a graph has room for."""
ENCODER_GRAPH_LONGEST = 1152
"""Patches of a slice that has a graph at most: of the published size, whatever its shape."""


_TILE = 128


def runs_within(counts: Sequence[int], most: int, most_items: int | None = None) -> list[tuple[int, int]]:
    """Neighbours (first, last) whose counts together are at most `most`, and so many at most; one item may have
    more."""
    runs: list[tuple[int, int]] = []
    room = left = 0
    for i, count in enumerate(counts):
        if not room or count > left:
            runs.append((i, i))
            room, left = most_items or len(counts), most
        runs[-1] = (runs[-1][0], i + 1)
        room -= 1
        left -= count
    return runs


def dense_rows(out: int, width: int, kernels: bool) -> int:
    """Rows of a matrix [out, width] that are dense at a time; `kernels`: on CUDA, with our kernels on."""
    return _rows(out, width, DENSE_VALUES_CUDA if kernels else DENSE_VALUES)


def mlp_rows(tokens: int) -> int:
    """Tokens of so many that go through the decoder's MLP at once, with our kernels on: all, or pieces of one size."""
    pieces = -(-tokens // MLP_ROWS)
    return tokens if pieces <= 1 else -(-tokens // pieces // _TILE) * _TILE


def up_columns(tokens: int, width: int) -> int:
    """Outputs of so many that int4 gates of `tokens` are multiplied by at once: all, or pieces of about one size."""
    pieces = -(-tokens * width // UP_VALUES)
    return width if pieces <= 1 else min(-(-width // pieces // _TILE) * _TILE, width)


def prefill_tile(tokens: int) -> int:
    """Queries that a program of the prefill kernel takes, where a step computes, or one of its tokens sees, so many
    tokens: large tiles read fewer keys, small ones are more programs."""
    return 64 if tokens <= 1024 else 128


def unpacked_rows(out: int, width: int) -> int:
    """The same of an int4 matrix on a CPU in bfloat16, for many rows."""
    return _rows(out, width, UNPACKED_VALUES)


def _rows(out: int, width: int, values: int) -> int:
    """In pieces of about one size, in whole tiles of what multiplies them."""
    pieces = -(-out * width // values)
    return out if pieces <= 1 or out < _TILE else -(-out // pieces // _TILE) * _TILE
