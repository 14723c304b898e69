"""The checkpoint's chat template: messages to one text, in a sandbox."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from huoyan.errors import InputError, ModelError
from huoyan.prompt.files import read_json_if_there, read_text

MAX_SOURCE = 1 << 20
MAX_OUTPUT = 64 << 20
MAX_SECONDS = 10.0
MAX_REPEAT = 1 << 20


class TemplateRefusal(TemplateError):
    """What `raise_exception` in a template raises: the messages are not such as it takes."""


class ChatTemplate:
    """A compiled template. Safe to share between threads."""

    def __init__(
        self, source: str, variables: Mapping[str, Any] | None = None, name: str = "chat template"
    ) -> None:
        """`variables` are seen by the template besides the messages (`bos_token` and the like).

        Raises ModelError where the source is not Jinja, or over 1 MiB.
        """
        self.source = source
        self.name = name
        self._variables = dict(variables or {})
        if len(source) > MAX_SOURCE:
            raise ModelError(f"{name}: over {MAX_SOURCE >> 20} MiB, this is no chat template")
        try:
            self._template = _environment().from_string(source)
        except (TemplateSyntaxError, RecursionError) as error:
            raise ModelError(f"{name}: the chat template is not valid Jinja ({_one_line(error)})") from None

    @classmethod
    def from_folder(
        cls, folder: str | Path, variables: Mapping[str, Any] | None = None
    ) -> ChatTemplate | None:
        """Read chat_template.jinja, else chat_template.json, else tokenizer_config.json; None without any.

        Of several named templates, the one called "default". Raises ModelError.
        """
        folder = Path(folder)
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            return cls(read_text(jinja), variables, str(jinja))
        for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            source = _pick(read_json_if_there(path).get("chat_template"), path)
            if source is not None:
                return cls(source, variables, str(path))
        return None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation of `{"role": …, "content": …}`.

        Raises InputError where the template refuses the messages, ModelError where it fails by itself.
        """
        limits = _Limits()
        seen = {
            "tools": None,
            "documents": None,
            **self._variables,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "range": limits.range,
        }
        parts: list[str] = []
        try:
            for part in self._template.generate(seen):
                limits.wrote(part)
                parts.append(part)
        except TemplateRefusal as error:
            raise InputError(f"the chat template refuses the messages: {_one_line(error)}") from None
        except Exception as error:  # a template can raise anything Python can
            raise ModelError(f"{self.name}: the chat template fails ({_one_line(error)})") from None
        return "".join(parts)


class _Limits:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS
        self._characters = MAX_OUTPUT
        self._turns = MAX_REPEAT

    def wrote(self, part: str) -> None:
        self._characters -= len(part)
        if self._characters < 0:
            raise SecurityError(f"its text is over {MAX_OUTPUT >> 20} million characters")
        if time.monotonic() > self._end:
            raise SecurityError(f"it runs for over {MAX_SECONDS:g} seconds")

    def range(self, *limits: int) -> range:
        numbers = range(*limits)
        self._turns -= len(numbers) + 1
        if self._turns < 0 or time.monotonic() > self._end:
            raise SecurityError("it loops too often")
        return numbers


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, (str, bytes, list, tuple)):
                if isinstance(times, int) and len(value) * times > MAX_REPEAT:
                    raise SecurityError("it repeats a text too often")
                break
        else:
            if any(isinstance(value, int) and value.bit_length() > 64 for value in (left, right)) or (
                operator == "**" and isinstance(right, int) and abs(right) > 64
            ):
                raise SecurityError("it computes with numbers that are too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what is trained on; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to declare it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML, which would reach the model.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _pick(value: Any, path: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in value
            if isinstance(entry, dict) and isinstance(entry.get("template"), str)
        }
        if "default" in named:
            return named["default"]
        if len(named) == 1:
            return next(iter(named.values()))
        raise ModelError(
            f"{path}: of its chat templates ({', '.join(map(str, named)) or 'none'}) none is 'default'"
        )
    raise ModelError(f"{path}: chat_template is a {type(value).__name__}, not a text or a list of named ones")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
