"""Run in the peer environment: what vLLM makes of folders and prompts, as JSON.

usage: python in_vllm.py JOBS.json FOUND.json

`configs`: folders whose config is read, each with and without trust in its code. `models`: folders that are
loaded, with prompts to answer; `processes` gives vLLM its own; `forget` leaves the plugin's list of 16-bit modules out;
`trust` runs the folder's Python files.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path


def read_config(folder, trust_remote_code):
    from vllm.transformers_utils.config import get_config

    try:
        config = get_config(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        return {"error": one_line(error)}
    return {
        "module": type(config).__module__,
        "architectures": config.architectures,
        "quantization": getattr(config, "quantization_config", None),
    }


def read_tokenizer(folder):
    from vllm.tokenizers.registry import get_tokenizer

    try:
        return [kind.__name__ for kind in type(get_tokenizer(folder)).__mro__]
    except Exception as error:
        return one_line(error)


def run_model(job):
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    # In processes of its own, as people run it, or in this one, which is quicker.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if job.get("processes") else "0"
    try:
        if job.get("forget"):
            import huoyan.vllm_plugin.int4

            huoyan.vllm_plugin.int4.complete_quantization_config = lambda *_: None
        llm = LLM(
            job["folder"],
            dtype=job["dtype"],
            max_model_len=4096,
            max_num_seqs=8,
            limit_mm_per_prompt={"image": 4, "video": 1},
            skip_mm_profiling=True,
            enforce_eager=True,
            allowed_local_media_path="/",
            trust_remote_code=job.get("trust", False),
        )
    except Exception as error:
        traceback.print_exc()
        return {"error": one_line(error)}
    answers = [answer(llm, request) for request in job["requests"]]
    architectures = llm.llm_engine.model_config.architectures
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return {"answers": answers, "architectures": architectures}


def answer(llm, request):
    import numpy as np
    from PIL import Image
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
    try:
        if "question" in request:
            pictures = [
                {"type": "image_url", "image_url": {"url": f"file://{p}"}} for p in request["pictures"]
            ]
            turn = {"role": "user", "content": [*pictures, {"type": "text", "text": request["question"]}]}
            (output,) = llm.chat([turn], greedy, use_tqdm=False)
        else:
            opened = [Image.open(path).convert("RGB") for path in request["pictures"]]
            media = (
                {"video": np.stack([np.array(i) for i in opened])}
                if request.get("video")
                else {"image": opened}
            )
            prompt = {"prompt": request["prompt"], "multi_modal_data": media}
            prompt |= {"mm_processor_kwargs": request["options"]} if request.get("options") else {}
            (output,) = llm.generate(prompt, greedy, use_tqdm=False)
    except ValueError as error:
        return {"error": one_line(error)}
    return {"prompt_token_ids": list(output.prompt_token_ids), "text": output.outputs[0].text}


def one_line(error):
    causes = []
    while error is not None:
        causes.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        error = error.__cause__
    return " <- ".join(causes)


def main():
    jobs_file, found_file = sys.argv[1:]
    jobs = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {
        "loaded": "huoyan.vllm_plugin" in sys.modules,
        "model imported": "huoyan.vllm_plugin.model" in sys.modules,
        "configs": {
            name: [read_config(folder, trust) for trust in (False, True)]
            for name, folder in jobs["configs"].items()
        },
        "tokenizers": {name: read_tokenizer(folder) for name, folder in jobs["configs"].items()},
        "models": {},
    }
    for name, job in jobs["models"].items():
        found["models"][name] = run_model(job)
        # Written after each: what was found is not lost to a later failure.
        Path(found_file).write_text(json.dumps(found), encoding="utf-8")
    Path(found_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
