"""Activation-aware weight quantization of one decoder layer (Lin et al. 2023, arXiv:2306.00978).

Inputs that matter (large activations) are scaled up before rounding, and the operation before is scaled down
by the same amount, which changes nothing in float. How much is searched for on calibration activations: the
scale of channel c is `mean|x_c| ** a / mean|w_c| ** (1 - a)`, for the exponent `a` of a grid whose quantized
output is nearest the float one. Then each group's range is shrunk where that lowers the error of its products.
Where rounding is compensated nothing is shrunk, and a scale must lower the error of compensated rounding too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from huoyan.layers.int4 import Int4Weight
from huoyan.layers.rope import RotaryTable
from huoyan.models.qwen2 import DecoderLayer
from huoyan.quantize.causal import CausalAttention
from huoyan.quantize.compensate import compensated, compensated_error, damp_, gram
from huoyan.quantize.rounding import fake_quantize, group_range, round_to_int4

GRID = 20
"""Exponents tried for each scale."""
SHRINKS = tuple(1 - i / 20 for i in range(10))
"""Shares of a group's range tried, from all of it to a bit more than half."""
SEARCH_TOKENS = 4096
"""Tokens the scale search compares outputs on, at most: sizes of channels are taken over all of them."""
CHECKED_OUTPUTS = 256
"""Outputs of a matrix whose compensated error says whether a scale helps, at most: each is rounded by itself."""
MODULES = {
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
"""What of a layer can be quantized, by the names of our modules. Stacked matrices go together."""
_CHUNK_VALUES = 2**27
Helps = Callable[[Tensor, Tensor, Tensor], bool]
"""Told a matrix, its inputs and a scale of them, says whether the scale is worth taking."""


@dataclass(frozen=True)
class AwqOptions:
    """`method` "rtn" rounds only; "awq" searches scales, and clips where `clip`. `modules` are of MODULES.

    `compensate` rounds so that later inputs make up for earlier ones (see `huoyan.quantize.compensate`), with
    the inputs that the quantized layers before give. Nothing is clipped then: the scales are fitted afterwards, and
    with both the answers came out further from the float model's. Channels are scaled only where that helps this
    rounding: most others make up for large inputs already, for which scaling is there.
    """

    group_size: int = 128
    method: str = "awq"
    clip: bool = True
    compensate: bool = False
    modules: tuple[str, ...] = tuple(MODULES)

    @property
    def clips(self) -> bool:
        return self.clip and self.method == "awq" and not self.compensate


@dataclass
class QuantizedLayer:
    """The quantized matrices of a layer, and what is said of them."""

    weights: dict[str, Int4Weight]
    """By the names of our parameters without `.weight`, e.g. "mlp.down_proj"."""
    scale_exponents: dict[str, float]


class LayerInputs:
    """Calibration hidden states x [T, hidden] of sequences packed end to end, with their lengths."""

    def __init__(self, x: Tensor, lengths: Sequence[int], rotary: RotaryTable) -> None:
        self.x = x
        self.lengths = list(lengths)
        self._rotary = rotary
        positions = torch.cat([torch.arange(n) for n in lengths]).to(x.device)
        self.turns = rotary.lookup(positions)
        self.attend = CausalAttention(lengths)

    def run(self, layer: DecoderLayer) -> Tensor:
        """The layer's outputs [T, hidden]."""
        out, residual = layer(0, self.x, None, self.turns, self.attend)
        if out.dim() == 3:
            # Of few tokens on a GPU the MLP leaves parts to be summed: see `Linear.parts`.
            out = out.sum(0).to(residual.dtype)
        total: Tensor = out + residual
        return total

    def some(self, tokens: int) -> LayerInputs:
        """Whole sequences spread over all of them, as many as have `tokens` tokens together, at least one."""
        if len(self.x) <= tokens:
            return self
        step = math.ceil(len(self.x) / tokens)
        chosen: list[int] = []
        for i in [i for first in range(step) for i in range(first, len(self.lengths), step)]:
            if not chosen or sum(self.lengths[k] for k in chosen) + self.lengths[i] <= tokens:
                chosen.append(i)
        parts = self.x.split(self.lengths)
        chosen.sort()
        return LayerInputs(
            torch.cat([parts[i] for i in chosen]), [self.lengths[i] for i in chosen], self._rotary
        )


@torch.inference_mode()
def quantize_layer(
    layer: DecoderLayer,
    inputs: LayerInputs,
    options: AwqOptions,
    quantized: LayerInputs | None = None,
    weights: Tensor | None = None,
) -> QuantizedLayer:
    """Quantize the layer's matrices. The layer itself is changed: scaled (which keeps its function), and its
    matrices replaced by what the integers stand for.

    Args:
        layer: float weights on the device of the inputs.
        inputs: what the layer sees during calibration.
        quantized: what it will see after the quantized layers before it, for the same tokens; by default `inputs`.
        weights: [T], how much a token counts where rounding is compensated; by default all count alike.
    """
    exponents: dict[str, float] = {}
    shrinks: dict[str, Tensor] = {}
    if options.method == "awq":
        helps = partial(scale_helps, group_size=options.group_size, weights=weights)
        _search_scales(layer, inputs, options, exponents, helps if options.compensate else None)
        if options.clips:
            shrinks = _search_clips(layer, inputs, options)
    rounded = {}
    for name in (MODULES[module] for module in options.modules):
        linear = layer.get_submodule(name)
        dense = linear.get_parameter("weight")
        if options.compensate:
            products = damp_(gram(_module_inputs(layer, quantized or inputs, name), weights))
            weight = compensated(dense, products, options.group_size)
        else:
            weight = round_to_int4(dense.float(), options.group_size, shrinks.get(name))
        dense.copy_(weight.dequantize())
        rounded[name] = weight
    return QuantizedLayer(rounded, exponents)


def _search_scales(
    layer: DecoderLayer,
    inputs: LayerInputs,
    options: AwqOptions,
    exponents: dict[str, float],
    helps: Helps | None,
) -> None:
    """Scale each chosen matrix's inputs up, and the operation before it down by as much."""
    attention, mlp = layer.self_attn, layer.mlp
    best_scale = partial(_best_scale, group_size=options.group_size, helps=helps)
    few = inputs.some(SEARCH_TOKENS)

    if "qkv" in options.modules:
        normed, normed_few = layer.input_layernorm(inputs.x), layer.input_layernorm(few.x)
        scale, exponents["qkv"] = best_scale(
            attention.qkv_proj.weight,
            normed,
            lambda: attention(0, normed_few, few.turns, few.attend),
        )
        attention.qkv_proj.weight.mul_(scale)
        layer.input_layernorm.weight.div_(scale)

    if "o" in options.modules:
        seen = _attention_output(layer, inputs)
        seen_few = spread(seen, SEARCH_TOKENS)
        o_weight = attention.o_proj.weight
        shared = _over_head_groups(attention.heads, attention.kv_heads, attention.head_dim)
        scale, exponents["o"] = best_scale(o_weight, seen, lambda: seen_few @ o_weight.T, shared=shared)
        o_weight.mul_(scale)
        per_value = scale.view(attention.kv_heads, -1, attention.head_dim)[:, 0].flatten()
        first = attention.qkv_proj.weight.shape[0] - per_value.numel()
        attention.qkv_proj.weight[first:].div_(per_value.unsqueeze(1))
        assert attention.qkv_proj.bias is not None
        attention.qkv_proj.bias[first:].div_(per_value)

    if not {"gate_up", "down"} & set(options.modules):
        return
    h = inputs.x + _attend(layer, inputs)
    if "gate_up" in options.modules:
        normed_mlp = layer.post_attention_layernorm(h)
        mlp_few = spread(normed_mlp, SEARCH_TOKENS)
        scale, exponents["gate_up"] = best_scale(mlp.gate_up_proj.weight, normed_mlp, lambda: mlp(mlp_few))
        mlp.gate_up_proj.weight.mul_(scale)
        layer.post_attention_layernorm.weight.div_(scale)

    if "down" in options.modules:
        inner = _inner(layer, h)
        inner_few = spread(inner, SEARCH_TOKENS)
        down = mlp.down_proj.weight
        scale, exponents["down"] = best_scale(down, inner, lambda: inner_few @ down.T)
        down.mul_(scale)
        mlp.gate_up_proj.weight[scale.numel() :].div_(scale.unsqueeze(1))


def spread(x: Tensor, count: int) -> Tensor:
    """At most `count` rows of x, evenly over all of them."""
    return x[:: math.ceil(len(x) / count)]


def _attend(layer: DecoderLayer, inputs: LayerInputs) -> Tensor:
    out: Tensor = layer.self_attn(0, layer.input_layernorm(inputs.x), inputs.turns, inputs.attend)
    return out


def _inner(layer: DecoderLayer, h: Tensor) -> Tensor:
    """What down_proj sees, from the residual stream before the MLP."""
    gate, up = layer.mlp.gate_up_proj(layer.post_attention_layernorm(h)).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _over_head_groups(heads: int, kv_heads: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    """Query heads that read the same value head must share its scale: average over them."""

    def shared(channels: Tensor) -> Tensor:
        grouped = channels.view(kv_heads, heads // kv_heads, head_dim)
        return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)

    return shared


def _best_scale(
    weight: Tensor,
    x: Tensor,
    output: Callable[[], Tensor],
    group_size: int,
    shared: Callable[[Tensor], Tensor] = lambda channels: channels,
    helps: Helps | None = None,
) -> tuple[Tensor, float]:
    """The per-input scale whose quantized `output()` is nearest the float one, and its exponent.

    `output` computes from whatever `weight` holds; the weight is restored before returning. Scales of 1 (no
    scaling, exponent -1) are always among the candidates, so the result is never worse than plain rounding. They
    are taken too where `helps` refuses the best.
    """
    original = weight.clone()
    target = output().float()
    x_size = shared(torch.linalg.vector_norm(x, ord=1, dim=0, dtype=torch.float32) / len(x))
    grouped = original.float().abs().unflatten(1, (-1, group_size))
    w_size = shared((grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-9)).flatten(1).mean(0))
    best_error = float("inf")
    best = torch.ones_like(x_size)
    best_exponent = 0.0
    candidates: list[tuple[float, Tensor]] = [(-1.0, torch.ones_like(x_size))]
    for step in range(GRID):
        a = step / GRID
        scale = (x_size.clamp(min=1e-4) ** a / (w_size ** (1 - a) + 1e-4)).clamp(min=1e-4)
        candidates.append((a, scale / (scale.amax() * scale.amin()).sqrt()))
    for a, scale in candidates:
        s = scale.to(weight.dtype)
        weight.copy_(fake_quantize(original * s, group_size) / s)
        error = float((output().float() - target).square().mean())
        if error < best_error:
            best_error, best, best_exponent = error, scale, a
    weight.copy_(original)
    best = best.to(weight.dtype)
    if helps is not None and best_exponent >= 0 and not helps(original, x, best):
        return torch.ones_like(best), -1.0
    return best, best_exponent


def scale_helps(
    weight: Tensor, x: Tensor, scale: Tensor, group_size: int, weights: Tensor | None = None
) -> bool:
    """Whether the products of weight [out, in] with x [T, in] lose less to compensated rounding where the inputs are
    scaled up by `scale` [in] in the weight, and down in x.

    Args:
        weights: [T], how much a token counts; by default all count alike.
    """
    some = spread(weight, CHECKED_OUTPUTS).float()
    factor = scale.float()
    products = gram(x, weights)
    before = compensated_error(some, products, group_size)
    products.div_(factor).div_(factor.unsqueeze(1))
    return compensated_error(some * factor, products, group_size) < before


def _attention_output(layer: DecoderLayer, inputs: LayerInputs) -> Tensor:
    """What o_proj sees: [T, heads * head_dim]."""
    return _module_inputs(layer, inputs, MODULES["o"])


class _Seen(Exception):
    """Ends a forward where it has come far enough."""


def _module_inputs(layer: DecoderLayer, inputs: LayerInputs, name: str) -> Tensor:
    """What the linear map called `name` multiplies, as the layer is now: [T, in]."""
    seen: list[Tensor] = []

    def stop(_: object, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _Seen

    hook = layer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        inputs.run(layer)
    except _Seen:
        pass
    finally:
        hook.remove()
    return seen[0]


def _search_clips(layer: DecoderLayer, inputs: LayerInputs, options: AwqOptions) -> dict[str, Tensor]:
    """Shrinks for every chosen matrix but q and k, whose products are too sensitive (as in the paper's code)."""
    attention, mlp = layer.self_attn, layer.mlp
    group_size = options.group_size
    seen = _attention_output(layer, inputs)
    h = inputs.x + attention.o_proj(seen)
    shrinks = {}
    if "qkv" in options.modules:
        values = attention.kv_heads * attention.head_dim
        qkv = attention.qkv_proj.weight
        untouched = torch.ones(qkv.shape[0] - values, qkv.shape[1] // group_size, device=qkv.device)
        of_values = best_shrink(qkv[-values:], layer.input_layernorm(inputs.x), group_size)
        shrinks["qkv"] = torch.cat([untouched, of_values])
    if "o" in options.modules:
        shrinks["o"] = best_shrink(attention.o_proj.weight, seen, group_size)
    if "gate_up" in options.modules:
        shrinks["gate_up"] = best_shrink(
            mlp.gate_up_proj.weight, layer.post_attention_layernorm(h), group_size
        )
    if "down" in options.modules:
        shrinks["down"] = best_shrink(mlp.down_proj.weight, _inner(layer, h), group_size)
    return {MODULES[module]: shrink for module, shrink in shrinks.items()}


def best_shrink(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """For each group, the share of its range whose quantized products with x are nearest the float ones.

    weight [out, in], x [T, in] -> [out, in / group_size]. The error of a row's group is d G d', where d is what
    quantizing changes and G = x'x / T of the group's inputs, so that its cost does not grow with T.
    """
    gram = group_gram(x, group_size)
    rows = max(_CHUNK_VALUES // weight.shape[1], 1)
    parts = []
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        low, _ = group_range(part, group_size)
        best_error = torch.full_like(low, float("inf"), dtype=torch.float32)
        best = torch.ones_like(best_error)
        for share in SHRINKS:
            shrink = torch.full_like(best, share)
            change = fake_quantize(part, group_size, shrink).float() - part.float()
            grouped = change.unflatten(1, (-1, group_size)).transpose(0, 1)
            error = (torch.bmm(grouped, gram) * grouped).sum(-1).T
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, shrink, best)
        parts.append(best)
    return torch.cat(parts)


def group_gram(x: Tensor, group_size: int) -> Tensor:
    """Mean products of the inputs of each group: x [T, in] -> float32 [in / group_size, group_size, group_size]."""
    groups = x.shape[1] // group_size
    gram = torch.zeros(groups, group_size, group_size, device=x.device)
    for part in x.split(max(_CHUNK_VALUES // x.shape[1], 1)):
        grouped = part.float().unflatten(1, (groups, group_size)).transpose(0, 1)
        gram.baddbmm_(grouped.transpose(1, 2), grouped)
    return gram / len(x)
