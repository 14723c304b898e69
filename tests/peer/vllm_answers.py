"""Run in the peer environment: answers of vLLM to the requests of a JSON file.

usage: python vllm_answers.py JOBS.json ANSWERS.json

A job names a checkpoint folder and its requests; each is a conversation or a raw prompt, with picture files.
vLLM runs the folder as it is, by the plugin; everything behind the pictures' patches is its own.
"""

import json
import os
import sys
import time
from pathlib import Path

TOP = 5


def load(job):
    from vllm import LLM

    return LLM(
        job["folder"],
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
    llm = load(job)
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
    # Several checkpoints one after the other in one process save the imports.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    jobs = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    found = {}
    for name, job in jobs.items():
        found[name] = answers(job)
        # Written after each: what was found is not lost to a later failure.
        Path(answers_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
