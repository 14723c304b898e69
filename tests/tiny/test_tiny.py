"""The embedded model: a checkpoint like any other, that really sees; and the examples that use it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import huoyan
from huoyan import LLM, SamplingParams
from huoyan.models.checkpoint import open_checkpoint

FOLDER = Path(huoyan.__file__).parent / "tiny" / "checkpoint"
MEDIA = FOLDER.parent / "media"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", max_model_len=4096)


def test_it_is_small_and_in_the_published_layout() -> None:
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    published = ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json")  # fmt: skip
    assert set(published) <= set(files)
    assert sum(files.values()) <= 16_000_000
    assert not [name for name in files if name.endswith((".py", ".bin", ".pt"))]
    checkpoint = open_checkpoint(FOLDER)
    text = checkpoint.config.text
    assert text.hidden_size % 128 == 0
    assert text.intermediate_size % 128 == 0
    assert "llm.model.layers.0.self_attn.q_proj.weight" in checkpoint.tensors
    assert "demonstration" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trust_remote_code", [True, False])
def test_transformers_loads_its_tokenizer(llm: LLM, trust_remote_code: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=trust_remote_code)
    messages = [{"role": "user", "content": "(<image>./</image>)\n请描述这张图片"}]
    ours = llm.get_tokenizer()
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == ours.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    "files, question, words",
    [
        (["airplane.jpg"], "请描述这张图片", ["飞机", "天"]),
        (["airplane.jpg"], "Describe this picture.", ["airplane", "sky"]),
        (["sign.jpg"], "What does the sign say?", ["STOP"]),
        (["stars.jpg", "stars_later.jpg"], "What changed between the two pictures?", ["bird", "added"]),
        (["car.mp4"], "What moves, and where to?", ["car", "right"]),
        (["car.mp4"], "什么东西在移动?往哪里移动?", ["汽车", "右"]),
    ],
)
def test_it_sees(llm: LLM, files: list[str], question: str, words: list[str]) -> None:
    answer = llm.ask([MEDIA / file for file in files], question)
    assert all(word in answer for word in words), answer


def test_it_answers_the_same_with_guesses_and_sees_with_eight_bits(llm: LLM) -> None:
    exact = llm.ask(MEDIA / "airplane.jpg", "Describe this picture.")
    guesses = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
    with LLM("tiny", max_model_len=1024, speculative_config=guesses) as guessing:
        assert guessing.ask(MEDIA / "airplane.jpg", "Describe this picture.") == exact
    with LLM("tiny", max_model_len=1024, kv_cache_dtype="int8") as eight_bits:
        answer = eight_bits.ask(MEDIA / "airplane.jpg", "Describe this picture.")
    assert all(word in answer for word in ("airplane", "sky")), answer


def test_it_reads_small_print_in_the_slices_only(llm: LLM) -> None:
    """The poster's word is too small for the overview."""
    with_slices = llm.ask(MEDIA / "poster.jpg", "What is written?")
    params = SamplingParams(temperature=0, max_tokens=64)
    parts = [{"type": "image", "image": MEDIA / "poster.jpg"}, {"type": "text", "text": "What is written?"}]
    without = llm.chat(
        [{"role": "user", "content": parts}], params, mm_processor_kwargs={"max_slice_nums": 1}
    )
    assert "CAFE" in with_slices
    assert "CAFE" not in without[0].outputs[0].text


@pytest.mark.parametrize(
    "script, words",
    [
        ("one_picture.py", ["飞机", "天"]),
        ("several_pictures.py", ["bird", "added"]),
        ("video.py", ["car", "right"]),
    ],
)
def test_the_recipe_s_scripts_answer_rightly(
    script: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(str(EXAMPLES / "recipe" / script), run_name="__main__")
    answer = capsys.readouterr().out
    assert all(word in answer for word in words), answer
