"""The parts of the scripts that compare with vLLM which need no vLLM: what they conclude from given numbers."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.cli.conftest import REPOSITORY, environment


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


agreement = script("full_size_agreement")
rows = script("vs_vllm_rows")
report = script("vs_vllm_report")
vs_vllm = script("vs_vllm")
recipe_table = script("recipe_table")
plan_on_card = script("plan_on_card")
overhead = script("vllm_overhead")
LIKELY = 20
STEPS = 12


def answers(
    seed: int, noise: float, ours: float, decoding: float = 0.0
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """vLLM's, huoyan's and the reference's answers: noise on log-probabilities that are far from ties."""
    rng = random.Random(seed)
    theirs, own, exact = {}, {}, {}
    for request in "abc":
        reference = [{str(i): -1.0 * i for i in range(LIKELY)} for _ in range(STEPS)]

        def noisy(scale: float, reference: Any = reference) -> list[dict[str, float]]:
            return [{t: v + rng.uniform(-scale, scale) for t, v in step.items()} for step in reference]

        ids = {"prompt_token_ids": [1, 2], "token_ids": [0] * STEPS}
        theirs[request] = {**ids, "logprobs": noisy(noise)}
        own[request] = {**ids, "token_ids": [0] * STEPS, "led": noisy(ours), "decoded": noisy(decoding)}
        exact[request] = {**ids, "led": reference}
    return theirs, own, exact


def test_noise_like_vllms_agrees_and_more_does_not(seed: int) -> None:
    same = agreement.compare(*answers(seed, 0.05, 0.05), 1.5)
    assert same["agrees"]
    assert same["equal_answers"] == 3
    # Of a uniform distribution: its width over the square root of twelve.
    assert same["measures"]["vllm to float32"]["rms"] == pytest.approx(0.1 / 12**0.5, rel=0.3)
    assert not agreement.compare(*answers(seed, 0.05, 0.15), 1.5)["agrees"]
    assert agreement.compare(*answers(seed, 0.05, 0.01), 1.5)["agrees"]
    # The same prompts read well, but decoded badly.
    assert not agreement.compare(*answers(seed, 0.05, 0.05, decoding=0.15), 1.5)["agrees"]


def test_answers_part_at_ties_only(seed: int) -> None:
    theirs, own, exact = answers(seed, 0.01, 0.01)
    own["b"]["token_ids"][4:] = [1] * (STEPS - 4)
    found = agreement.compare(theirs, own, exact, 1.5)
    assert not found["agrees"]
    assert [(p["request"], p["step"], p["gap"]) for p in found["parted"]] == [("b", 4, 1.0)]
    # The same step, with the two tokens as good as equal.
    exact["b"]["led"][4]["1"] = exact["b"]["led"][4]["0"] - 0.001
    for said in (own["b"]["led"], own["b"]["decoded"], theirs["b"]["logprobs"]):
        said[4]["1"] = exact["b"]["led"][4]["1"]
    assert agreement.compare(theirs, own, exact, 1.5)["agrees"]
    own["b"]["token_ids"][4] = 99
    assert not agreement.compare(theirs, own, exact, 1.5)["agrees"]


def test_other_prompts_end_it(seed: int) -> None:
    theirs, own, exact = answers(seed, 0.01, 0.01)
    own["c"]["prompt_token_ids"] = [1, 3]
    with pytest.raises(SystemExit, match="request c"):
        agreement.compare(theirs, own, exact, 1.5)


def test_a_likeliest_that_is_not_seen_is_no_agreement(seed: int) -> None:
    theirs, own, exact = answers(seed, 0.01, 0.01)
    for step in own["a"]["led"]:
        del step["0"]
    assert not agreement.compare(theirs, own, exact, 1.5)["agrees"]


def results(engine: str, form: str = "bf16", **more: Any) -> dict[str, Any]:
    """What a results file holds."""
    kept = dict.fromkeys(("cuda", "toy", "dummy", "alone"), False)
    job = {"engine": engine, "form": form, "shape": "full", "sizes": {"prompt": 512}} | kept
    return rows.new_results(job) | {"device": "GPU"} | more


