"""The trainer of `tiny`: what it feeds the model is what the product feeds it, and the model learns from it."""

from __future__ import annotations

import pickle
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from huoyan.media.picture import Picture
from huoyan.media.slicing import read_slice_rules
from huoyan.media.types import MediaItem
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.patches import normalise
from huoyan.models.resampler import GridPositions
from huoyan.models.siglip import position_ids
from huoyan.models.weights import load_model, published_state
from huoyan.prompt.messages import MediaPart, Message, TextPart
from huoyan.prompt.processor import PromptProcessor
from huoyan.quantize.rounding import fake_quantize
from huoyan_training.example import CHARACTERS, CLASSES, Example, Mark
from huoyan_training.families import FAMILIES, sample
from tiny_trainer import drills, slice_attention
from tiny_trainer.attention import RowsAttention
from tiny_trainer.drawing import MARK_CLASSES, Recorder, mixture
from tiny_trainer.evaluation import evaluate
from tiny_trainer.export import export
from tiny_trainer.fixed import QUERIES, Shape
from tiny_trainer.generate import Prompted, greedy_answers
from tiny_trainer.grids import GridTables
from tiny_trainer.loop import Loop, Plan
from tiny_trainer.losses import PLAIN, compute_losses, see
from tiny_trainer.optimizer import orthogonalise
from tiny_trainer.pictures import CHANNELS, paint
from tiny_trainer.pool import Pool
from tiny_trainer.schedule import family_weights, in_four_bits, learning_rate_scale
from tiny_trainer.scoring import exact, facts, score
from tiny_trainer.sequences import SequenceBuilder
from tiny_trainer.shape import write_configs
from tiny_trainer.slice_attention import SliceAttention
from tiny_trainer.state import load_state, save_state
from tiny_trainer.stepper import WAYS, Stepper, compare_gradients
from tiny_trainer.trainer import Trainer
from tiny_trainer.workers import PIXELS, Delivery, Workers

SMALL = Shape(patches=1664, slices=9, rows=((2, 1024),))
ROOMY = Shape(patches=3072, slices=12, rows=((2, 1024),))
"""For any example with one picture, ten slices of it at most."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from huoyan_training.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(folder, n_examples=250)
    write_configs(folder)
    return folder


@pytest.fixture(scope="module")
def recorder(folder):
    return Recorder(SequenceBuilder(folder, read_slice_rules(folder)))


@pytest.fixture(scope="module")
def trainer(folder, recorder):
    return make_trainer(folder, recorder)


def make_trainer(folder, recorder, **changes):
    arguments = {
        "classes": MARK_CLASSES, "families": list(mixture()), "slot_id": recorder.builder.slot_id,
        "device": torch.device("cpu"), "dtype": torch.float32, "seed": 3, "matrix_lr": 6e-3, "adam_lr": 3e-3,
    }  # fmt: skip
    return Trainer(folder, **{**arguments, **changes})


def in_pool(records, seed=0):
    pool = Pool(4096, PIXELS, CHANNELS, torch.device("cpu"), seed)
    # The first rows, which padding reads, hold anything; it must not matter.
    pool.head = 300
    pool.patches.random_(0, 256)
    pool.marks.random_(0, 256)
    patches, marks = (np.concatenate([getattr(r, name) for r in records]) for name in ("patches", "marks"))
    pool.add(Delivery(records, -1, patches, marks), Workers(0, lambda *_: records[0], {"x": 1.0}, seed))
    return pool


def staged(trainer, pool, shape=SMALL):
    """A stepper with all of the pool's examples in its batch."""
    stepper = Stepper(trainer, pool, shape, lambda line: None)
    fill(trainer, stepper, pool)
    stepper.inputs.copy_(stepper.stages[0])
    return stepper


