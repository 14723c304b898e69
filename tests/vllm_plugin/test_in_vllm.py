"""Published folders in vLLM, with the plugin and without."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import huoyan.tiny
from huoyan import LLM, SamplingParams
from huoyan.vllm_plugin import ARCHITECTURE
from tests.peer.conftest import peer_python  # noqa: F401
from tests.peer.environment import with_plugin, without_plugin
from tests.vllm_plugin.published import CODE_RAN, publish
from tests.vllm_plugin.reference import Reference

pytestmark = pytest.mark.peer

TINY = Path(huoyan.tiny.__file__).parent / "checkpoint"
INT4 = TINY.with_name("checkpoint-int4")
MEDIA = TINY.with_name("media")
RULES = Reference(scale_resolution=224)
PICTURE = "(<image>./</image>)"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"max_slice_nums": 1}, {"max_slice_nums": 4}, {"use_image_id": False},
    {"max_slice_nums": 2, "use_image_id": False},
)  # fmt: skip
QUESTIONS = (("What is in this picture?", "airplane.jpg"), ("What does the sign say?", "sign.jpg"))
NAME, REVISION = "somebody/MiniCPM-V-2_6-int4", "5a" * 20
"""A model of a hub, in the cache of downloads."""
# Another version's own code, which vLLM runs for those who trust it.
OTHER_CONFIG = """
from transformers import PretrainedConfig
class MiniCPMVConfig(PretrainedConfig):
    model_type = "minicpmv"
"""


def run(python: str, jobs: dict[str, Any], root: Path, settings: dict[str, str]) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("in_vllm.py")
    with (root / "log").open("w") as log:
        ended = subprocess.run(
            [python, str(script), str(root / "jobs.json"), str(root / "found.json")],
            stdout=log, stderr=subprocess.STDOUT, env=settings, timeout=900, check=False,
        )  # fmt: skip
    said = (root / "log").read_text(encoding="utf-8", errors="replace")
    assert ended.returncode == 0, said[-4000:]
    found: dict[str, Any] = json.loads((root / "found.json").read_text(encoding="utf-8"))
    return found | {"log": said}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of this module: `tiny`, `int4` whose list is incomplete, `other` of another version."""
    root = tmp_path_factory.mktemp("plugin")
    publish(TINY, root / "tiny")
    incomplete = json.loads((INT4 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    publish(INT4, root / "int4", quantization_config=incomplete | {"modules_to_not_convert": ["lm_head"]})
    other = publish(TINY, root / "other", version=4.0)
    (other / "configuration_minicpm.py").write_text(OTHER_CONFIG, encoding="utf-8")
    cached = root / "cache" / "hub" / f"models--{NAME.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(REVISION, encoding="utf-8")
    publish(INT4, cached / "snapshots" / REVISION, quantization_config={"quant_method": "awq", "bits": 4})
    # The same in every run: on noise the model is undecided, and rounding may decide for it.
    rng = random.Random(26)
    for i in range(len(OPTIONS)):
        size = rng.randint(250, 700), rng.randint(250, 700)
        noise = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
        noise.resize(size, Image.Resampling.BILINEAR).save(root / f"{i}.png")
    return root


def requests(root: Path) -> list[dict[str, Any]]:
    chats = [
        {"question": question, "pictures": [str(MEDIA / picture)], "max_tokens": 24}
        for question, picture in QUESTIONS
    ]
    several = [str(root / f"{i}.png") for i in range(2)]
    prompts = [
        {
            "prompt": TURN.format(f"{PICTURE}\n{PICTURE}\nWhich is larger?"),
            "pictures": several,
            "options": options,
            "max_tokens": 4,
        }
        for options in OPTIONS
    ]
    bad = prompts[0] | {"options": {"max_slice_nums": 0}}
    video = {
        "prompt": TURN.format("(<video>./</video>)\nWhat happens?"),
        "pictures": [several[0]] * 3,
        "video": True,
        "max_tokens": 4,
    }
    return [*chats, bad, video, *prompts]


@pytest.fixture(scope="module")
def found(peer_python: str, root: Path) -> dict[str, Any]:  # noqa: F811
    """What vLLM did with the plugin."""
    chats = requests(root)[: len(QUESTIONS)]
    jobs = {
        "configs": {"tiny": str(root / "tiny"), "other": str(root / "other"), "hub": NAME},
        "models": {
            "tiny": {
                "folder": str(root / "tiny"),
                "dtype": "float32",
                "requests": requests(root),
                "processes": True,
            },
            "int4": {"folder": str(root / "int4"), "dtype": "float16", "requests": chats},
            # Last: it stays forgotten.
            "forgotten": {
                "folder": str(root / "int4"),
                "dtype": "float16",
                "requests": chats,
                "forget": True,
            },
        },
    }
    settings = with_plugin(root / "site") | {"HF_HOME": str(root / "cache")}
    return run(peer_python, jobs, root / "with", settings)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    with LLM(str(TINY), dtype="float32", device="cpu", max_model_len=4096) as llm:
        yield llm


def ask(llm: LLM) -> list[str]:
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(MEDIA / picture)}, {"type": "text", "text": q}],
            }
        ]
        for q, picture in QUESTIONS
    ]
    greedy = SamplingParams(temperature=0, max_tokens=24)
    return [llm.chat(chat, greedy, use_tqdm=False)[0].outputs[0].text for chat in chats]