def test_ratios_are_above_one_where_huoyan_is_faster() -> None:
    theirs = {"decode_1_tok_s": 100.0, "beam3_step_ms": 30.0, "kv_in_24_GiB_tokens": 10.0, "ready_s": 80.0}
    ours = {"decode_1_tok_s": 150.0, "beam3_step_ms": 10.0, "kv_in_24_GiB_tokens": 5.0, "other_ms": 1.0}
    found = report.ratios({"bf16": {"vllm": {"values": theirs}, "huoyan": {"values": ours}}})
    assert found == {"bf16": {"decode_1_tok_s": 1.5, "beam3_step_ms": 3.0, "kv_in_24_GiB_tokens": 0.5}}


def test_parts_of_a_run_are_joined(tmp_path: Path) -> None:
    """Each engine and format ran by itself; a measured number stands before a derived one."""
    name = "kv_in_24_GiB_tokens"
    theirs = {"decode_1_tok_s": 200.0, "decode_128_tok_s": 2e4, "beam3_step_ms": 28.0, name: 120_000}
    parts = {
        "vllm-bf16": results("vllm", values=theirs, notes={name: "derived"}, prompts={"text": 512}),
        "vllm-bf16-memory": results("vllm", values={name: 121_000}),
        "huoyan-bf16": results("huoyan", values={"decode_1_tok_s": 260.0}, prompts={"text": 513}),
        "huoyan-bf16-memory": results("huoyan", values={name: 140_000}, device="another GPU"),
        "vllm-int4": results("vllm", "int4", failed={"beams": "it did not"}),
    }
    for file, part in parts.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(part))
    found = report.collect(tmp_path)
    assert found["bf16"]["vllm"]["values"] == theirs | {name: 121_000}
    assert found["bf16"]["vllm"]["notes"] == {}
    assert report.ratios(found) == {"bf16": {"decode_1_tok_s": 1.3, name: 140 / 121}, "int4": {}}
    lines = report.markdown(found).splitlines()
    assert lines[0].count("|") == 8
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| decode, 1 sequence, tok/s",
        "| decode, 128 sequences, tok/s",
        "| a step of 3 beams behind a picture, ms",
        "| KV cache inside 24 GiB, tokens",
    ]
    assert "| 121 000 | 140 000 | 1.16 | – | – | – |" in lines[5]
    told = report.problems(found)
    assert "int4, vllm, beams: it did not" in told
    assert any("prompts of 512 tokens in vLLM and 513 here" in line for line in told)


def test_another_device_is_told(tmp_path: Path) -> None:
    for engine, device in (("vllm", "H200"), ("huoyan", "H100")):
        part = results(engine, values={"ready_s": 1.0}, device=device)
        (tmp_path / f"{engine}-bf16.json").write_text(json.dumps(part))
    assert any("not the same device" in line for line in report.problems(report.collect(tmp_path)))


