"""The model, its optimizer and one training step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from huoyan.layers.linear import Linear
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.config import read_model_config
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.resampler import CrossAttention
from huoyan.models.weights import build_model, load_model
from tiny_trainer.auxiliary import AuxiliaryHeads, Classes
from tiny_trainer.fixed import FixedBatch, Packer, Shape
from tiny_trainer.grids import GridTables
from tiny_trainer.initial import initialise
from tiny_trainer.losses import Way, compute_losses
from tiny_trainer.optimizer import Optimizer
from tiny_trainer.pool import Pool

HEADS_FILE = "auxiliary.safetensors"


class Trainer:
    """Holds the model in `dtype` on `device`, its float32 masters and the auxiliary heads."""

    def __init__(
        self,
        config_folder: Path,
        *,
        classes: Classes,
        families: list[str],
        slot_id: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        matrix_lr: float,
        adam_lr: float,
        four_bits: bool = False,
        init: Path | None = None,
    ) -> None:
        torch.manual_seed(seed)
        # cuDNN's attention makes a plan for each new shape, and held-out questions come in many.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.device, self.dtype, self.slot_id = device, dtype, slot_id
        self.families = {name: i for i, name in enumerate(families)}
        if init is None:
            config = read_model_config(config_folder)
            self.model = build_model(config, seed=seed)
            initialise(self.model, seed)
        else:
            self.model = load_model(open_checkpoint(init), device="cpu", dtype=torch.float32)
            config = self.model.config
        self.heads = AuxiliaryHeads(config.vision.hidden_size, config.text.hidden_size, classes)
        beside = [folder / HEADS_FILE for folder in ((init, init.parent) if init is not None else ())]
        known = next((file for file in beside if file.exists()), None)
        self.heads_know = known is not None
        if known is not None:
            load_heads(self.heads, known)
        # The masters are made from the float32 weights, before those are rounded to `dtype`.
        self.model.to(device).requires_grad_(True).train()
        self.heads.to(device)
        self.optimizer = Optimizer(
            _named(self.model, self.heads), matrix_lr=matrix_lr, adam_lr=adam_lr, four_bits=four_bits
        )
        for p in (*self.model.parameters(), *self.heads.parameters()):
            p.data = p.data.to(dtype)
        side = self.model.vpm.embeddings.side
        self.tables = GridTables(side, config.text.hidden_size, device, dtype)
        self.totals = torch.zeros(len(families), 2, device=device)
        self.sums = torch.zeros(5, device=device)

    def learn(self, pool: Pool, shape: Shape, batch: FixedBatch, rates: Tensor, way: Way) -> None:
        """Learn from a batch of the pool's examples. Nothing here waits for the device.

        Args:
            rates: float32 on the device, the optimizer's RATES, then the weight of the auxiliary losses.
        """
        result = compute_losses(
            self.model, self.heads, batch, shape, self.tables, pool.patches, pool.marks,
            families=len(self.families), way=way,
        )  # fmt: skip
        loss = result.answers + rates[-1] * (result.patches + result.queries)
        for p in self.optimizer.parameters:
            p.grad = None
        loss.backward()
        norm = self.optimizer.step(rates[:-1])
        self.totals += result.by_family
        parts = (result.answers, result.patches, result.queries, norm, torch.ones_like(norm))
        self.sums += torch.stack([p.detach().float() for p in parts])

    def packer(self, shape: Shape) -> Packer:
        return Packer(shape, self.tables, self.slot_id, self.families)

    def read_log(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means since the last call: of the losses, and of the answer loss of each family."""
        sums, totals = self.sums.tolist(), self.totals.tolist()
        self.sums.zero_()
        self.totals.zero_()
        names = ("answers", "patches", "queries", "grad_norm")
        steps = max(sums[-1], 1.0)
        of_family = {
            name: totals[i][0] / totals[i][1] for name, i in self.families.items() if totals[i][1] > 0
        }
        return dict(zip(names, (s / steps for s in sums[:4]), strict=True)), of_family

    def save_heads(self, folder: Path) -> None:
        """Beside the checkpoint, for a later `--init`; not part of the model."""
        from safetensors.torch import save_file

        state = {
            k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in self.heads.state_dict().items()
        }
        save_file(state, folder / HEADS_FILE)


def load_heads(heads: AuxiliaryHeads, file: Path) -> None:
    from safetensors.torch import load_file

    state: Mapping[str, Tensor] = load_file(file)
    heads.load_state_dict({k: v.float() for k, v in state.items()})


def _named(model: MiniCPMV, heads: AuxiliaryHeads) -> list[tuple[str, torch.nn.Parameter, tuple[int, ...]]]:
    """All parameters, with the heights of the matrices stacked in each."""
    modules = dict(model.named_modules())
    out = []
    for name, p in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        splits: tuple[int, ...] = ()
        if isinstance(owner, Linear) and p.dim() == 2:
            splits = owner.splits
        elif isinstance(owner, CrossAttention) and p.dim() == 2:
            splits = (p.shape[0] // 3,) * 3
        out.append((name, p, splits))
    out += [("heads." + name, p, ()) for name, p in heads.named_parameters()]
    return out