def test_without_the_plugin_it_asks_for_trust(peer_python: str, root: Path) -> None:  # noqa: F811
    jobs: dict[str, Any] = {
        "configs": {},
        "models": {"tiny": {"folder": str(root / "tiny"), "dtype": "float32", "requests": []}},
    }
    seen = run(peer_python, jobs, root / "without", without_plugin())
    assert not seen["loaded"]
    assert "custom code" in seen["models"]["tiny"]["error"]


def test_it_loads_itself_and_nothing_of_the_model(found: dict[str, Any]) -> None:
    assert found["loaded"]
    assert not found["model imported"]


def test_published_code_never_runs(found: dict[str, Any]) -> None:
    assert CODE_RAN not in found["log"]
    for read in found["configs"]["tiny"]:
        assert read["architectures"] == [ARCHITECTURE]
    assert found["models"]["tiny"]["architectures"] == [ARCHITECTURE]


def test_a_name_of_a_hub(found: dict[str, Any]) -> None:
    for read in found["configs"]["hub"]:
        assert read["architectures"] == [ARCHITECTURE]
        assert {"vpm", "resampler"} <= set(read["quantization"]["modules_to_not_convert"])


def test_the_tokenizer_is_the_plugins(found: dict[str, Any]) -> None:
    for name in ("tiny", "hub"):
        assert "MiniCPMVTokenizerFast" in found["tokenizers"][name]
    assert "MiniCPMVTokenizerFast" not in found["tokenizers"]["other"]


def test_another_version_is_vllms(found: dict[str, Any]) -> None:
    refused, trusted = found["configs"]["other"]
    assert "custom code" in refused["error"] or "trust_remote_code" in refused["error"]
    assert trusted["module"].startswith("transformers_modules.")
    assert trusted["architectures"] == ["MiniCPMV"]


def test_answers_are_the_engines(found: dict[str, Any], engine: LLM) -> None:
    answers = found["models"]["tiny"]["answers"][: len(QUESTIONS)]
    assert [answer["text"] for answer in answers] == ask(engine)


def test_options_of_one_prompt(found: dict[str, Any], root: Path, engine: LLM) -> None:
    """The prompts' token ids, and an engine that is still alive after them."""
    given = requests(root)[-len(OPTIONS) :]
    prompts = [
        {
            "prompt": request["prompt"],
            "multi_modal_data": {"image": request["pictures"]},
            "mm_processor_kwargs": request["options"],
        }
        for request in given
    ]
    greedy = SamplingParams(temperature=0, max_tokens=1)
    expected = engine.generate(prompts, greedy, use_tqdm=False, raise_on_error=True)
    answers = found["models"]["tiny"]["answers"][-len(OPTIONS) :]
    assert [answer["prompt_token_ids"] for answer in answers] == [
        output.prompt_token_ids for output in expected
    ]
    assert len({len(answer["prompt_token_ids"]) for answer in answers}) >= 3


def test_a_bad_option_is_the_requests_fault(found: dict[str, Any]) -> None:
    assert (
        "max_slice_nums must be a whole number" in found["models"]["tiny"]["answers"][len(QUESTIONS)]["error"]
    )


def test_frames_of_a_video_are_one_slice_each(found: dict[str, Any], root: Path, engine: LLM) -> None:
    request = requests(root)[len(QUESTIONS) + 1]
    with Image.open(request["pictures"][0]) as frame:
        written = RULES.placeholder(frame.size, max_slice_nums=1, use_image_id=False) * len(
            request["pictures"]
        )
    expected = engine.get_tokenizer().encode(request["prompt"].replace("(<video>./</video>)", written))
    assert found["models"]["tiny"]["answers"][len(QUESTIONS) + 1]["prompt_token_ids"] == expected


def test_int4_whose_list_is_incomplete(found: dict[str, Any]) -> None:
    with LLM(str(INT4), dtype="float32", device="cpu", max_model_len=4096) as llm:
        expected = ask(llm)
    assert [answer["text"] for answer in found["models"]["int4"]["answers"]] == expected


def test_int4_without_the_plugins_list(found: dict[str, Any]) -> None:
    """vLLM looks for an int4 resampler or vision tower (vllm-project/vllm#11128)."""
    error = found["models"]["forgotten"]["error"]
    assert "There is no module or parameter named" in error
    assert "resampler." in error or "vpm." in error