def fill(trainer, stepper, pool):
    packer = trainer.packer(stepper.shape)
    packer.begin(stepper.stage())
    assert all(packer.add(kept) for kept in pool.order)
    packer.finish()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_tokens_are_the_prompts_of_the_product(family, folder, recorder, seed):
    processor = PromptProcessor.from_folder(folder)
    example = sample(np.random.default_rng(seed), family, "train")
    record = recorder.encode(example, family)
    pictures = [Picture(p) for p in example.pictures]
    if example.kind == "video":
        limit = 2 if len(pictures) <= 16 else 1
        items = [MediaItem(tuple(pictures), "video", max_slice_nums=limit, use_image_id=False)]
    else:
        items = [MediaItem((picture,)) for picture in pictures]
    plans = recorder.cut(example).plans
    first = recorder.builder.beginning(plans, example.kind)
    for number, (question, answer) in enumerate(example.turns, 1):
        parts = (*(MediaPart(item) for item in items), TextPart(question))
        prompt = processor.from_messages([Message("user", parts)])
        own = record.branch == number
        ids = [*record.ids[record.branch == 0], *record.ids[own]]
        asked = len(prompt.token_ids)
        assert ids[:asked] == list(prompt.token_ids)
        assert recorder.builder.decode(ids[asked:]) == answer
        assert ids[-1] == recorder.builder.stop_id
        assert list(record.positions[record.branch == 0]) + list(record.positions[own]) == list(
            range(len(ids))
        )
        # Trained is what is predicted from the last token of the prompt on.
        trained = np.flatnonzero(record.weights[own] > 0) + len(first)
        assert list(trained) == list(range(asked - 1, len(ids) - 1))
    assert sum(r * c for r, c in record.grids) == len(record.patches) == len(record.marks)


def test_a_bare_video_placeholder_is_trained_too(folder, recorder, seed):
    processor = PromptProcessor.from_folder(folder)
    example = sample(np.random.default_rng(seed), "motion", "train")
    record = recorder.encode(example, "motion", between="")
    video = MediaItem(
        tuple(Picture(p) for p in example.pictures), "video", max_slice_nums=2, use_image_id=False
    )
    question = example.turns[0][0]
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"(<video>./</video>)\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = processor.from_text(text, [video])
    assert list(record.ids[record.branch <= 1][: len(prompt.token_ids)]) == list(prompt.token_ids)


def test_a_conversation_is_the_products_conversation(folder, recorder, seed):
    processor = PromptProcessor.from_folder(folder)
    example = sample(np.random.default_rng(seed), "what", "train")
    record = recorder.encode(example, "what", conversation=True)
    messages = []
    for number, (question, answer) in enumerate(example.turns):
        pictures = [MediaPart(MediaItem((Picture(example.pictures[0]),)))] if number == 0 else []
        messages.append(Message("user", (*pictures, TextPart(question))))
        messages.append(Message("assistant", (TextPart(answer),)))
    whole = processor.from_messages(messages, add_generation_prompt=False).token_ids
    assert list(whole[: len(record.ids)]) == list(record.ids)
    assert set(record.branch) <= {0, 1}


def test_branches_compute_what_separate_sequences_do(trainer, recorder, seed):
    """Of two examples in one batch, one of them with a branch for each of its questions."""
    example = sample(np.random.default_rng(seed), "colour", "heldout")
    together = recorder.encode(example, "colour")
    apart = [recorder.encode(Example(**one_turn(example, k)), "colour") for k in range(len(example.turns))]
    other = recorder.record(random.Random(seed), "chat")
    stepper = staged(trainer, in_pool([other, together]), ROOMY)
    with torch.no_grad():
        pixels = normalise(torch.from_numpy(together.patches), (0.5,) * 3, (0.5,) * 3, torch.float32)
        embeddings = trainer.model.encode_patches(pixels, together.grids).flatten(0, 1)
        rows = hidden_of(trainer, stepper)
        own = stepper.batch.owner == 1
        for number, record in enumerate(apart, 1):
            expected = alone(trainer, record, embeddings)[record.branch == 1]
            found = rows[own & (stepper.batch.branch == number)]
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-3)


def hidden_of(trainer, stepper):
    from tiny_trainer.losses import hidden_states

    batch, shape = stepper.batch, stepper.shape
    attend = SliceAttention(batch.starts, shape.patches, QUERIES, packed=False)
    rows = batch.sources.clamp(min=0).long()[attend.slice_of] + attend.offset
    pixels = normalise(stepper.pool.patches[rows], (0.5,) * 3, (0.5,) * 3, torch.float32)
    _, embeddings = see(trainer.model, pixels, batch, trainer.tables, attend)
    return hidden_states(trainer.model, batch, shape, embeddings)


