from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from huoyan.errors import InputError, ModelError
from huoyan.prompt.chat_template import ChatTemplate

from .checkpoint import CHATML

HI = [{"role": "user", "content": "hi <b> \"q\" 'é'"}]


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}"
        "{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
        "{% for m in messages %}\n {% generation %}\n {{ m.content }}\n {% endgeneration %}\n{% endfor %}\nx",
        "{{ eos_token }}{{ bos_token }}{{ nothing }}{{ extra }}{% if tools %}T{% endif %}{{ tools is none }}",
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}"
        "{{ f(messages[0]['role']) }}{{ range(3) | list }}{{ 'ab' * 3 }}",
    ],
)
def test_renders_as_transformers_does(reference: Any, source: str) -> None:
    variables = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    ours = ChatTemplate(source, variables).render(HI, True, extra="E")
    theirs = reference.apply_chat_template(
        HI, chat_template=source, tokenize=False, add_generation_prompt=True, extra="E"
    )
    assert ours == theirs


def test_today() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HI) in (
        str(time.localtime().tm_year),
        str(time.localtime().tm_year - 1),
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for i in range(3) %}{% for j in range(10000000) %}{% endfor %}{% endfor %}",
        "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[5].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(indent='x' + 1) }}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ModelError, match="chat template") as caught:
        ChatTemplate(source, name="/m/tokenizer_config.json").render(HI)
    assert str(caught.value).startswith("/m/tokenizer_config.json: ")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def test_nothing_to_read_or_change() -> None:
    assert ChatTemplate("{{ messages.__class__ }}{{ raise_exception.__globals__ }}{{ x }}").render(HI) == ""


def test_a_refusal_is_the_writer_s_mistake() -> None:
    template = ChatTemplate("{{ raise_exception('roles\nmust alternate') }}")
    with pytest.raises(InputError, match="refuses the messages: roles must alternate"):
        template.render(HI)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huoyan.prompt.chat_template.MAX_OUTPUT", 100)
    with pytest.raises(ModelError, match="characters"):
        ChatTemplate("{% for i in range(200) %}x{% endfor %}").render(HI)


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huoyan.prompt.chat_template.MAX_SECONDS", -1.0)
    with pytest.raises(ModelError, match="seconds"):
        ChatTemplate("x{{ messages }}").render(HI)


def test_bad_sources() -> None:
    for source, words in (
        ("{% if %}", "not valid Jinja"),
        ("{{", "not valid Jinja"),
        ("x" * (2 << 20), "MiB"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            ChatTemplate(source)
        assert "\n" not in str(caught.value)


def test_where_it_is_read_from(tmp_path: Path) -> None:
    def rendered() -> str:
        template = ChatTemplate.from_folder(tmp_path, {"eos_token": "E"})
        assert template is not None
        return template.render(HI)

    def write(name: str, value: Any) -> None:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    assert ChatTemplate.from_folder(tmp_path) is None
    write("tokenizer_config.json", {"eos_token": "E"})
    assert ChatTemplate.from_folder(tmp_path) is None
    write("tokenizer_config.json", {"chat_template": "one {{ eos_token }}"})
    assert rendered() == "one E"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "of several"}]
    write("tokenizer_config.json", {"chat_template": named})
    assert rendered() == "of several"
    write("tokenizer_config.json", {"chat_template": named[:1]})
    assert rendered() == "tools"
    write("tokenizer_config.json", {"chat_template": [named[0], {"name": "rag", "template": "x"}]})
    with pytest.raises(ModelError, match="tool_use, rag"):
        ChatTemplate.from_folder(tmp_path)
    write("tokenizer_config.json", {"chat_template": 3})
    with pytest.raises(ModelError, match="int"):
        ChatTemplate.from_folder(tmp_path)
    write("chat_template.json", {"chat_template": "json"})
    assert rendered() == "json"
    write("chat_template.jinja", "jinja")
    assert rendered() == "jinja"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate.from_folder(tmp_path)
