"""Make `tiny` in one command: tokenizer, drawings, training, export, evaluation, model card.

    python training/train_tiny.py --out DIR [--minutes 8] [--device cuda|cpu] [--workers N] [--seed S]

DIR/checkpoint is the model in the published layout; DIR/eval.json the accuracies; DIR/log.txt what happened.
`--minutes` is everything, evaluation included. `--init CHECKPOINT` goes on from an earlier run. A training may be
cut into runs: `--to 0.5`, then `--resume DIR` (what the first left in its DIR) goes on where that stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

_START = time.monotonic()
_ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(_ROOT), str(_ROOT.parent / "src")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

_PATCH_BYTES = 588 + 5


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, eval.json and log.txt")
    p.add_argument("--minutes", type=float, default=8.0, help="time for everything, evaluation included")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    p.add_argument(
        "--workers",
        type=int,
        default=max(cores - 3, 1),
        help="drawing processes; 0 draws in line",
    )
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--init", type=Path, help="checkpoint folder to go on from (its tokenizer is kept)")
    p.add_argument("--resume", type=Path, help="folder with state-*.safetensors of a run to go on from")
    p.add_argument(
        "--from", dest="first", type=float, help="progress to start at (default: 0, or the resumed one)"
    )
    p.add_argument(
        "--to", dest="last", type=float, default=1.0, help="progress to stop at, for a later run to go on"
    )
    p.add_argument("--tokenizer", type=Path, help="folder with a tokenizer made before (saves its making)")
    p.add_argument(
        "--keep", type=Path, help="also keep checkpoint.tar, the heads, eval.json and log.txt here, all along"
    )
    p.add_argument("--batch", type=int, help="examples a step, about (default 160 on cuda, 8 on the CPU)")
    p.add_argument("--matrix-lr", type=float, default=4e-3, help="Muon's learning rate")
    p.add_argument("--adam-lr", type=float, default=1.2e-3, help="AdamW's learning rate")
    p.add_argument(
        "--four-bits-from",
        type=float,
        default=1.0,
        help="progress from which every other step sees the decoder as int4 will have it (default: never)",
    )
    p.add_argument(
        "--pool-gb", type=float, help="device memory for drawn examples (default: 40 % on cuda, 1)"
    )
    p.add_argument("--eval-examples", type=int, default=250, help="held-out examples a family and split")
    p.add_argument(
        "--eval-seconds", type=float, help="time kept for the last evaluation (default: 45 on cuda)"
    )
    p.add_argument("--auxiliary", type=float, default=1.0, help="weight of the losses that teach seeing (1)")
    p.add_argument("--look-every", type=float, default=75.0, help="seconds between looks at held-out answers")
    p.add_argument("--families", help="only these families, separated by commas (for experiments)")
    p.add_argument("--max-steps", type=int, help="stop after so many steps")
    return p.parse_args()


def run(a: argparse.Namespace) -> None:
    import random

    import torch

    from evaluate import jobs
    from huoyan.media.slicing import read_slice_rules
    from huoyan_training.families import FAMILIES
    from huoyan_training.tokenizer import train_tokenizer
    from tiny_trainer import drawing
    from tiny_trainer.drawing import HeldOutJob, Recorder, mixture
    from tiny_trainer.evaluation import evaluate, summary
    from tiny_trainer.fixed import Shape
    from tiny_trainer.loop import Log, Loop, Plan
    from tiny_trainer.pictures import CHANNELS
    from tiny_trainer.pool import Pool
    from tiny_trainer.sequences import SequenceBuilder
    from tiny_trainer.shape import write_configs
    from tiny_trainer.state import load_state
    from tiny_trainer.stepper import Stepper
    from tiny_trainer.trainer import Trainer
    from tiny_trainer.workers import PIXELS, Workers, parallel_map

    device_name = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device_name == "cuda"
    end = _START + 60 * a.minutes
    eval_seconds = a.eval_seconds if a.eval_seconds is not None else (45.0 if cuda else 0.1 * 60 * a.minutes)
    batch = a.batch or (160 if cuda else 8)
    for folder in filter(None, (a.out, a.keep)):
        folder.mkdir(parents=True, exist_ok=True)
    log = Log([folder / "log.txt" for folder in (a.out, a.keep) if folder], _START)
    log(f"device {device_name}, {a.workers} workers, batch {batch}, {vars(a)}")

    tokenizer_folder = a.out / "tokenizer"
    ready = a.init or a.tokenizer
    if ready is not None:
        shutil.rmtree(tokenizer_folder, ignore_errors=True)
        shutil.copytree(ready, tokenizer_folder, ignore=shutil.ignore_patterns("*.safetensors*", "README.md"))
    elif not (tokenizer_folder / "tokenizer.json").exists():
        tokenizer_folder.mkdir(exist_ok=True)
        train_tokenizer(tokenizer_folder)
    write_configs(tokenizer_folder)
    builder = SequenceBuilder(tokenizer_folder, read_slice_rules(tokenizer_folder))
    recorder = Recorder(builder)
    wanted = a.families.split(",") if a.families else None
    base = {name: share for name, share in mixture().items() if wanted is None or name in wanted}
    # Draw one of each here: what cannot work (a font that is missing) fails now, with its own message.
    for name in base:
        recorder.record(random.Random(a.seed), name)
    log(f"tokenizer and {len(base)} families are ready")

    families = [name for name in FAMILIES if name in base]
    held = parallel_map(HeldOutJob(recorder), jobs(families, a.eval_examples), a.workers)
    glance = [item for item in held if item.split == "heldout"]
    glance = glance[: len(families) * max(1, min(60, a.eval_examples // 4))]
    log(f"{len(held)} held-out examples drawn, {sum(len(h.turns) for h in held)} questions")

    workers = Workers(a.workers, recorder.record, base, a.seed)
    if cuda and workers.spare_cores:
        os.sched_setaffinity(0, workers.spare_cores)
    # Only now: the workers are to die of it at once. This process saves and evaluates, as after Ctrl+C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        device = torch.device(device_name)
        if not cuda:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - a.workers))
        if cuda:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.cuda.init()
            _register(workers.buffer(), log)
        if a.pool_gb is not None:
            rows = int(a.pool_gb * 1e9 / _PATCH_BYTES)
        elif cuda:
            rows = int(min(0.4 * torch.cuda.get_device_properties(0).total_memory, 60e9) / _PATCH_BYTES)
        else:
            rows = int(1e9 / _PATCH_BYTES)
        pool = Pool(rows, PIXELS, CHANNELS, device, a.seed)
        trainer = Trainer(
            tokenizer_folder,
            classes=drawing.MARK_CLASSES,
            families=list(base),
            slot_id=builder.slot_id,
            device=device,
            dtype=torch.bfloat16 if cuda else torch.float32,
            seed=a.seed,
            matrix_lr=a.matrix_lr,
            adam_lr=a.adam_lr,
            four_bits=a.four_bits_from < 1,
            init=a.init,
        )
        first = a.first or 0.0
        if a.resume is not None:
            reached = load_state(trainer.optimizer, a.resume)
            first = reached if a.first is None else a.first
            log(f"going on from {a.resume}, which had reached {reached:.1%}")
        count = sum(p.numel() for p in trainer.model.parameters())
        log(f"{count / 1e6:.2f} M parameters, {count * 2 / 1e6:.1f} MB in bfloat16")
        shape = Shape.for_examples(batch)
        stepper = Stepper(trainer, pool, shape, log)
        loop = Loop(
            trainer, stepper, trainer.packer(shape), workers, pool, builder, glance, base,
            tokenizer_folder=tokenizer_folder, out=a.out, keep=a.keep, log=log, auxiliary=a.auxiliary,
            heads_know=a.resume is not None or trainer.heads_know, four_bits_from=a.four_bits_from,
        )  # fmt: skip
        loop.fill(16 * batch if a.workers else 8, timeout=120)
        loop.stage(base)
        stepper.prepare()
        begin = time.monotonic()
        loop.predict([item.prompted for item in glance[:16]])
        log(f"first answers take {time.monotonic() - begin:.1f} s")
        begin = time.monotonic()
        plan = Plan(
            begin,
            max(end - eval_seconds, begin + 1),
            first,
            a.last,
            look_every=a.look_every,
            max_steps=a.max_steps,
        )
        log(f"training for {plan.end - begin:.0f} s, from {first:.1%} to {a.last:.1%}")
        loop.run(plan)
        loop.save()
        log(
            f"trained: {loop.steps} steps, {loop.examples} examples, {pool.received} of them different; saved"
        )
    finally:
        workers.stop()

    # In the order of `jobs`, any beginning holds as many of every family.
    if not cuda:
        held = held[: len(families) * 2 * max(1, int(a.eval_examples * 0.2))]
    report = evaluate(held, loop.predict)
    report["training"] = {
        "minutes": round((time.monotonic() - _START) / 60, 2), "steps": loop.steps, "examples_seen": loop.examples,
        "examples_drawn": pool.received, "seed": a.seed, "parameters": count, "device": _device_name(device),
        "batch": batch, "continued": a.init is not None,
    }  # fmt: skip
    loop.write("eval.json", report)
    loop.write("history.json", loop.history)
    from tiny_trainer.card import model_card

    card = model_card(report)
    (a.out / "checkpoint" / "README.md").write_text(card, encoding="utf-8")
    if a.keep is not None:
        from tiny_trainer.export import pack

        pack(a.out / "checkpoint", a.keep / "checkpoint.tar")
    log("done\n" + summary(report))


def _device_name(device) -> str:  # type: ignore[no-untyped-def]
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _register(buffer, log) -> None:  # type: ignore[no-untyped-def]
    """Let the GPU read the workers' memory directly; without it copies take a detour, nothing else."""
    import torch

    try:
        result = torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)
    except (RuntimeError, AttributeError, TypeError) as error:
        result = error
    if not str(result).endswith(("success", "0")):
        log(f"the workers' memory is not registered with CUDA ({result}): copies are slower")
        # The failed call would otherwise be reported by whichever operator comes next.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")


if __name__ == "__main__":
    run(parse_arguments())
