"""Facts of the pages that can be read off the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from huoyan.api.options import EngineOptions
from huoyan.api.sampling_params import SamplingParams
from huoyan.cli.main import app
from tests.docs.running import REPOSITORY

DOCS = REPOSITORY / "docs"


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command), those of groups with the group's name before theirs."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def options() -> Iterator[tuple[str, str]]:
    """(command, long option) of all commands."""
    for name, command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--") and option != "--help":
                    yield name, option


def listed(page: str, mark: str) -> list[str]:
    """The names between `<!-- mark: … -->` and `<!-- end of mark -->`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    part = re.search(rf"<!-- {mark}: .*?-->(.*?)<!-- end of {mark} -->", text, re.DOTALL)
    assert part is not None
    return re.findall(r"`(\w+)`", part[1])


def test_every_command_and_option_is_in_the_page() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    found = list(options())
    assert len(found) > 20
    names = {command for command, _ in found}
    missing = sorted({f"huoyan {c}" for c in names if f"`huoyan {c}" not in page})
    missing += sorted({option for _, option in found if f"`{option}`" not in page})
    assert not missing, "docs/cli.md does not name them"


def test_no_option_in_the_page_is_made_up() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    known = {option for _, option in options()} | {"--help"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", page)) <= known


def test_sampling_parameters_are_those_of_the_class() -> None:
    assert sorted(listed("python-api.md", "fields")) == sorted(field.name for field in fields(SamplingParams))


def test_options_are_those_of_the_class() -> None:
    assert sorted(listed("python-api.md", "options")) == sorted(field.name for field in fields(EngineOptions))


def test_environment_variables_are_those_of_the_code() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (REPOSITORY / "src").rglob("*.py"))
    read = set(re.findall(r'"(HUOYAN_[A-Z_]*[A-Z])"', source))
    page = (DOCS / "media.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(HUOYAN_[A-Z_]+)`", page))
    assert read == named


def test_every_benchmark_is_in_the_page() -> None:
    folder = REPOSITORY / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in folder.glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", page, re.MULTILINE)) == scripts


def test_files_named_in_the_architecture_exist() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    folders = [
        REPOSITORY / "src" / "huoyan" / name
        for name in ("", "api", "backends/vllm", "engine", "media", "models", "prompt", "cli", "bench")
    ]
    for name in set(re.findall(r"`([\w/]+(?:\.py|/))`", page)):
        assert any((folder / name).exists() for folder in folders) or (REPOSITORY / name).exists(), name


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.glob("*.md")), REPOSITORY / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_pages_stay_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_makefile_has_what_the_pages_name() -> None:
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for page in (*REPOSITORY.glob("*.md"), *DOCS.glob("*.md"), *REPOSITORY.glob("benchmarks/*.md")):
        named = set(
            re.findall(
                r"(?:`|^)make (?:\w+=\S+ )*([a-z0-9-]+)", page.read_text(encoding="utf-8"), re.MULTILINE
            )
        )
        assert named <= targets, page