def alone(trainer, record, embeddings):
    """Hidden states of one record's tokens, by the model's own modules."""
    x = trainer.model.embed(torch.from_numpy(record.ids).long())
    x[torch.from_numpy(record.ids == trainer.slot_id)] = embeddings
    length = len(record.ids)
    none = torch.zeros(length, dtype=torch.int32)
    attend = RowsAttention(none, none, ((1, length),), torch.float32)
    return trainer.model.decoder(x, torch.from_numpy(record.positions).long(), attend)


def one_turn(example, k):
    return {
        "pictures": example.pictures, "kind": example.kind, "turns": example.turns[k : k + 1], "tasks": ["x"],
        "languages": ["en"], "marks": example.marks,
    }  # fmt: skip


def test_a_batch_holds_what_was_put_in_and_says_when_it_is_full(trainer, recorder, seed):
    rng = random.Random(seed)
    records = [recorder.record(rng, family) for family in ("what", "chat", "drill", "two", "exists") * 3]
    shape = Shape(patches=2624, slices=14, rows=((3, 512), (2, 1024)))
    packer = trainer.packer(shape)
    stepper = Stepper(trainer, in_pool(records[:2]), shape, lambda line: None)
    packer.begin(stepper.stage())
    starts = np.cumsum([0, *(len(r.patches) for r in records)])
    from tiny_trainer.pool import Kept

    taken = [
        (record, start)
        for record, start in zip(records, starts, strict=False)
        if packer.add(Kept(record, int(start), len(record.patches)))
    ]
    packer.finish()
    assert 3 < len(taken) < len(records)
    stepper.inputs.copy_(stepper.stages[0])
    batch = stepper.batch
    assert batch.starts[0] == 0
    assert batch.starts[-1] == shape.patches
    assert (batch.starts.diff() >= 1).all()
    sources = [at for r, start in taken for at in start + np.cumsum([0, *(a * b for a, b in r.grids)])[:-1]]
    assert batch.sources.tolist() == sources + [-1] * (shape.slices - len(sources))
    slots = iter(batch.slots.unflatten(0, (shape.slices, QUERIES)).tolist())
    for number, (record, _) in enumerate(taken):
        own = batch.owner == number
        for name in ("ids", "positions", "branch", "weights"):
            assert getattr(batch, name)[own].tolist() == getattr(record, name).tolist()
        expected = (own & (batch.ids == trainer.slot_id)).nonzero().flatten().tolist()
        assert [place for _ in record.grids for place in next(slots)] == expected
    assert all(place == shape.tokens for rest in slots for place in rest)
    assert (batch.weights[batch.owner < 0] == 0).all()


def test_slices_of_a_batch_are_seen_as_the_model_sees_them(trainer, recorder, seed):
    rng = random.Random(seed)
    records = [recorder.record(rng, family) for family in ("two", "exists")]
    records = [r for r in records if len(r.patches) < 700]
    stepper = staged(trainer, in_pool(records))
    batch, total = stepper.batch, sum(len(r.patches) for r in records)
    attend = SliceAttention(batch.starts, SMALL.patches, QUERIES, packed=False)
    pixels = torch.randn(SMALL.patches, PIXELS, generator=torch.Generator().manual_seed(seed))
    grids = [grid for r in records for grid in r.grids]
    with torch.no_grad():
        seen, embeddings = see(trainer.model, pixels, batch, trainer.tables, attend)
        expected = trainer.model.vpm(pixels[:total], grids)
        torch.testing.assert_close(seen[:total], expected, atol=1e-4, rtol=1e-3)
        looked = trainer.model.resampler(expected, grids).flatten(0, 1)
        torch.testing.assert_close(embeddings[: len(looked)], looked, atol=1e-4, rtol=1e-3)
    assert seen.isfinite().all()
    assert embeddings.isfinite().all()


