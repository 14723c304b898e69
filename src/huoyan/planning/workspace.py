"""The most that one step of the engine takes beside weights and KV cache, part by part of the code that runs.

Each function adds up the tensors that live at one moment; its comments name them. `T` tokens, `P` patches, `H` the
decoder's hidden size, `I` its MLP's width, `A` the width of all query heads, `K` of all key heads, `V` the
vocabulary, `C` the encoder's hidden size, `M` its MLP's width. tests/plan holds these sums against what torch's
allocator counts in real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from huoyan.planning.graphs import STEP_GRAPH_PARTS
from huoyan.planning.pieces import (
    BESIDE_PASS,
    BESIDE_PATCHES,
    BESIDE_PIXELS,
    BESIDE_SLICES,
    CHOICE_LOGITS,
    FEW_ROWS,
    FEW_ROWS_CPU,
    GATHER_TOKENS,
    INT4_PARTS_ROWS,
    INT4_ROWS,
    MASK_VALUES,
    NOISE_LOGITS,
    NOISE_LOGITS_CUDA,
    PASS_PATCHES,
    PASS_SLICES,
    PROJECTED_PATCHES,
    PROMPT_LOGITS,
    RESAMPLED_PATCHES,
    SORTED_LOGITS,
    WIDE_PARTS,
    WIDE_ROWS,
    dense_rows,
    mlp_rows,
    unpacked_rows,
    up_columns,
)
from huoyan.planning.sizes import MIB

if TYPE_CHECKING:
    from huoyan.models.config import ModelConfig

CHOICE_BYTES = 24
"""A logit that is chosen from: in float32, copies for several kinds of requests, bias, filters, grammars; 21 were
seen."""
PARTS = 14
"""Parts in float32 that our products of few rows give the next kernel to add."""
SHARED_TILES = 9 * MIB
"""Sums of the tiles of a gate's product that programs share, in float32."""
SORT_BYTES = 64
"""A logit that is sorted: values, ids, sums in float64, and the sort's own memory."""
NOISE_BYTES = 24
"""A logit that noise is made for; 18 were seen."""


@dataclass(frozen=True)
class Way:
    """How a model is computed on a device: what decides which temporaries there are."""

    itemsize: int
    """Bytes of an activation."""
    cuda: bool
    kernels: bool = False
    """Our own attention kernels and CUDA graphs."""
    int4: str | None = None
    """How int4 matrices are packed: "bytes", "words", "cpu"; None where there are none."""
    kv8: bool = False
    """The KV cache has 8 bits a number: what is read of it is written out in the model's dtype."""
    threads: int = 1
    """Of a CPU; its attention has a buffer for each."""


@dataclass(frozen=True)
class Limits:
    """What a step holds at most."""

    tokens: int
    seqs: int
    context: int
    block_size: int
    encoder_slices: int
    encoder_patches: int


@dataclass(frozen=True)
class Workspace:
    """Bytes of each moment of a step. They follow one another, so the largest counts, and what stays counts beside."""

    kept: int
    """Buffers that stay from step to step."""
    encoder: int
    decoder: int
    logits: int
    choice: int
    prompt_logprobs: int

    beside: int = 0
    """The encoder on a stream of its own, which does not share what the others have freed."""

    @property
    def steps(self) -> int:
        """Of a step but for its pictures."""
        return max(self.decoder, self.logits, self.choice, self.prompt_logprobs)

    @property
    def peak(self) -> int:
        # A pass on the step's own stream begins when nothing else is under way, but what torch keeps for one stream it
        # gives to another only after it has run out, which takes milliseconds.
        return self.beside + max(self.encoder, self.steps)

    @property
    def total(self) -> int:
        return self.kept + self.peak


def workspace(config: ModelConfig, way: Way, limits: Limits) -> Workspace:
    """The peaks of every part of a step within `limits`."""
    logits, choice = _logits(config, way, limits)
    return Workspace(
        kept=_kept(config, way, limits),
        encoder=_encoder(config, way, limits),
        decoder=_decoder(config, way, limits),
        logits=logits,
        choice=choice,
        prompt_logprobs=_prompt_logprobs(config, way, limits),
        beside=_beside(config, way, limits),
    )


def with_encoder_passes(config: ModelConfig, way: Way, limits: Limits, slice_patches: int) -> Limits:
    """Limits whose encoder passes are as large as the rest of the step's workspace already is.

    `slice_patches`: of the largest slice that may come, which is always encoded whole.
    """
    least = workspace(config, way, replace(limits, encoder_patches=slice_patches))
    rest = least.steps
    # The embeddings of a pass's slices count with however few patches; what they leave is for more patches.
    low, high = slice_patches, max(slice_patches, 1 << 24)
    while low < high:
        middle = (low + high + 1) // 2
        if _encoder(config, way, replace(limits, encoder_patches=middle)) <= rest:
            low = middle
        else:
            high = middle - 1
    return replace(limits, encoder_patches=low)


