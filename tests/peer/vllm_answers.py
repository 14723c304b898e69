"""Run in the peer environment: answers of vLLM to the requests of a JSON file.

usage: python vllm_answers.py JOBS.json ANSWERS.json

A job names a checkpoint folder and its requests; each is a conversation or a raw prompt, with picture files.
vLLM runs remote code of the checkpoint for this model, so it gets a temporary copy with `remote_code/` beside
links to the weights. No module of huoyan is imported here.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
AUTO_MAP = {
    "config.json": {"AutoConfig": "configuration_minicpmv.MiniCPMVConfig"},
    "preprocessor_config.json": {
        "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
        "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
    },
}
TOP = 5


def peer_copy(folder, copy):
    """The checkpoint as vLLM wants it: with classes to import, weights linked, nothing else changed."""
    for path in Path(folder).iterdir():
        if path.name in AUTO_MAP:
            fields = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP[path.name]}
            (copy / path.name).write_text(json.dumps(fields), encoding="utf-8")
        elif path.is_file():
            (copy / path.name).symlink_to(path.resolve())
    for path in (Path(__file__).parent / "remote_code").glob("*.py"):
        shutil.copy(path, copy / path.name)


def load(folder, job):
    import torch

    # A CPU build of torch has no CUDA streams, and raises when this model's resampler asks about them.
    if not torch.cuda.is_available():
        torch.cuda.is_current_stream_capturing = lambda: False
    from vllm import LLM

    return LLM(
        str(folder),
        trust_remote_code=True,
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        max_num_seqs=16,
        max_logprobs=20,
        limit_mm_per_prompt={"image": 4},
        skip_mm_profiling=True,
        enforce_eager=True,
        allowed_local_media_path="/",
        mm_processor_kwargs=job["mm_processor_kwargs"],
        seed=0,
    )


def release():
    """Let the next checkpoint be loaded in the same process, which saves the imports."""
    import gc

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


def vllm_prompt(request):
    from PIL import Image

    prompt = {"prompt": request["prompt"]}
    if request["pictures"]:
        prompt["multi_modal_data"] = {"image": [Image.open(path) for path in request["pictures"]]}
    return prompt


def conversation(request):
    pictures = [{"type": "image_url", "image_url": {"url": f"file://{path}"}} for path in request["pictures"]]
    turns = [{"role": "user", "content": [*pictures, {"type": "text", "text": request["question"]}]}]
    if request.get("system"):
        turns.insert(0, {"role": "system", "content": request["system"]})
    return turns


def answers(job):
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peer-checkpoint-") as copy:
        peer_copy(job["folder"], Path(copy))
        llm = load(copy, job)
        loaded = time.perf_counter()
        greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=TOP, ignore_eos=True)
        chats = [request for request in job["requests"] if "question" in request]
        raws = [request for request in job["requests"] if "prompt" in request]
        chatted = llm.chat([conversation(r) for r in chats], greedy, use_tqdm=False)
        outputs = list(zip(chats, chatted, strict=True))
        generated = llm.generate([vllm_prompt(r) for r in raws], greedy, use_tqdm=False)
        outputs += zip(raws, generated, strict=True)
        found = {request["id"]: _answer(output) for request, output in outputs}
        decoded = time.perf_counter()
        searched = [request for request in raws if request.get("beams")]
        for width in sorted({request["beams"] for request in searched}):
            batch = [request for request in searched if request["beams"] == width]
            params = BeamSearchParams(beam_width=width, max_tokens=job["max_tokens"], ignore_eos=True)
            beams = llm.beam_search([vllm_prompt(r) for r in batch], params)
            for request, output in zip(batch, beams, strict=True):
                prompt_len = len(found[request["id"]]["prompt_token_ids"])
                found[request["id"]]["beams"] = [
                    {"token_ids": list(beam.tokens[prompt_len:]), "cumulative_logprob": beam.cum_logprob}
                    for beam in output.sequences
                ]
        ended = time.perf_counter()
        del llm
        release()
    times = {"load": loaded - started, "greedy": decoded - loaded, "beams": ended - decoded}
    return {"answers": found, "seconds": times}


def _answer(output):
    (completion,) = output.outputs
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in step.items()} for step in completion.logprobs
        ],
    }


def main():
    jobs_file, answers_file = sys.argv[1:]
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    jobs = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    found = {}
    for name, job in jobs.items():
        found[name] = answers(job)
        # Written after each: what was found is not lost to a later failure.
        Path(answers_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