def test_vllms_cache_under_the_cap_is_what_its_budget_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a card of 100 GiB: 90 - 24 GiB less, at 57 344 bytes a token."""
    config = {
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(rows, "total_memory", lambda: 100 << 30)
    llm = MagicMock()
    cache = llm.llm_engine.vllm_config.cache_config
    cache.num_gpu_blocks, cache.block_size = 84_000, 16
    values: dict[str, float] = {}
    notes = rows.derive_memory(llm, {"folder": str(tmp_path), "cap_gib": 24}, values)
    assert values == {"kv_in_24_GiB_tokens": int(84_000 * 16 - 66 * (1 << 30) / 57_344)}
    assert notes.keys() == values.keys()


def test_a_published_copy_names_the_code_and_keeps_the_rest(tmp_path: Path) -> None:
    source, code = tmp_path / "source", tmp_path / "code"
    source.mkdir()
    code.mkdir()
    (code / "configuration_minicpm.py").write_text("")
    (source / "config.json").write_text('{"version": 2.6}')
    (source / "preprocessor_config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"weights")
    for version in (2.6, 4.0):
        # Twice: a copy of an earlier run is made anew.
        folder = vs_vllm.published(source, tmp_path / "copy", code, version=version)
        assert (folder / "model.safetensors").resolve() == source / "model.safetensors"
        config = json.loads((folder / "config.json").read_text())
        assert config == {"version": version, "auto_map": vs_vllm.AUTO_MAPS["config.json"]}
        assert (folder / "configuration_minicpm.py").exists()
    assert json.loads((source / "config.json").read_text()) == {"version": 2.6}


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "vs_vllm.py"), "--shape", "small", "--toy"]
    return subprocess.run(
        [*command, "--formats", "bf16", "--out", str(out), *arguments],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )


def compared() -> dict[str, Any]:
    asked = {
        "input_tokens": 500,
        "output_tokens": 64,
        "seconds": 0.5,
        "first_token_s": 0.05,
        "text": "a plane",
    }

    def most(count: int) -> dict[str, Any]:
        return {"asked": count, "proved": count, "limited_by": "the memory"}

    def column(batch: int) -> dict[str, Any]:
        small = {"kv_cache_dtype": "fp8", "batch": most(2 * batch), "kv_tokens": 1}
        return {"beams": asked, "greedy": asked, "model_bytes": 1 << 34, "kv_tokens": 2048 * batch,
                "longest": most(32768), "batch": most(batch), "small": small}  # fmt: skip

    settings = {"batch_length": 2048, "beams": 3, "gpu_memory": "24GiB", "picture_size": [1344, 896]}
    return {"device": "NVIDIA H200", "settings": settings, "models": [column(71), column(152)]}


def test_the_recipe_s_table_goes_into_its_page(tmp_path: Path) -> None:
    found, page = tmp_path / "compare.json", tmp_path / "page.md"
    found.write_text(json.dumps(compared()))
    page.write_text(f"# Speed\n\n{recipe_table.BEGIN}\nold\n{recipe_table.END}\n\nmore\n")
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "recipe_table.py"),
        str(found),
        "--write",
        str(page),
    ]
    for _ in range(2):
        subprocess.run(command, env=environment(), check=True)
    text = page.read_text()
    assert text.startswith("# Speed")
    assert text.endswith(f"{recipe_table.END}\n\nmore\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells["largest batch of 2048 tokens, run"][:4] == ["2", "52", "71", "152"]
    assert 65 <= int(cells["largest batch of 2048 tokens, run"][4]) <= 75
    assert cells["memory of the model"] == ["16 GB", "7 GB", "16.0 GiB", "16.0 GiB", "15.1 GiB", "6.2 GiB"]
    # Weights once a step of beams: 14.1 GB at 1008 GB/s, 63 times, and a little more.
    least = float(cells["time, 64 tokens (the recipe's are its own)"][4].split()[2])
    assert 63 * 14.1 / 1008 < least < 1.3 * 64 * 14.1 / 1008


def test_the_plan_beside_a_card_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    state = {"allocated": 1 << 34, "reserved": 1 << 34, "outside": 1 << 29, "most_allocated": 23 << 30}
    state["most_reserved"] = 23 << 30
    report = {
        "format": "bf16", "kv_tokens": 1000, "kv_tokens_by_plan": 990, "max_model_len": 100, "max_num_seqs": 4,
        "retries": 0, "loads": [{"load": "x", "error": "out of memory"}], "gpu_memory": 24 << 30,
        "states": dict.fromkeys(("weights", "weights, KV cache, graphs", "in the end"), state),
        "graphs": {"decode": {"count": 4, "torch": 40 << 20, "driver": 8 << 20}},
        "moments": dict.fromkeys(plan_on_card.MOMENTS, 100 << 20), "most_taken": 47 << 29, "torch_limit": 23 << 30,
        "said": {
            **dict.fromkeys(plan_on_card.MOMENTS, 110 << 20), "weights": 15 << 30, "kv": 8 << 30, "between": 1 << 27,
            "cublas": 1 << 26, "workspace": 1 << 28, "pictures": 1 << 26, "graphs": 48 << 20, "graphs_driver": 16 << 20,
            "context": 1 << 29, "fixed": 16 << 30,
        },
    }  # fmt: skip
    plan_on_card.show(report)
    shown = capsys.readouterr().out
    assert "FAILED: x: out of memory" in shown
    assert "times" not in shown
    plan_on_card.show({**report, "retries": 3})
    assert "FAILED: torch had to give memory back 3 times" in capsys.readouterr().out
    assert "predicted 100.00%, taken 97.92%; the prediction is +2.13%" in shown
    (each,) = [line for line in shown.splitlines() if "graphs, driver, each" in line]
    assert each.split("|")[3].strip() == "2.0"


def test_overhead_is_told_in_pairs_and_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    def answering(way: str, seconds: float) -> Any:
        def run(prompts: list[dict[str, Any]]) -> list[Any]:
            asked.append((way, len(prompts), "multi_modal_data" in prompts[0]))
            now[0] += seconds
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])]) for _ in prompts]

        return run

    clock = SimpleNamespace(
        perf_counter=lambda: now[0], process_time=lambda: now[0], monotonic=lambda: now[0]
    )
    monkeypatch.setattr(overhead, "time", clock)
    given = SimpleNamespace(rounds=5, seconds=38.0, requests=3, tokens=2)
    said: list[str] = []
    ways = {"direct": answering("direct", 4.0), "ours": answering("ours", 5.0)}
    rows = overhead.measured(ways, ["words", "small"], given, said.append)
    # Each is warmed up in both ways with as many requests, then who is first alternates.
    assert asked[:4] == [("direct", 3, False), ("ours", 3, False), ("direct", 3, True), ("ours", 3, True)]
    assert [way for way, _, _ in asked[4:]] == ["direct", "ours", "direct", "ours"]
    assert [line for line in said if "no time" in line] == [
        "words: no time for round 2",
        "small: no time for round 2",
    ]
    summary = rows["words"].summary()
    assert (summary["rounds"], summary["ratio"]) == (1, pytest.approx(0.8))
    given.seconds = 1000
    asked.clear()
    rows = overhead.measured(ways, ["words"], given, said.append)
    assert [way for way, _, _ in asked[2:6]] == ["direct", "ours", "ours", "direct"]
    assert rows["words"].summary()["rounds"] == 5


def test_one_engine_that_fails_does_not_take_the_other(tmp_path: Path) -> None:
    done = run(tmp_path, "--vllm-python", "/bin/false", "--rows", "decode,four,memory")
    assert done.returncode == 1, done.stderr
    assert "vllm: it ended with 1" in done.stdout
    engines = json.loads((tmp_path / "vs_vllm.json").read_text())["formats"]["bf16"]
    assert engines["vllm"]["values"] == {}
    assert "the process" in engines["vllm"]["failed"]
    ours = engines["huoyan"]
    assert ours["failed"] == {}
    names = {"text_24_first_token_ms", "decode_1_tok_s", "four_pictures_first_token_ms"}
    assert ours["values"].keys() == names
    assert ours["prompts"]["text"] == 24
    assert ours["toy"]
    # A second command goes on with the rows that are not there.
    before = ours["values"]["decode_1_tok_s"]
    done = run(tmp_path, "--only", "huoyan", "--resume", "--rows", "decode,beams")
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "huoyan-bf16.json").read_text())
    assert ours["values"]["decode_1_tok_s"] == before
    assert ours["values"].keys() - names == {
        f"beam3_{n}" for n in ("2_tokens_total_s", "6_tokens_total_s", "step_ms")
    }
    assert ours["rows"] == ["decode", "four", "beams"]


def test_a_run_whose_time_is_over_says_so(tmp_path: Path) -> None:
    """An engine that never answers: one that does may have its first numbers within the second it is given."""
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    done = run(tmp_path, "--only", "vllm", "--vllm-python", str(silent), "--seconds", "0.2")
    assert done.returncode == 1
    assert (
        "the time of this run was over"
        in json.loads((tmp_path / "vllm-bf16.json").read_text())["failed"]["the process"]
    )


@pytest.mark.parametrize("name", ["beam_kernels", "choose_rows", "decode_step", "few_rows", "full_size"])
def test_without_a_gpu_a_script_says_so_in_one_line(name: str) -> None:
    run = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py"],
        cwd=REPOSITORY,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"{name}.py: it needs a CUDA device, and torch sees none here\n"