def encoder(
    config: ModelConfig, way: Way, patches: int, slices: int, *, held: bool = True, largest: int | None = None
) -> int:
    """Bytes while `patches` patches of `slices` slices are encoded together. `held`: with the patches themselves;
    `largest`: patches of the largest slice, where it is known to have fewer than all."""
    vision, width = config.vision, config.text.hidden_size
    e, C, M = way.itemsize, vision.hidden_size, vision.intermediate_size
    pixels = vision.num_channels * vision.patch_size**2
    own_kernels = way.cuda and way.kernels
    # The patches in the model's dtype stay to the end; on CUDA so do the bytes they were made of.
    own = pixels * (e + 1) if held else 0
    moments = [
        pixels * 4,
        # Embeddings of pixels and of positions, their sum, and which positions.
        3 * C * e + 16,
        # x, its norm, q k v, written over by the answer, and again the norm by its projection. Off our kernels' way a
        # copy of each, or of the answer, its projection; lse.
        (6 if own_kernels else 9) * C * e + 4 * vision.num_attention_heads,
        # x, its norm, which the MLP's answer is written over, the MLP's width. Off our kernels' way the layer's x, x
        # after attention, its norm, the MLP's width, written over; its answer.
        ((2 if own_kernels else 4) * C + M) * e,
    ]
    # x; keys and values of some slices before or after their projection, a part of them in both forms.
    some = patches if largest is None else min(patches, max(RESAMPLED_PATCHES, largest))
    # Before that the encoder's last x and its norm, what the resampler makes of them, and its norm.
    resampling = (patches * (1 if own_kernels else 2) * C + some * 2 * width) * e
    projecting = (patches * C + some * 2 * width + min(some, PROJECTED_PATCHES) * width) * e
    queries = slices * config.query_num
    # x, keys and values; queries, a run's answer, all answers; their projections, norm, and the embeddings before
    # and after they are put in order.
    answers = (patches * C + some * 2 * width) * e + queries * (width * e * 4 + 4 * config.resampler_heads)
    tiles = _flash(way, max(vision.head_dim, 128))
    return patches * own + max(patches * max(moments), resampling, projecting, answers) + tiles + MIB // 4


def _encoder(config: ModelConfig, way: Way, limits: Limits) -> int:
    """On the step's own stream: slices that the host has cut, and whole pictures where there are no decodes."""
    slices = min(PASS_SLICES, limits.encoder_slices)
    most = encoder(config, way, limits.encoder_patches, slices)
    if not way.kernels or not limits.encoder_patches:
        return most
    in_pass = min(PASS_PATCHES, limits.encoder_patches)
    return max(most, _whole_pictures(config, way, limits, in_pass, slices))


def _beside(config: ModelConfig, way: Way, limits: Limits) -> int:
    """Pictures on their way beside decodes, in smaller passes."""
    if not way.kernels or not limits.encoder_patches:
        return 0
    patches = min(BESIDE_PASS, limits.encoder_patches)
    return _whole_pictures(config, way, limits, patches, min(BESIDE_SLICES, limits.encoder_slices))


def _whole_pictures(config: ModelConfig, way: Way, limits: Limits, in_pass: int, slices: int) -> int:
    """Originals that the device resizes, then passes of so many patches and slices over what they gave."""
    vision = config.vision
    patches = BESIDE_PATCHES
    pixels = vision.num_channels * vision.patch_size**2
    embeddings = limits.encoder_slices * config.query_num * config.text.hidden_size * way.itemsize
    moments = [
        # Originals, and what they are resized by way of.
        2 * BESIDE_PIXELS,
        # Embeddings of the passes before.
        embeddings + encoder(config, way, in_pass, slices, held=False, largest=min(BESIDE_PASS, in_pass)),
        # Those of all passes, joined, in their order, and each picture's own.
        4 * embeddings,
    ]
    return patches * pixels * way.itemsize + max(moments) + MIB // 4