def test_padding_changes_no_loss(trainer, recorder, seed):
    """Two shapes, and other pixels in the pool's rows that only padding reads."""
    records = [recorder.record(random.Random(seed), "chat"), recorder.encode(*small_example(seed))]
    found = []
    for shape in (SMALL, Shape(patches=1216, slices=6, rows=((1, 512), (1, 1024)))):
        stepper = staged(trainer, in_pool(records, seed), shape)
        with torch.no_grad():
            losses = compute_losses(
                trainer.model, trainer.heads, stepper.batch, shape, trainer.tables, stepper.pool.patches,
                stepper.pool.marks, families=len(trainer.families),
            )  # fmt: skip
        found.append([losses.answers, losses.patches, losses.queries, *losses.by_family.flatten()])
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(found[1]), atol=1e-4, rtol=1e-4)


def small_example(seed):
    """Of one slice."""
    for k in range(100):
        example = sample(np.random.default_rng(seed + k), "exists", "heldout")
        if example.pictures[0].size < 3 * 224**2:
            return example, "exists"
    raise AssertionError("no picture of one slice")


def test_an_unfinished_training_goes_on_from_its_files(folder, recorder, tmp_path):
    first, second = make_trainer(folder, recorder), make_trainer(folder, recorder, seed=4)
    save_state(first.optimizer, tmp_path, 0.5)
    assert all(file.stat().st_size < 15e6 for file in tmp_path.iterdir())
    assert load_state(second.optimizer, tmp_path) == 0.5
    for a, b in zip(first.optimizer.masters, second.optimizer.averages, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.model.resampler.proj, second.model.resampler.proj)
    later = (tmp_path / "state-1.safetensors").read_bytes()
    save_state(first.optimizer, tmp_path, 0.4)
    (tmp_path / "state-1.safetensors").write_bytes(later)
    with pytest.raises(SystemExit, match="different moments"):
        load_state(second.optimizer, tmp_path)
    (tmp_path / "state-1.safetensors").unlink()
    with pytest.raises(SystemExit, match="weights"):
        load_state(second.optimizer, tmp_path)


def test_a_way_that_fails_or_differs_is_logged_and_left(folder, recorder, monkeypatch):
    """As on a GPU where no graph can be made, torch's packed attention is missing and one kernel is wrong."""
    trainer = make_trainer(folder, recorder)
    stepper = staged(trainer, in_pool([recorder.encode(*small_example(1))]))
    lines = []
    stepper.cuda, stepper.log = True, lines.append
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(stepper, "_capture", lambda: 1 / 0)
    monkeypatch.setattr(stepper, "_check_kernels", lambda way: None)
    plain, tried = trainer.learn, []

    def learn(pool, shape, batch, rates, way):
        tried.append(way)
        if way.packed and not way.fused:
            raise NotImplementedError("no such operator")
        plain(pool, shape, batch, rates, PLAIN)
        trainer.sums[0] += way.fused

    monkeypatch.setattr(trainer, "learn", learn)
    stepper.prepare()
    assert stepper.way == PLAIN
    assert stepper.graph is None
    assert set(tried) == {PLAIN, *(way for way in WAYS if not way.graphed)}
    assert sum("fails here: ZeroDivisionError" in line for line in lines) == sum(way.graphed for way in WAYS)
    assert sum("answers is" in line for line in lines) == 1
    assert sum("no such operator" in line for line in lines) == 1


def test_a_fault_costs_neither_the_run_nor_what_was_learned(folder, recorder, trainer, tmp_path, monkeypatch):
    """A look that fails is left out; a step that fails ends the training, and its state can be saved."""
    workers = Workers(0, recorder.record, {"exists": 1.0}, 0)
    pool, lines = in_pool([recorder.encode(*small_example(1))]), []
    stepper = Stepper(trainer, pool, SMALL, lines.append)
    loop = Loop(
        trainer, stepper, trainer.packer(SMALL), workers, pool, recorder.builder, [], {"exists": 1.0},
        tokenizer_folder=folder, out=tmp_path, keep=None, log=lines.append,
    )  # fmt: skip
    for name in ("_receive", "stage"):
        monkeypatch.setattr(loop, name, lambda *_: None)
    monkeypatch.setattr(loop, "look", lambda progress: 1 / 0)
    monkeypatch.setattr(stepper, "step", lambda **_: [][0] if loop.steps == 3 else None)
    now = time.monotonic()
    loop.run(Plan(now, now + 600, 0.2, 0.6, look_every=0.0, max_steps=8))
    assert loop.steps == 3
    assert loop.reached == pytest.approx(0.2 + 0.4 * 3 / 8, abs=0.01)
    assert sum("no look this time" in line and "ZeroDivisionError" in line for line in lines) == 3
    assert sum("ends early" in line and "IndexError" in line for line in lines) == 1
    loop.save()
    assert load_state(trainer.optimizer, tmp_path) == loop.reached


