"""Training by the clock: draw, step, look at held-out answers now and then, save, and stop in time."""

from __future__ import annotations

import json
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tiny_trainer import schedule
from tiny_trainer.drawing import HeldOut
from tiny_trainer.evaluation import by_family, by_task
from tiny_trainer.export import export, pack
from tiny_trainer.fixed import Packer
from tiny_trainer.generate import Prompted, greedy_answers
from tiny_trainer.plain import use_plain_operators
from tiny_trainer.pool import Kept, Pool
from tiny_trainer.sequences import SequenceBuilder
from tiny_trainer.state import save_state
from tiny_trainer.stepper import Stepper
from tiny_trainer.trainer import Trainer
from tiny_trainer.workers import Workers

_MOST_FRESH = 20000
_DELIVERIES = 12


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


class Spent:
    """Where the host's time goes: receiving examples, packing batches, launching and waiting for the device."""

    def __init__(self) -> None:
        self.seconds, self.steps = [0.0, 0.0, 0.0], 0

    def add(self, *seconds: float) -> None:
        self.seconds = [a + b for a, b in zip(self.seconds, seconds, strict=True)]
        self.steps += 1

    def read(self) -> str:
        """Milliseconds a step since the last call."""
        text = " ".join(f"{1000 * s / max(self.steps, 1):.1f}" for s in self.seconds)
        self.seconds, self.steps = [0.0, 0.0, 0.0], 0
        return f"{text} ms"


@dataclass
class Plan:
    """When things happen, in seconds of `time.monotonic()` or between two of them.

    A training may be cut into several runs: this one goes from `first` to `last` of its progress from 0 to 1.
    """

    start: float
    end: float
    first: float = 0.0
    last: float = 1.0
    log_every: float = 10.0
    look_every: float = 60.0
    max_steps: int | None = None

    def done(self, now: float, steps: int) -> float:
        """The share of this run that is over."""
        by_clock = (now - self.start) / (self.end - self.start)
        return by_clock if self.max_steps is None else max(by_clock, steps / self.max_steps)

    def progress(self, done: float) -> float:
        return self.first + (self.last - self.first) * done