def _kept(config: ModelConfig, way: Way, limits: Limits) -> int:
    """Gathered keys and values of the plain attention (`engine.attention.Workspace`); with kernels the dense part of
    an int4 matrix."""
    if way.kernels:
        return _scratch(config, way) if way.int4 == "words" else 0
    blocks = max(_blocks(limits), GATHER_TOKENS // limits.block_size)
    values = blocks * limits.block_size * _widths(config)[1]
    # Keys and values; of 8 bits also as they are stored, with scales.
    return values * (2 * way.itemsize + (2 if way.kv8 else 0))


def captured_encoder(config: ModelConfig, way: Way, patches: int) -> int:
    """What a CUDA graph of the encoder's layers has of its own: the stream of additions lies outside. A layer's input,
    which its products are written over, and q k v, which attention's answers are written over, or the MLP's width."""
    C, M = config.vision.hidden_size, config.vision.intermediate_size
    return patches * (C + max(3 * C, M)) * way.itemsize + MIB // 4


def captured_steps(config: ModelConfig, way: Way, limits: Limits, rows: int, decodes: int) -> int:
    """What a CUDA graph of a step that computes prompts has of its own, of `rows` tokens with room for `decodes`:
    embeddings and states lie outside."""
    inside = _decoder(config, way, replace(limits, tokens=rows, seqs=rows), graph=True, decodes=decodes)
    return inside - rows * config.text.hidden_size * way.itemsize


def captured(config: ModelConfig, way: Way, limits: Limits, rows: int) -> int:
    """A decode step of `rows` rows up to the head, as a CUDA graph has it: no slots are sent."""
    found = max(
        _decoder(config, way, replace(limits, tokens=count, seqs=count), graph=True)
        for count in {rows, min(rows, FEW_ROWS), min(rows, WIDE_ROWS), min(rows, 64), min(rows, 16)}
    )
    return found + rows * config.text.hidden_size * way.itemsize


def _decoder(config: ModelConfig, way: Way, limits: Limits, *, graph: bool = False, decodes: int = 0) -> int:
    """`graph`: captured, with room for `decodes` whose context is in parts."""
    text = config.text
    e, T = way.itemsize, limits.tokens
    H, I = text.hidden_size, text.intermediate_size
    A, K = _widths(config)
    # Embeddings, the layer's two inputs, the residual stream, its norm, where these are not written over the inputs;
    # cosines and sines where attention does not rotate.
    over = way.kernels and T > FEW_ROWS
    base = T * ((3 if over else 5) * H * e + (0 if way.kernels else text.head_dim * 4))
    wide = 4 if way.cuda else 1
    # What comes in: x and residual of before, their sum, its norm and, off CUDA, float32 in between.
    norm = T * (2 * H * e + (0 if way.cuda else 3 * H * 4))
    # In float32: a copy, two halves' products, their sums, all of it joined; then rounded.
    rope = T * ((A + 2 * K) * e + (A + K) * (8 if e == 4 else 12))
    if way.kernels:
        # q k v, rotated where they are unless they come in parts; the answers.
        rotated = 0 if over else A + 2 * K
        attention = T * ((A + 2 * K) + rotated + A) * e + _decode_parts(config, decodes)
    else:
        # q k v, rotated, keys and values as they are written, the answers in parts and joined.
        attention = T * ((A + 2 * K) + (A + K) + 2 * K + 2 * A) * e + _plain_attention(config, way, limits)
        attention = max(attention, rope)
    if way.kv8 and not way.kernels:
        # Stored and read again, in float32 in between.
        attention += T * 2 * K * 12
    # Over many rows the answers of products are written over the layer's input.
    o_proj = T * ((A + 2 * K) + (0 if over else A + K + H) + A) * e
    o_proj += _int4(way, T, H, A)
    if over and way.int4 == "words":
        # All gates, some columns of what they gate, written over the gates.
        mlp = T * I * e + max(T * up_columns(T, I) * e, _int4(way, T, H, I))
    else:
        # The rows that go through together.
        some = mlp_rows(T) if over and way.int4 is None else T
        gate_up = some * 2 * I * e + _int4(way, some, 2 * I, H)
        # On CUDA written over the gates, where it lies to the end.
        silu = some * (2 if way.cuda else 4) * I * e
        down = some * ((2 if way.cuda else 1) * I + (0 if over else H)) * e + _int4(way, some, H, I)
        mlp = max(gate_up, silu, down)
    qkv = T * (A + 2 * K) * e + _int4(way, T, A + 2 * K, H)
    # A graph's inputs are counted beside it.
    index = 0 if graph else _index(limits, way)
    return base + max(norm, qkv, attention, o_proj, mlp) + index + wide * MIB // 4


def _plain_attention(config: ModelConfig, way: Way, limits: Limits) -> int:
    """Masks, and what torch's own attention makes, in `engine.attention.PagedAttention`."""
    text, e = config.text, way.itemsize
    # True or false, and again in the dtype that is added; on CUDA once more, aligned.
    values = min(MASK_VALUES, limits.tokens * limits.context)
    mask = values * (1 + (2 if way.cuda else 1) * e)
    # Masks of decodes lie there for all layers; `zeros`, `beyond` and the filled one.
    decode_masks = limits.seqs * limits.context * (e + 1)
    lse = limits.tokens * text.num_attention_heads * 4
    # A CPU may lay keys and values out anew for its matrix units.
    packed = 0 if way.cuda or e == 4 else 2 * limits.context * _widths(config)[1] * e
    return mask + decode_masks + lse + packed + _flash(way, text.head_dim)


def _decode_parts(config: ModelConfig, decodes: int) -> int:
    """Partial sums of decodes whose context is read in parts, in float32: as many as fill the device, or a graph's."""
    text = config.text
    rows = max(2 * 264 // text.num_key_value_heads, decodes * STEP_GRAPH_PARTS)
    return rows * text.num_attention_heads * (text.head_dim + 2) * 4


def _logits(config: ModelConfig, way: Way, limits: Limits) -> tuple[int, int]:
    """(while they are computed, while tokens are chosen from them)."""
    text, e = config.text, way.itemsize
    hidden = limits.tokens * text.hidden_size * e
    values = limits.seqs * text.vocab_size
    rows = limits.seqs * text.hidden_size * e

    def at_once(most: int) -> int:
        return min(values, max(most, text.vocab_size))

    choosing = (
        CHOICE_BYTES * at_once(CHOICE_LOGITS)
        + max(
            SORT_BYTES * at_once(SORTED_LOGITS),
            NOISE_BYTES * at_once(NOISE_LOGITS_CUDA if way.cuda else NOISE_LOGITS),
        )
        + limits.seqs * 16384
    )
    # Of few rows the kernel makes float32.
    made = max(e * values, 4 * min(limits.seqs, 16) * text.vocab_size)
    return 2 * hidden + rows + made + _index(limits, way) + MIB // 4, hidden + made + choosing + MIB // 4


def _prompt_logprobs(config: ModelConfig, way: Way, limits: Limits) -> int:
    """Their logits a piece at a time, beside the hidden states and the step's own logits."""
    text, e = config.text, way.itemsize
    hidden = limits.tokens * text.hidden_size * e
    piece = min(limits.tokens * text.vocab_size, max(PROMPT_LOGITS, text.vocab_size))
    # Their log-probabilities, which are above the token's own, and those counted in int64; or the logits, twice.
    return hidden + e * limits.seqs * text.vocab_size + piece * 14 + MIB // 4


def _int4(way: Way, rows: int, out: int, width: int) -> int:
    """What a product takes beside its result: a part of an int4 matrix in the model's dtype, or parts of sums."""
    e = way.itemsize
    if way.kernels and rows <= (FEW_ROWS if way.int4 == "words" else 16):
        # Sums of programs that share the inputs; a gate's are not parted.
        parts = PARTS if rows <= 16 else 9 if rows <= 64 else 4
        if out < 2 * width:
            return parts * rows * out * 4
        return 2 * rows * out * 4 if rows <= 16 else SHARED_TILES
    if way.kernels and way.int4 is None and rows <= WIDE_ROWS and out < 2 * width:
        return WIDE_PARTS * rows * out * 4
    if way.kernels and way.int4 == "words" and rows <= INT4_ROWS and out < 2 * width:
        return max(INT4_PARTS_ROWS * out * 4, rows * out * e)
    if way.int4 is None or (way.kernels and way.int4 == "words"):
        return 0
    if way.int4 == "cpu" and rows <= FEW_ROWS_CPU:
        return 0
    part = unpacked_rows(out, width) if way.int4 == "cpu" else dense_rows(out, width, way.kernels)
    # From bytes: nibbles apart and together, less their zero points, times their scales.
    each = max(2, 1 + 2 * e)
    return part * (width * each + (0 if way.cuda else rows * e))


def _scratch(config: ModelConfig, way: Way) -> int:
    """The largest part of a decoder's int4 matrix that is dense (`huoyan.layers.int4`)."""
    text = config.text
    H, I = text.hidden_size, text.intermediate_size
    A, K = _widths(config)
    shapes = ((A + 2 * K, H), (H, A), (2 * I, H), (H, I))
    return max(dense_rows(out, width, True) * width for out, width in shapes) * way.itemsize


def _flash(way: Way, head_dim: int) -> int:
    """Buffers of torch's attention on a CPU: a tile of 256 queries by 512 keys for each thread."""
    return 0 if way.cuda else way.threads * (256 * (512 + head_dim + 2) * (4 + way.itemsize))


def _index(limits: Limits, way: Way) -> int:
    """Ids, positions, slots, tables: int64, once as they come and once cut or reshaped."""
    if way.kernels:
        # Sent together as int32; ids, and the slots of what is gathered, apart.
        return 64 * limits.tokens + 8 * limits.seqs * (8 + _blocks(limits))
    return 16 * (8 * limits.tokens + limits.seqs * (8 + 2 * _blocks(limits)))


def _blocks(limits: Limits) -> int:
    return -(-limits.context // limits.block_size)


def _widths(config: ModelConfig) -> tuple[int, int]:
    """(all query heads, all key heads)."""
    text = config.text
    return text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