def test_no_rate_no_change(folder, recorder):
    trainer = make_trainer(folder, recorder)
    before = [m.clone() for m in trainer.optimizer.masters]
    stepper = staged(trainer, in_pool([recorder.encode(*small_example(1))]))
    stepper.prepare()
    for a, b in zip(before, trainer.optimizer.masters, strict=True):
        assert torch.equal(a, b)
    assert all((t == 0).all() for t in (*trainer.optimizer.buffers.values(), *trainer.optimizer.second))


def test_a_fixed_batch_is_learned_and_the_export_answers_the_same(folder, recorder, tmp_path):
    trainer = make_trainer(folder, recorder)
    rng = random.Random(5)
    pool = in_pool([recorder.record(rng, family) for family in ("exists",)])
    stepper = Stepper(trainer, pool, SMALL, lambda line: None)
    seen = []
    for step in range(6):
        fill(trainer, stepper, pool)
        stepper.step(scale=min(1.0, (step + 1) / 2), auxiliary=1.0)
        seen.append(trainer.read_log()[0])
    assert seen[-1]["answers"] < 0.7 * seen[0]["answers"]
    assert seen[-1]["patches"] < 0.9 * seen[0]["patches"]
    assert seen[-1]["queries"] < 0.9 * seen[0]["queries"]
    export(trainer.model, folder, tmp_path / "checkpoint")
    trainer.save_heads(tmp_path)
    again = load_model(open_checkpoint(tmp_path / "checkpoint"), device="cpu", dtype=torch.float32)
    for name, value in published_state(trainer.model).items():
        assert torch.equal(value.to(torch.bfloat16).float(), published_state(again)[name]), name
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert size < 16e6
    continued = make_trainer(folder, recorder, init=tmp_path / "checkpoint")
    assert continued.heads_know > trainer.heads_know
    assert torch.equal(continued.model.resampler.proj, again.resampler.proj)
    assert torch.equal(continued.heads.read.weight, trainer.heads.read.weight.to(torch.bfloat16).float())


def test_greedy_answers_are_those_of_the_whole_sequence(trainer, recorder, seed):
    model = trainer.model
    held = [recorder.held_out(seed, family, "heldout") for family in ("what", "two", "chat")]
    prompted = [Prompted(h.prompted.patches, h.prompted.grids, h.prompted.prompts[:2]) for h in held]
    answers = greedy_answers(model, prompted, trainer.slot_id, recorder.builder.stop_id, max_tokens=5, rows=4)
    with torch.no_grad():
        for p, given in zip(prompted, answers, strict=True):
            for prompt, answer in zip(p.prompts, given, strict=True):
                ids = [*prompt, *answer]
                x = model.embed(torch.tensor(ids))
                if p.grids:
                    pixels = normalise(torch.from_numpy(p.patches), (0.5,) * 3, (0.5,) * 3, torch.float32)
                    slots = torch.tensor([i for i, t in enumerate(prompt) if t == trainer.slot_id])
                    x = x.index_copy(0, slots, model.encode_patches(pixels, p.grids).flatten(0, 1))
                none = torch.zeros(len(ids), dtype=torch.int32)
                attend = RowsAttention(none, none, ((1, len(ids)),), torch.float32)
                hidden = model.decoder(x, torch.arange(len(ids)), attend)
                logits = model.logits(hidden[len(prompt) - 1 :])
                best = logits.max(-1).values
                for k, token in enumerate(answer):
                    assert logits[k, token] >= best[k] - 1e-3


def test_looked_up_positions_are_the_models(seed):
    rng = random.Random(seed)
    grids = [(rng.randint(1, 16), rng.randint(1, 18)) for _ in range(6)]
    device = torch.device("cpu")
    tables = GridTables(32, 64, device, torch.float32)
    for rows, columns in grids:
        number, count = tables.number((rows, columns)), rows * columns
        expected = GridPositions(64)([(rows, columns)], device, torch.float32)
        assert torch.equal(tables.waves[tables.places[number, :count]], expected)
        assert torch.equal(tables.positions[number, :count], position_ids([(rows, columns)], 32))
        assert tables.near[number].max() < count
        assert tables.halves[number].max() < 2 * count


