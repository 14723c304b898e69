"""How the plugin takes hold of vLLM, on a stand-in with the three places it touches."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import huoyan.tiny
import huoyan.vllm_plugin
from huoyan.vllm_plugin import ARCHITECTURE, hooks, register
from huoyan.vllm_plugin.config import MiniCPMVConfig
from huoyan.vllm_plugin.tokenizer import MiniCPMVTokenizerFast
from tests.vllm_plugin.published import CODE_RAN, publish

TINY = Path(huoyan.tiny.__file__).parent / "checkpoint"


class StandIn:
    """What is left of vLLM: its readers say what they were asked, its registry remembers."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

        class HFConfigParser:
            def parse(
                self,
                model: Any,
                trust_remote_code: bool,
                revision: str | None = None,
                code_revision: str | None = None,
                **kwargs: Any,
            ) -> tuple[dict[str, Any], Any]:
                return {}, ("vLLM's", model, trust_remote_code, revision, code_revision, kwargs)

        class CachedHfTokenizer:
            @classmethod
            def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
                return "vLLM's", cls, name, args, kwargs

        self.parser, self.tokenizer = HFConfigParser, CachedHfTokenizer

    def modules(self) -> dict[str, types.ModuleType]:
        contents: dict[str, dict[str, Any]] = {
            "vllm": {"ModelRegistry": types.SimpleNamespace(register_model=self.models.__setitem__)},
            "vllm.tokenizers": {},
            "vllm.tokenizers.hf": {
                "CachedHfTokenizer": self.tokenizer,
                "get_cached_tokenizer": lambda tokenizer: ("cached", tokenizer),
            },
            "vllm.transformers_utils": {},
            "vllm.transformers_utils.config": {"HFConfigParser": self.parser},
        }
        found = {}
        for name, values in contents.items():
            found[name] = types.ModuleType(name)
            vars(found[name]).update(values)
        return found


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hooks, "_recognised", set())
    return stand_in


def test_a_published_folder(vllm: StandIn, tmp_path: Path) -> None:
    folder = publish(TINY, tmp_path / "published")
    register()
    for trusted in (False, True):
        fields, config = vllm.parser().parse(folder, trust_remote_code=trusted, hf_overrides=None)
        assert type(config) is MiniCPMVConfig
        assert config.architectures == fields["architectures"] == [ARCHITECTURE]
        assert config.name_or_path == str(folder)
        kind, tokenizer = vllm.tokenizer.from_pretrained(
            folder, trust_remote_code=trusted, truncation_side="left"
        )
        assert kind == "cached"
        assert type(tokenizer) is MiniCPMVTokenizerFast
        assert tokenizer.truncation_side == "left"
    module, _, name = vllm.models[ARCHITECTURE].partition(":")
    assert (module, name) == ("huoyan.vllm_plugin.model", ARCHITECTURE)
    assert (Path(huoyan.vllm_plugin.__file__).parent / "model.py").exists()


@pytest.mark.parametrize(
    "changes",
    [{"version": 4.0}, {"version": "4.5"}, {"version": None}, {"model_type": "qwen2"}],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_other_models_pass_untouched(vllm: StandIn, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = publish(TINY, tmp_path / "published", **changes)
    register()
    fields, seen = vllm.parser().parse(
        folder, True, "a-revision", code_revision="b", hf_overrides={"x": 1}, token="t"
    )
    assert fields == {}
    assert seen == ("vLLM's", folder, True, "a-revision", "b", {"hf_overrides": {"x": 1}, "token": "t"})
    given = {"trust_remote_code": True, "revision": "r", "download_dir": "d"}
    assert vllm.tokenizer.from_pretrained(folder, "one", truncation_side="left", **given) == (
        "vLLM's", vllm.tokenizer, folder, ("one",), given | {"truncation_side": "left"},
    )  # fmt: skip


def test_what_cannot_be_read_is_left_to_vllm(vllm: StandIn, tmp_path: Path) -> None:
    register()
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    for model in (tmp_path, tmp_path / "missing", "no/such-model"):
        assert vllm.parser().parse(model, False)[1][0] == "vLLM's"


def test_overrides_tell_which_model_is_meant(vllm: StandIn, tmp_path: Path) -> None:
    register()
    parse: Callable[..., Any] = vllm.parser().parse
    assert parse(TINY, False, hf_overrides={"model_type": "qwen2"})[1][0] == "vLLM's"
    old = publish(TINY, tmp_path / "published", version=None)
    assert type(parse(old, False, hf_overrides={"version": 2.6})[1]) is MiniCPMVConfig
    assert type(parse(TINY, False, hf_overrides=lambda config: config)[1]) is MiniCPMVConfig


def test_any_number_of_times(vllm: StandIn) -> None:
    register()
    parse, from_pretrained = vllm.parser.parse, vllm.tokenizer.from_pretrained
    for _ in range(3):
        register()
    assert vllm.parser.parse is parse
    assert vllm.tokenizer.from_pretrained == from_pretrained


@pytest.mark.parametrize("gone", ["HFConfigParser", "CachedHfTokenizer", "ModelRegistry"])
def test_another_vllm_is_left_as_it_is(
    vllm: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    for module in vllm.modules():
        monkeypatch.delattr(sys.modules[module], gone, raising=False)
    parse = vllm.parser.parse
    with caplog.at_level(logging.WARNING, "huoyan"):
        register()
    assert vllm.parser.parse is parse
    (record,) = caplog.records
    assert gone in record.getMessage()
    assert "\n" not in record.getMessage()


def test_registering_imports_nothing_heavy(tmp_path: Path) -> None:
    """In a process that serves another model, beyond what vLLM has imported there itself."""
    for name, text in {
        "__init__": "class ModelRegistry:\n    register_model = staticmethod(lambda *a: None)\n",
        "tokenizers/__init__": "",
        "tokenizers/hf": "class CachedHfTokenizer:\n    @classmethod\n    def from_pretrained(cls): ...\n"
        "def get_cached_tokenizer(): ...\n",
        "transformers_utils/__init__": "",
        "transformers_utils/config": "class HFConfigParser:\n    def parse(self): ...\n",
    }.items():
        path = tmp_path / "vllm" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    code = (
        f"import json, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(huoyan.__file__).parents[1])!r}]\n"
        "from huoyan.vllm_plugin import register; register()\n"
        "import vllm; assert vllm.__file__.startswith(sys.path[0])\n"
        "print(json.dumps([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == []


def test_the_published_code_would_be_noticed(tmp_path: Path) -> None:
    folder = publish(TINY, tmp_path / "published")
    with pytest.raises(RuntimeError, match=CODE_RAN):
        exec((folder / "configuration_minicpm.py").read_text(encoding="utf-8"), {})