@dataclass
class Loop:
    """One run. `glance` are the held-out examples that are looked at on the way; `heads_know` says that the auxiliary
    heads are trained already, by the run that this one goes on from."""

    trainer: Trainer
    stepper: Stepper
    packer: Packer
    workers: Workers
    pool: Pool
    builder: SequenceBuilder
    glance: Sequence[HeldOut]
    base_weights: dict[str, float]
    tokenizer_folder: Path
    out: Path
    keep: Path | None
    log: Log
    steps: int = 0
    examples: int = 0
    reached: float = 0.0
    auxiliary: float = 1.0
    heads_know: bool = False
    four_bits_from: float = 1.0
    most: int = 1024
    waiting: deque[Kept] = field(default_factory=deque)
    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    _logged: tuple[int, int, int] = (0, 0, 0)
    _spent: Spent = field(default_factory=Spent)

    def predict(self, prompted: Sequence[Prompted]) -> list[list[str]]:
        """Greedy answers of the averaged weights."""
        self.trainer.optimizer.show_averages()
        try:
            answers = self._answers(prompted)
        except Exception as error:
            self.log(
                f"answering with our kernels fails here ({type(error).__name__}: {str(error)[:200]!r}): without"
            )
            use_plain_operators()
            answers = self._answers(prompted)
        self.trainer.optimizer.show_masters()
        return [[self.builder.decode(ids) for ids in rows] for rows in answers]

    def _answers(self, prompted: Sequence[Prompted]) -> list[list[list[int]]]:
        model, slot_id = self.trainer.model, self.trainer.slot_id
        return greedy_answers(model, prompted, slot_id, self.builder.stop_id)

    def save(self) -> None:
        """The averaged weights, as a checkpoint in `out/checkpoint` (and packed in `keep`)."""
        self.trainer.optimizer.show_averages()
        folder = self.out / "checkpoint"
        export(self.trainer.model, self.tokenizer_folder, folder)
        self.trainer.save_heads(self.out)
        self.trainer.optimizer.show_masters()
        save_state(self.trainer.optimizer, self.out, self.reached)
        if self.keep is not None:
            pack(folder, self.keep / "checkpoint.tar")
            self.trainer.save_heads(self.keep)
            save_state(self.trainer.optimizer, self.keep, self.reached)

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

    def stage(self, weights: Mapping[str, float]) -> None:
        """Fill the next batch with examples of the pool."""
        packer = self.packer
        packer.begin(self.stepper.stage())
        # Examples that did not fit come first in the next batch, or large ones would come too seldom.
        chosen: list[Kept] = []
        slices = patches = 0
        while True:
            kept = self.waiting.popleft() if self.waiting else self.pool.pick(weights)
            if kept.gone:
                continue
            slices, patches = slices + len(kept.record.grids), patches + kept.count
            if len(chosen) == self.most or not packer.has_room(slices, patches):
                break
            chosen.append(kept)
        left = [k for k in sorted(chosen, key=lambda k: -len(k.record.ids)) if not packer.add(k)]
        self.waiting.extend((*left, kept))
        if packer.examples == 0:
            raise RuntimeError(
                f"an example of {len(kept.record.ids)} tokens and {kept.count} patches is too large"
            )
        packer.finish()

    def run(self, plan: Plan) -> None:
        """Train until `plan.end` (or `plan.max_steps`). An interrupt or a fault ends the training, not the run."""
        weights = dict(self.base_weights)
        last_log = last_look = time.monotonic()
        self.reached = plan.first
        try:
            while (done := plan.done(time.monotonic(), self.steps)) < 1:
                now = time.monotonic()
                progress = self.reached = plan.progress(done)
                self._receive()
                begun = time.monotonic()
                self.stage(weights)
                packed = time.monotonic()
                self.stepper.step(
                    scale=schedule.learning_rate_scale(self.steps, progress),
                    auxiliary=self.auxiliary
                    * schedule.auxiliary_scale(progress)
                    * (1.0 if self.heads_know else schedule.head_start(self.steps)),
                    rounded=float(schedule.in_four_bits(self.steps, progress, self.four_bits_from)),
                )
                self.steps += 1
                self.examples += self.packer.examples
                self._spent.add(begun - now, packed - begun, time.monotonic() - packed)
                if now - last_log >= plan.log_every or self.steps == 1:
                    self._log_line(progress, now - last_log)
                    last_log = now
                if now - last_look >= plan.look_every:
                    try:
                        self.look(progress)
                    except Exception:
                        self._log_failure("no look this time")
                        self.trainer.optimizer.show_masters()
                    weights = schedule.family_weights(self.base_weights, self.accuracy, progress)
                    self.workers.set_weights(weights)
                    last_look = time.monotonic()
        except KeyboardInterrupt:
            self.log("interrupted: saving and evaluating what there is")
        except Exception:
            self._log_failure("training ends early, saving and evaluating what there is")
        else:
            self.reached = plan.last

    def _receive(self) -> None:
        """Take what the workers have drawn, unless more is waiting than can soon be used."""
        fresh = sum(len(f.fresh) for f in self.pool.families.values())
        taken = 0
        # A few deliveries a step: many at once would let the device run dry.
        while fresh < _MOST_FRESH and taken < _DELIVERIES and self._take(0.0):
            taken += 1
            if self.workers.count == 0:
                break
        self.pool.release_copied(self.workers)

    def _log_line(self, progress: float, seconds: float) -> None:
        losses, of_family = self.trainer.read_log()
        counts = (self.steps, self.examples, self.pool.received)
        rates = [(now - then) / max(seconds, 1e-3) for now, then in zip(counts, self._logged, strict=True)]
        self._logged = counts
        text = " ".join(f"{name} {value:.3f}" for name, value in of_family.items())
        parts = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.log(
            f"step {self.steps} {progress:.1%} | {rates[0]:.1f} steps/s {rates[1]:.0f} used/s {rates[2]:.0f} drawn/s | "
            f"host {self._spent.read()} | {parts} | {text}"
        )
        self.history.append({"step": self.steps, "progress": progress, **losses, "families": of_family})
        for failure in self.workers.failures[:2]:
            self.log("a worker failed: " + failure.strip().replace("\n", " / "))
        self.workers.failures.clear()

    def _log_failure(self, what: str) -> None:
        """Of the exception at hand, in one line."""
        self.log(f"{what}: " + traceback.format_exc(limit=6).strip().replace("\n", " / "))

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