def test_marks_land_on_their_patches():
    letter = len(CLASSES) - len(CHARACTERS) + CHARACTERS.index("7")
    marks = [Mark(3, 2, (0, 0, 28, 14)), Mark(letter, 1, (42, 28, 49, 42)), Mark(5, 4, (200, 200, 220, 220))]
    grid = paint(marks, (0, 0, 56, 56), (4, 4), len(CLASSES) - len(CHARACTERS)).reshape(4, 4, CHANNELS)
    assert grid[0, :2, 0].tolist() == [3, 3]
    assert grid[0, :2, 1].tolist() == [2, 2]
    assert grid[2, 3].tolist() == [letter, 1, letter, CHARACTERS.index("7") + 1, 0]
    assert np.count_nonzero(grid[:, :, 0]) == 3


def test_drills_show_no_combination_kept_from_training(seed):
    from huoyan_training.example import COLOURS, KINDS
    from huoyan_training.splits import UNSEEN_COLOUR

    rng = random.Random(seed)
    for _ in range(5):
        for mark in drills.draw_drill(rng).marks[0]:
            name = CLASSES[mark.kind]
            assert name not in KINDS or UNSEEN_COLOUR[name] != COLOURS[mark.colour]


def test_pool_gives_back_what_was_put_in_also_after_wrapping(recorder, seed):
    rng = random.Random(seed)
    # Ids of its own tell each record, whatever was drawn; four deliveries of eight go twice around the pool.
    made = [replace(recorder.record(rng, "exists"), ids=np.array([i])) for i in range(32)]
    coming = iter(made)
    workers = Workers(0, lambda *_: next(coming), {"exists": 1.0}, 0)
    rows = 2 * 8 * max(len(record.patches) for record in made)
    pool = Pool(rows, PIXELS, CHANNELS, torch.device("cpu"), 0)
    for _ in range(4):
        pool.add(workers.take(0), workers)
    for kept in (pool.pick({"exists": 1.0}) for _ in range(6)):
        expected, own = made[int(kept.record.ids[0])], slice(kept.start, kept.start + kept.count)
        assert np.array_equal(pool.patches[own].numpy(), expected.patches)
        assert np.array_equal(pool.marks[own].numpy(), expected.marks)


def test_pool_keeps_pictures_and_questions_together_for_long(recorder, seed):
    """Many times around, with examples of no patches between: what is drawn is what was put in."""
    rng = random.Random(seed)
    made = {}
    spare = [recorder.record(rng, "exists") for _ in range(12)]
    chat = [recorder.record(rng, "chat") for _ in range(3)]

    def draw(_, family):
        # Each record has pixels of its own and says which by its ids.
        record = rng.choice(chat if rng.random() < 0.2 else spare)
        marker = len(made)
        patches = np.full_like(record.patches, marker % 251)
        made[marker] = replace(record, patches=patches, ids=np.array([marker]))
        return made[marker]

    workers = Workers(0, draw, {"exists": 1.0}, 0)
    # Room for two of the largest deliveries (of eight records), so that it wraps often.
    rows = 16 * max(len(record.patches) for record in spare)
    pool = Pool(rows, PIXELS, CHANNELS, torch.device("cpu"), seed)
    picked = []
    for _ in range(60):
        pool.add(workers.take(0), workers)
        for kept in (pool.pick(dict.fromkeys(pool.families, 1.0)) for _ in range(6)):
            patches = pool.patches[kept.start : kept.start + kept.count]
            assert (patches == int(kept.record.ids[0]) % 251).all()
            picked.append(kept)
    assert any(kept.gone for kept in picked)
    assert all(not kept.gone for kept in pool.order)


def test_what_processes_are_given_can_be_sent_to_them(recorder):
    """Once it has encoded something: held-out examples are drawn by a pool, which pickles its work."""
    builder = recorder.builder
    builder.encode("hello")
    assert pickle.loads(pickle.dumps(builder)).encode("hello") == builder.encode("hello")


