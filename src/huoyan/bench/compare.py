"""Two checkpoints of one model side by side: speed, answer, memory, and what fits, each of them run.

The measures are those of the published recipe: input and output tokens a second are the prompt's and the answer's
tokens over the whole time of the request, as vLLM's progress bar counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from huoyan.api.ask import ask_messages
from huoyan.api.driver import Job
from huoyan.api.prompts import ChatPrompt
from huoyan.api.sampling_params import SamplingParams
from huoyan.bench.opened import Opened, opened
from huoyan.bench.requests import Requests, params
from huoyan.bench.rows import columns, median, readable
from huoyan.bench.seats import seats_for
from huoyan.engine.sizing import tensor_bytes
from huoyan.errors import CapacityError, HuoyanError
from huoyan.planning.sizes import gib

if TYPE_CHECKING:
    from huoyan.api.llm import LLM
    from huoyan.media.picture import Picture

QUESTION = "请描述这张图片"
"""The recipe's."""
_CELLS = ("beams", "greedy", "longest", "batch")
"""What is measured of a loaded model, one after the other."""
_LAST = 8
"""Tokens generated at the end of the longest context."""


@dataclass(frozen=True)
class Asked:
    """The recipe's question about one picture; medians over the repeats."""

    input_tokens: int
    output_tokens: int
    seconds: float
    first_token_s: float
    text: str

    @property
    def input_per_s(self) -> float:
        return self.input_tokens / self.seconds

    @property
    def output_per_s(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(frozen=True)
class Most:
    """The most that was run: `asked` is what the engine said would fit, `proved` what did."""

    asked: int
    proved: int
    limited_by: str
    """What it ends at: the checkpoint, the memory, or an option."""


@dataclass(frozen=True)
class Small:
    """The same with a KV cache of 8 bits."""

    kv_cache_dtype: str
    batch: Most
    kv_tokens: int


@dataclass(frozen=True)
class Column:
    """One model's cells."""

    model: str
    beams: Asked
    greedy: Asked
    model_bytes: int
    memory_source: str
    """Where `model_bytes` comes from."""
    peak_bytes: int | None
    """What torch's allocator had reserved at most at the end; None on a CPU."""
    longest: Most
    batch: Most
    kv_tokens: int = 0
    """That the cache holds."""
    small: Small | None = None

    @classmethod
    def of(cls, cells: dict[str, Any]) -> Column:
        """Of what `compare` keeps."""
        small = cells.get("small")
        if small is not None:
            small = Small(small["kv_cache_dtype"], Most(**small["batch"]), small["kv_tokens"])
        read: dict[str, Any] = {
            **{name: Asked(**cells[name]) for name in ("beams", "greedy")},
            **{name: Most(**cells[name]) for name in ("longest", "batch")},
            "small": small,
        }
        return cls(**{**cells, **read})


@dataclass(frozen=True)
class Question:
    """What is asked of every model."""

    picture: Picture
    beams: int
    max_tokens: int
    batch_length: int
    repeats: int
    seed: int


def compare(
    models: Sequence[str],
    question: Question,
    note: Callable[[str], None],
    small_kv: str | None = None,
    kept: Sequence[dict[str, Any]] | None = None,
    keep: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Column]:
    """Load, measure and close each model in its turn.

    Args:
        note: told what is being measured.
        small_kv: an 8-bit KV cache, with which the largest batch is run as well.
        kept: a dictionary for each model, which gets its cells; those that are there are not measured again.
        keep: called after each cell.
        options: of `LLM`; `gpu_memory` is the cap inside of which all of it happens. `max_num_seqs` None is as many
            as the cap holds of the batch's sequences.

    Raises:
        HuoyanError: a model cannot be opened, or the question cannot be answered.
    """
    for model, cells in zip(models, kept or [{} for _ in models], strict=True):
        # What one cell has computed must not help the next.
        own = {**options, "enable_prefix_caching": False}
        if not all(name in cells for name in _CELLS):
            before = _allocated()
            with opened(model, **seats_for(model, question.batch_length, own)) as loaded:
                _measure(loaded, question, note, before, cells, keep)
        if small_kv is not None and "small" not in cells:
            own["kv_cache_dtype"] = small_kv
            with opened(model, **seats_for(model, question.batch_length, own)) as loaded:
                note(f"{loaded.name}: the largest batch with a KV cache in {small_kv}")
                batch = _batch(loaded, loaded.llm(), Requests(question.seed), question.batch_length)
                cells["small"] = asdict(Small(small_kv, batch, _kv_tokens(loaded)))
                keep()
        yield Column.of(cells)


def _measure(
    loaded: Opened,
    question: Question,
    note: Callable[[str], None],
    before: int,
    cells: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Fill in the cells that are missing. `before`: bytes that torch's allocator had before the model was loaded."""
    engine, llm = loaded.engine, loaded.llm()
    device = engine.model.device
    if device.type == "cuda":
        model_bytes = _allocated() - before - engine.size.total_bytes
        source = "torch's allocator after loading, less the KV cache"
    else:
        model_bytes, source = tensor_bytes(engine.model), "tensors counted"
    cells.update(
        model=loaded.name, model_bytes=model_bytes, memory_source=source, kv_tokens=_kv_tokens(loaded)
    )
    requests = Requests(question.seed)
    measures: dict[str, tuple[str, Callable[[], Asked | Most]]] = {
        "beams": (
            f"beams of {question.beams} on the picture",
            lambda: _ask(loaded, llm, requests, question, question.beams),
        ),
        "greedy": ("greedy on the picture", lambda: _ask(loaded, llm, requests, question, 1)),
        "longest": (
            f"the longest context, {engine.size.max_model_len} tokens",
            lambda: _longest(loaded, llm, requests),
        ),
        "batch": ("the largest batch", lambda: _batch(loaded, llm, requests, question.batch_length)),
    }
    for name, (words, measure) in measures.items():
        if name in cells:
            continue
        note(f"{loaded.name}: {words}")
        cells[name] = asdict(measure())
        # Of several runs the most that any had.
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        cells["peak_bytes"] = max(peak, cells.get("peak_bytes") or 0) if peak is not None else None
        keep()


def _kv_tokens(loaded: Opened) -> int:
    return loaded.engine.size.num_blocks * loaded.engine.config.block_size


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _ask(loaded: Opened, llm: LLM, requests: Requests, question: Question, beams: int) -> Asked:
    search: dict[str, Any] = {"use_beam_search": True, "best_of": beams} if beams > 1 else {}
    sampling = SamplingParams(temperature=0, max_tokens=question.max_tokens, **search)
    height, width = question.picture.pixels.shape[:2]
    _finished(llm, [requests.pictures([(width, height)], sampling.clone(max_tokens=4))])
    found = []
    for i in range(question.repeats):
        loaded.engine.pictures.clear()
        prompt = ChatPrompt(ask_messages([question.picture], QUESTION))
        begun, first = time.perf_counter(), None
        for output in llm.run_jobs([Job(f"compare-{beams}-{i}", prompt, sampling)]):
            _check(output.error)
            if first is None and output.outputs and output.outputs[0].token_ids:
                first = time.perf_counter() - begun
        seconds = time.perf_counter() - begun
        answer = output.outputs[0]
        found.append(
            Asked(len(output.prompt_token_ids), len(answer.token_ids), seconds, first or seconds, answer.text)
        )
    middle = sorted(found, key=lambda one: one.seconds)[len(found) // 2]
    return Asked(
        middle.input_tokens, middle.output_tokens, median([one.seconds for one in found]),
        median([one.first_token_s for one in found]), middle.text,
    )  # fmt: skip


def _longest(loaded: Opened, llm: LLM, requests: Requests) -> Most:
    """Generate the last tokens of the longest context there is room for; where that fails, of shorter ones."""
    engine = loaded.engine
    asked = length = engine.size.max_model_len
    limit = engine.model.config.text.max_position_embeddings
    while length > _LAST + 1:
        try:
            (count,) = _finished(llm, [requests.words(length - _LAST, params(_LAST))]).values()
        except HuoyanError:
            length = length * 7 // 8
            continue
        assert count == _LAST
        break
    else:
        length = 0
    if length == limit:
        return Most(asked, length, "the checkpoint")
    option = loaded.runtime.options.max_model_len == length
    return Most(asked, length, "max_model_len" if option else "the memory")


def _batch(loaded: Opened, llm: LLM, requests: Requests, length: int) -> Most:
    """Run as many sequences of `length` tokens as there are blocks for, and see that they run at once.

    A quarter of each is generated, so that the first still run when the last has been prefilled.
    """
    engine = loaded.engine
    length = min(length, engine.size.max_model_len)
    blocks = -(-length // engine.config.block_size)
    room, seats = engine.size.num_blocks // blocks, engine.config.max_num_seqs
    asked = count = min(room, seats)
    answer = max(length // 4, 2)
    while count:
        before = engine.stats().preemptions
        jobs = [requests.words(length - answer, params(answer)) for _ in range(count)]
        try:
            together = _most_at_once(loaded, llm, jobs)
        except CapacityError:
            together = 0
        if together == count and engine.stats().preemptions == before:
            break
        count = min(count - 1, count * 15 // 16)
    limited = "the memory" if count < seats else "max_num_seqs"
    return Most(asked, count, limited)


def _most_at_once(loaded: Opened, llm: LLM, jobs: Sequence[Job]) -> int:
    """How many of `jobs` ran at the same time, all of them to their end."""
    most = 0
    for output in llm.run_jobs(jobs, concurrency=len(jobs)):
        _check(output.error)
        most = max(most, loaded.engine.stats().num_running)
    return most


def _finished(llm: LLM, jobs: Sequence[Job]) -> dict[str, int]:
    """Tokens of each job's answer."""
    counts: dict[str, int] = {}
    for output in llm.run_jobs(jobs):
        _check(output.error)
        if output.finished:
            counts[output.request_id] = len(output.outputs[0].token_ids)
    return counts


def _check(error: str | None) -> None:
    if error is not None:
        memory = "OutOfMemoryError" in error or "out of memory" in error
        raise (CapacityError if memory else HuoyanError)(error)


def cells(found: Sequence[Column], question: Question) -> list[list[str]]:
    """The table: a head, then a row a measure."""
    rows = [["", *(column.model for column in found)]]
    for name, attribute in ((f"beam {question.beams}", "beams"), ("greedy", "greedy")):
        each: list[Asked] = [getattr(column, attribute) for column in found]
        rows += [
            [f"{name}: input", *(f"{readable(one.input_per_s)} tok/s" for one in each)],
            [f"{name}: output", *(f"{readable(one.output_per_s)} tok/s" for one in each)],
            [f"{name}: time", *(f"{readable(one.seconds)} s" for one in each)],
            [f"{name}: first token", *(f"{readable(one.first_token_s)} s" for one in each)],
            [f"{name}: answer", *(_short(one.text) for one in each)],
        ]
    rows.append(["memory of the model", *(gib(column.model_bytes) for column in found)])
    if all(column.peak_bytes is not None for column in found):
        rows.append(["most memory reserved", *(gib(column.peak_bytes or 0) for column in found)])
    rows.append(["tokens of the KV cache", *(f"{column.kv_tokens:,}" for column in found)])
    rows.append(["longest context, run", *(_most(column.longest) for column in found)])
    length = question.batch_length
    rows.append([f"largest batch of {length} tokens, run", *(_most(column.batch) for column in found)])
    kinds = [column.small for column in found if column.small is not None]
    if len(kinds) == len(found):
        name = f"the same with the KV cache in {kinds[0].kv_cache_dtype}"
        rows.append([name, *(_most(small.batch) for small in kinds)])
    return rows


def text_table(found: Sequence[Column], question: Question) -> str:
    return columns(cells(found, question))


def markdown_table(found: Sequence[Column], question: Question) -> str:
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells(found, question)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _most(most: Most) -> str:
    return f"{most.proved} (ends at {most.limited_by})"


def _short(text: str, most: int = 24) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + "…"
