"""Training by the clock: draw, step, look at held-out answers now and then, save, and stop in time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from tiny_trainer import schedule
from tiny_trainer.drawing import HeldOut
from tiny_trainer.evaluation import by_family, by_task
from tiny_trainer.export import export, pack
from tiny_trainer.generate import Prompted, greedy_answers
from tiny_trainer.pool import Pool
from tiny_trainer.sequences import SequenceBuilder
from tiny_trainer.trainer import Trainer
from tiny_trainer.workers import Workers

_MOST_FRESH = 20000


class Log:
    """Lines to the screen and to `log.txt`, with the seconds since the start."""

    def __init__(self, files: Sequence[Path], start: float) -> None:
        self.files: list[TextIO] = [file.open("a", encoding="utf-8") for file in files]
        self.start = start

    def __call__(self, line: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f}s] {line}"
        print(line, flush=True)
        for file in self.files:
            file.write(line + "\n")
            file.flush()


@dataclass
class Plan:
    """When things happen, in seconds of `time.monotonic()` or between two of them."""

    start: float
    end: float
    log_every: float = 10.0
    look_every: float = 60.0
    max_steps: int | None = None


@dataclass
class Loop:
    """One run. `glance` are the held-out examples that are looked at on the way."""

    trainer: Trainer
    workers: Workers
    pool: Pool
    builder: SequenceBuilder
    glance: Sequence[HeldOut]
    base_weights: dict[str, float]
    batch: int
    max_patches: int
    tokenizer_folder: Path
    out: Path
    keep: Path | None
    log: Log
    steps: int = 0
    pictures: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)

    def predict(self, prompted: Sequence[Prompted]) -> list[list[str]]:
        """Greedy answers of the averaged weights."""
        self.trainer.optimizer.show_averages()
        self.trainer.model.eval()
        answers = greedy_answers(self.trainer.model, prompted, self.trainer.slot_id, self.builder.stop_id)
        self.trainer.model.train()
        self.trainer.optimizer.show_masters()
        return [[self.builder.decode(ids) for ids in rows] for rows in answers]

    def save(self) -> None:
        """The averaged weights, as a checkpoint in `out/checkpoint` (and packed in `keep`)."""
        self.trainer.optimizer.show_averages()
        folder = self.out / "checkpoint"
        export(self.trainer.model, self.tokenizer_folder, folder)
        self.trainer.save_heads(self.out)
        self.trainer.optimizer.show_masters()
        if self.keep is not None:
            pack(folder, self.keep / "checkpoint.tar")
            self.trainer.save_heads(self.keep)

    def fill(self, examples: int, timeout: float) -> None:
        """Wait until the pool holds some examples."""
        deadline = time.monotonic() + timeout
        while self.pool.received < examples:
            if not self._take(1.0) and time.monotonic() > deadline:
                raise RuntimeError(
                    f"no examples arrive: {self.workers.failures[-1:] or 'the workers are silent'}"
                )

    def _take(self, timeout: float) -> bool:
        delivery = self.workers.take(timeout)
        if delivery is not None:
            self.pool.add(delivery, self.workers)
        return delivery is not None

    def run(self, plan: Plan) -> None:
        """Train until `plan.end` (or `plan.max_steps`). An interrupt ends the training, not the run."""
        weights = dict(self.base_weights)
        last_log = last_look = time.monotonic()
        events: list[torch.cuda.Event] = []
        cuda = self.trainer.device.type == "cuda"
        logged_pictures = logged_received = 0
        try:
            while True:
                now = time.monotonic()
                progress = (now - plan.start) / (plan.end - plan.start)
                if plan.max_steps is not None:
                    progress = max(progress, self.steps / plan.max_steps)
                if progress >= 1:
                    break
                fresh = sum(len(f.fresh) for f in self.pool.families.values())
                while fresh < _MOST_FRESH and self._take(0.0):
                    fresh += 1
                    if self.workers.count == 0:
                        break
                self.pool.release_copied(self.workers)
                kept = self.pool.draw(self.batch, self.max_patches, weights)
                self.trainer.step(
                    self.pool,
                    kept,
                    scale=schedule.learning_rate_scale(self.steps, progress),
                    auxiliary=schedule.auxiliary_scale(progress),
                )
                self.steps += 1
                self.pictures += len(kept)
                if cuda:
                    # At most two steps ahead of the device, so that the clock tells the truth.
                    event = torch.cuda.Event()
                    event.record()
                    events.append(event)
                    if len(events) > 2:
                        events.pop(0).synchronize()
                if now - last_log >= plan.log_every or self.steps == 1:
                    rates = (self.pictures - logged_pictures, self.pool.received - logged_received)
                    self._log_line(progress, rates, now - last_log)
                    logged_pictures, logged_received, last_log = self.pictures, self.pool.received, now
                if now - last_look >= plan.look_every:
                    self.look(progress)
                    weights = schedule.family_weights(self.base_weights, self.accuracy, progress)
                    self.workers.set_weights(weights)
                    last_look = time.monotonic()
        except KeyboardInterrupt:
            self.log("interrupted: saving and evaluating what there is")

    def _log_line(self, progress: float, counts: tuple[int, int], seconds: float) -> None:
        losses, of_family = self.trainer.read_log()
        used, drawn = (count / max(seconds, 1e-3) for count in counts)
        text = " ".join(f"{name} {value:.3f}" for name, value in of_family.items())
        parts = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.log(
            f"step {self.steps} {progress:.1%} | {used:.0f} used/s {drawn:.0f} drawn/s | {parts} | {text}"
        )
        self.history.append({"step": self.steps, "progress": progress, **losses, "families": of_family})
        for failure in self.workers.failures[:2]:
            self.log("a worker failed: " + failure.strip().replace("\n", " / "))
        self.workers.failures.clear()

    def look(self, progress: float) -> None:
        """Ask the few held-out questions and save."""
        begun = time.monotonic()
        answers = self.predict([item.prompted for item in self.glance])
        self.accuracy = by_family(self.glance, answers)
        tasks = by_task(self.glance, answers, "heldout")
        self.history.append({"step": self.steps, "progress": progress, "accuracy": tasks})
        self.save()
        text = " ".join(f"{task} {100 * row['accuracy']:.0f}" for task, row in tasks.items())
        self.log(f"held-out, step {self.steps}: {text} ({time.monotonic() - begun:.1f} s with saving)")
        self.write("history.json", self.history)

    def write(self, name: str, content: Any) -> None:
        """A JSON file in `out`."""
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (self.out / name).write_text(text + "\n", encoding="utf-8")
        if self.keep is not None and name == "eval.json":
            (self.keep / name).write_text(text + "\n", encoding="utf-8")