def test_worker_processes_deliver_whole_records(recorder):
    workers = Workers(1, recorder.record, {"exists": 1.0, "chat": 1.0}, 7)
    try:
        delivery = workers.take(60)
    finally:
        workers.stop()
    assert delivery is not None
    assert not workers.failures
    for record in delivery.records:
        assert len(record.patches) == sum(r * c for r, c in record.grids)
    assert sum(len(r.patches) for r in delivery.records) == len(delivery.patches)


def test_orthogonalise_flattens_singular_values():
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 64, 32), (1, 32, 96)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=g)))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_a_step_may_see_the_decoder_in_four_bits(folder, recorder):
    """The step after it has the exact weights again, which moved by the gradient of the rounded ones."""
    pool = in_pool([recorder.encode(*small_example(1))])
    for known in (False, True):
        trainer = make_trainer(folder, recorder, four_bits=known)
        stepper = staged(trainer, pool)
        named = dict(trainer.model.named_parameters())
        inside = {name for name, p in named.items() if "llm.model.layers" in name and p.dim() == 2}
        masters = dict(zip(named, trainer.optimizer.masters, strict=False))
        for rounded in (1.0, 0.0, 1.0):
            before = {name: m.clone() for name, m in masters.items()}
            stepper.step(scale=1.0, auxiliary=1.0, rounded=rounded)
            fill(trainer, stepper, pool)
            for name, p in named.items():
                four = known and rounded == 1.0 and name in inside
                assert not torch.equal(masters[name], before[name])
                assert torch.equal(p, fake_quantize(masters[name], 64) if four else masters[name])
    assert in_four_bits(3, 0.8, 0.75)
    assert not any(in_four_bits(step, 0.5, 0.75) or in_four_bits(2 * step, 1.0, 0.0) for step in range(4))
    assert not in_four_bits(3, 0.999, 1.0)


def test_schedules():
    assert learning_rate_scale(0, 0.0) < 0.05
    assert learning_rate_scale(1000, 0.1) == 1.0
    assert learning_rate_scale(1000, 1.0) == 0.0
    plan = Plan(start=100.0, end=200.0, first=0.5, last=0.9, max_steps=10)
    assert plan.progress(plan.done(150.0, 0)) == pytest.approx(0.7)
    assert plan.progress(plan.done(101.0, 10)) == pytest.approx(0.9)
    shares, accuracy = {"count": 0.4, "word": 0.4, "slice": 0.2}, {"count": 0.99, "word": 0.4, "slice": 0.95}
    weights = family_weights(shares, accuracy, 0.5)
    assert weights["word"] > 2 * weights["count"]
    # No goal is set for it.
    assert weights["slice"] < 0.2
    assert family_weights(shares, {**accuracy, "slice": 0.5}, 0.5)["slice"] > weights["slice"]
    assert sum(weights.values()) == pytest.approx(1.0)


def test_gradients_may_differ_by_rounding_but_not_by_a_mistake():
    torch.manual_seed(2)
    right = [torch.randn(40, 30), torch.randn(50), torch.zeros(5)]
    noisy = [1.05 * g + 0.2 * torch.randn_like(g) for g in right]
    compare_gradients(noisy, right)
    none = torch.zeros(50)
    for wrong in (
        [noisy[0], none, right[2]], [noisy[0], -right[1], right[2]], [-noisy[0], right[1], right[2]],
        [1.3 * g for g in right], [g / 1.3 for g in right],
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="gradient"):
            compare_gradients(wrong, right)


def loop_over_slices(q, k, v, q_starts, k_starts, longest):
    """What torch's packed attention computes, in the same precision."""
    pairs = zip(
        *(t.tensor_split(s[1:-1].tolist()) for t, s in ((q, q_starts), (k, k_starts), (v, k_starts))),
        strict=True,
    )
    outs = [scaled_dot_product_attention(*(t.transpose(0, 1) for t in own)).transpose(0, 1) for own in pairs]
    assert max(len(out) for out in outs) <= longest
    return torch.cat(outs)


class LosesTheLast(torch.autograd.Function):
    """As if the kernel's backward left out the batch's last rows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat((grad[:-3], torch.zeros_like(grad[-3:])))


def test_a_mistake_of_packed_attention_is_found_and_rounding_is_not_one(monkeypatch):
    starts = torch.tensor([0, 5, 6, 100, 388, 400], dtype=torch.int32)
    sizes = (starts, 400, 8, (4, 72), (2, 32), torch.bfloat16)
    monkeypatch.setattr(slice_attention, "_packed", loop_over_slices)
    slice_attention.check(*sizes)
    for wrong in range(3):

        def mistaken(*given, wrong=wrong):
            own = [LosesTheLast.apply(t) if i == wrong else t for i, t in enumerate(given[:3])]
            return loop_over_slices(*own, *given[3:])

        monkeypatch.setattr(slice_attention, "_packed", mistaken)
        with pytest.raises(AssertionError, match=f"d{'qkv'[wrong]} of attention within"):
            slice_attention.check(*sizes)


def test_the_weights_that_ways_are_compared_with_are_random_and_only_for_that(folder, recorder):
    trainer = make_trainer(folder, recorder)
    stepper = staged(trainer, in_pool([recorder.encode(*small_example(1))]))
    before = [p.detach().clone() for p in trainer.optimizer.parameters]
    with stepper._random_weights():
        for a, b in zip(before, trainer.optimizer.parameters, strict=True):
            assert torch.equal(a, b) != (a.dim() > 1)
    for a, b in zip(before, trainer.optimizer.parameters, strict=True):
        assert torch.equal(a, b)


def test_trained_heads_teach_from_the_first_step(folder, recorder, trainer, tmp_path, monkeypatch):
    weights = []
    for known in (False, True):
        pool = in_pool([recorder.encode(*small_example(1))])
        stepper = Stepper(trainer, pool, SMALL, lambda line: None)
        loop = Loop(
            trainer, stepper, trainer.packer(SMALL), Workers(0, recorder.record, {"exists": 1.0}, 0), pool,
            recorder.builder, [], {"exists": 1.0},
            tokenizer_folder=folder, out=tmp_path, keep=None, log=lambda line: None, heads_know=known,
        )  # fmt: skip
        for name in ("_receive", "stage"):
            monkeypatch.setattr(loop, name, lambda *_: None)
        monkeypatch.setattr(stepper, "step", lambda **given: weights.append(given["auxiliary"]))
        loop.run(Plan(time.monotonic(), time.monotonic() + 600, max_steps=1))
    assert weights[0] < 0.01
    assert weights[1] > 0.9


def test_scores():
    assert exact("The car is red.", "the car is red")
    assert exact("有2辆汽车", "有2辆汽车。")
    assert not exact('It says "Ab".', 'It says "AB".')
    text = "There are two red cars on the left and a person in blue at the top. The background is grass."
    assert facts(text, "en")["colour", "person", "blue"] == 1
    assert score("describe", "en", text, text) == 1.0
    assert 0.5 < score("describe", "en", text.replace("two red cars", "three red cars"), text) < 1.0
    chinese = "左上角有两辆红色的汽车，右边有一个穿蓝色衣服的人，背景是草地。"
    assert facts(chinese, "zh")["colour", "person", "blue"] == 1
    assert facts(chinese, "zh")["count", "car", "2"] == 1
    assert facts(chinese, "zh")["place", "top left"] == 1
    assert facts(chinese, "zh")["backdrop", "grass"] == 1
    assert score("describe", "zh", chinese.replace("红色", "绿色"), chinese) < 1.0


@pytest.mark.parametrize("family", ["describe", "two", "motion", "word"])
def test_a_perfect_model_scores_one_and_a_dumb_one_does_not(family, recorder, seed):
    held = [recorder.held_out(seed + k, family, split) for k, split in enumerate(("heldout", "unseen"))]
    known = {id(p): [a for _, a in h.turns] for h in held for p in (h.prompted, h.one_slice)}
    right = evaluate(held, lambda prompted: [known[id(p)] for p in prompted])
    for split in ("heldout", "unseen"):
        assert all(row["accuracy"] == 1.0 for row in right[split].values())
    wrong = evaluate(held, lambda prompted: [["" for _ in p.prompts] for p in prompted])
    assert all(row["accuracy"] == 0.0 for row in wrong["heldout"].values())
    from tiny_trainer.card import model_card

    assert "demonstration model" in model_card(right)
