"""`LLM`: a model in this process, called with prompts or messages, answering when all are done."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from huoyan.api.driver import Job, default_workers, drive
from huoyan.api.inline import Inline
from huoyan.api.options import parse_options
from huoyan.api.progress import RequestBar
from huoyan.api.requests import (
    Params,
    chat_jobs,
    completion_jobs,
    list_conversations,
    list_params,
    list_prompts,
)
from huoyan.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import os

    from huoyan.api.beam_search import BeamSearchOutput, BeamSearchParams
    from huoyan.api.hf_tokenizer import HFTokenizer
    from huoyan.api.outputs import RequestOutput
    from huoyan.api.runtime import Runtime
    from huoyan.api.sampling_params import SamplingParams

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A MiniCPM-V model, loaded once, answering batches of requests.

        llm = LLM("openbmb/MiniCPM-V-2_6", max_model_len=4096)
        print(llm.ask("plane.jpg", "请描述这张图片"))

    The names and meanings are vLLM's. `model` is a folder, a hub name, `tiny` or `tiny-int4`.

    Keyword arguments:
        dtype: `auto` (the checkpoint's; on a CPU float32 for small models, else bfloat16), `float32`, `float16`,
            `bfloat16`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        max_model_len: tokens of prompt and answer together, at most; None takes the checkpoint's.
        gpu_memory_utilization: the fraction of the card that may be in use, everything together; 1.0 works.
        gpu_memory: "24GiB" instead: what this process takes at most, also of a larger card (or of main memory).
        max_num_seqs, max_num_batched_tokens: sequences, and tokens, of one step at most.
        limit_mm_per_prompt: `{"image": 4}` refuses prompts with more.
        seed: what sampling without a seed of its own starts from.
        enforce_eager: no CUDA graphs.
        capture_at_start: False captures CUDA graphs when they are needed again and again, not before the first request.
        quantization: int4 is read from the checkpoint's files; `awq` is accepted for clarity.
        hub, revision, download_dir: where a hub name comes from and goes to.
        load_format: `dummy` makes random weights up (to measure speed).
        engine: `native`, `vllm`, or `auto`: native on one device, vLLM where one model takes several.
        tensor_parallel_size, pipeline_parallel_size, distributed_executor_backend, kv_cache_dtype, …: vLLM's,
            with `engine="vllm"` (docs/vllm-engine.md).
        mm_processor_kwargs: `{"max_slice_nums": 4}` for every picture that does not say otherwise.
        trust_remote_code: accepted; no code of a checkpoint is ever run.

    An `LLM` may be used from several threads: their calls take turns. Ctrl-C ends a call, not the `LLM`.

    Raises:
        ModelError: the checkpoint is not there, not whole, or not one of the supported models.
        CapacityError: the device is too small for it.
        InputError, UnsupportedError: an option is wrong, or would change the result here.
    """

    def __init__(self, model: str | os.PathLike[str], tokenizer: str | None = None, **options: Any) -> None:
        from huoyan.api.loading import load_runtime

        self._start(load_runtime(parse_options(model, {"tokenizer": tokenizer, **options})))

    @classmethod
    def from_runtime(cls, runtime: Runtime) -> LLM:
        """An `LLM` over a model that is already loaded."""
        llm = cls.__new__(cls)
        llm._start(runtime)
        return llm

    def _start(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="huoyan-prepare")
        self._turn = threading.RLock()
        self._counter = itertools.count()

    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        *,
        prompt_token_ids: Any = None,
        raise_on_error: bool | None = None,
        **other: Any,
    ) -> list[RequestOutput]:
        """Answer one prompt or many, in their order.

        A prompt is text, token ids, or a dict with `prompt` or `prompt_token_ids`, `multi_modal_data` and
        `mm_processor_kwargs`. `multi_modal_data["image"]` is a picture (PIL, array, path, URL, bytes), a
        list of them, or `{"images": frames, "use_image_id": False, "max_slice_nums": 2}`; `["video"]` is an
        array of frames `[frames, height, width, 3]`, a path, or a list. Each picture needs its
        `(<image>./</image>)` in the text, in order.

        Args:
            sampling_params: one for all, or one each; None takes the checkpoint's generation defaults.
            use_tqdm: draw a bar (on a terminal only).
            raise_on_error: whether a wrong prompt raises, or becomes an output with `error` set while the
                others are finished. None raises for a single prompt and reports for several.

        Raises:
            InputError: a prompt is wrong (see `raise_on_error`), or the arguments do not fit together.
        """
        _refuse_adapters(lora_request, other)
        found, alone = list_prompts(prompts, prompt_token_ids)
        params = list_params(sampling_params, len(found), self._defaults(sampling_params))
        jobs = completion_jobs(self._ids(len(found)), found, params)
        return self._run(jobs, use_tqdm, _raises(raise_on_error, alone, len(jobs)))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        raise_on_error: bool | None = None,
        **other: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, in OpenAI's form.

        The content of a message is text or a list of parts: `{"type": "text", "text": …}`,
        `{"type": "image_url", "image_url": {"url": …}}` (also `data:` URLs), `{"type": "video_url", …}`, and
        `{"type": "image", "image": picture}` with an opened picture. Text is text: it cannot forge a
        placeholder or a turn.

        Args and errors as for `generate`.
        """
        _refuse_adapters(lora_request, other)
        conversations, alone = list_conversations(messages)
        options = chat_options(
            chat_template,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs,
            mm_processor_kwargs,
        )
        params = list_params(sampling_params, len(conversations), self._defaults(sampling_params))
        jobs = chat_jobs(self._ids(len(conversations)), conversations, params, options)
        return self._run(jobs, use_tqdm, _raises(raise_on_error, alone, len(jobs)))

    def ask(self, pictures: Any, question: str, *, system: str | None = None, **params: Any) -> str:
        """Ask about a picture, several, or none (`None`), and return the answer's text.

        Args:
            pictures: a path, URL, `Picture`, `Video`, PIL picture or array, or a list of these. Paths and URLs
                that end as videos do (`.mp4`) are videos.
            params: fields of `SamplingParams`; greedy with up to 1024 tokens unless they say otherwise.
        """
        from huoyan.api.ask import ask_messages, ask_params

        output = self.chat(ask_messages(pictures, question, system), ask_params(params), use_tqdm=False)[0]
        return output.outputs[0].text

    def stream(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Answer one conversation and yield its output after every step, cumulative, the last one `finished`.

        Closing the iterator ends the request. While it runs, the other calls of this `LLM` wait.
        """
        conversations, alone = list_conversations(messages)
        if not alone:
            raise InputError("stream takes one conversation: use chat for several, or AsyncLLM")
        params = list_params(sampling_params, 1, self._defaults(sampling_params))
        jobs = chat_jobs(self._ids(1), conversations, params, chat_options(**options))
        with self._turn:
            yield from drive(self._open(), jobs, Inline(), raise_errors=True)

    def run_jobs(
        self, jobs: Iterable[Job | None], *, concurrency: int | None = None, streamed: bool = True
    ) -> Iterator[RequestOutput]:
        """Run requests as they are read from `jobs`, yielding every output as it comes; without `streamed` the last of
        each is enough."""
        with self._turn:
            yield from drive(self._open(), jobs, self._pool, concurrency=concurrency, streamed=streamed)

    def beam_search(
        self, prompts: Any, params: BeamSearchParams, use_tqdm: bool | Callable[..., Any] = False
    ) -> list[BeamSearchOutput]:
        """Today's vLLM call for beam search, run as `SamplingParams(use_beam_search=True)`.

        The beams end as vLLM 0.5.4 ends them: by `length_penalty`, without early stopping.
        """
        from huoyan.api.beam_search import to_beam_search_output

        outputs = self.generate(prompts, params.to_sampling_params(), use_tqdm=use_tqdm)
        tokenizer = self.get_tokenizer()
        return [to_beam_search_output(output, tokenizer) for output in outputs]

    def get_tokenizer(self) -> HFTokenizer:
        """The checkpoint's tokenizer and chat template, with the methods of a transformers tokenizer."""
        from huoyan.api.hf_tokenizer import HFTokenizer

        frontend = self._open().frontend
        return HFTokenizer(frontend.tokenizer, frontend.chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without `sampling_params`: the checkpoint's generation_config.json."""
        return self._open().frontend.default_sampling_params()

    def asked_sampling(self) -> dict[str, Any]:
        """What `ask` uses unless told otherwise: greedy, or how the checkpoint asks to be sampled."""
        return self._open().frontend.asked_sampling()

    @property
    def model(self) -> str:
        """The name it was opened with."""
        return self._open().options.model

    def close(self) -> None:
        """Free the device's memory; the `LLM` cannot be used any more."""
        with self._turn:
            if self._runtime is not None:
                runtime, self._runtime = self._runtime, None  # type: ignore[assignment]
                self._pool.shutdown(wait=False, cancel_futures=True)
                runtime.backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Runtime:
        if self._runtime is None:
            raise InputError("this LLM has been closed: make a new one")
        return self._runtime

    def _defaults(self, given: Params | None) -> SamplingParams:
        from huoyan.api.sampling_params import SamplingParams

        return self.get_default_sampling_params() if given is None else SamplingParams()

    def _ids(self, count: int) -> list[str]:
        return [str(next(self._counter)) for _ in range(count)]

    def _run(
        self, jobs: list[Job], use_tqdm: bool | Callable[..., Any], raise_on_error: bool
    ) -> list[RequestOutput]:
        last: dict[str, RequestOutput] = {}
        # The first token of a request by itself is not to wait for another thread.
        pool = self._pool if len(jobs) > 1 else Inline()
        with self._turn, RequestBar(len(jobs), use_tqdm) as bar:
            runtime, watched = self._open(), bar.counts_tokens
            few = len(jobs) <= runtime.options.max_num_seqs
            for output in drive(
                runtime, jobs, pool, raise_errors=raise_on_error, streamed=watched, in_bulk=few
            ):
                bar.update(output)
                if output.finished:
                    last[output.request_id] = output
        return [last[job.request_id] for job in jobs]


def _raises(asked: bool | None, alone: bool, count: int) -> bool:
    return (alone or count == 1) if asked is None else asked


def chat_options(
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    mm_processor_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    if add_generation_prompt and continue_final_message:
        raise InputError(
            "continue_final_message goes on with the last message: set add_generation_prompt=False with it"
        )
    return {
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "chat_template_kwargs": chat_template_kwargs or {},
        "mm_processor_kwargs": mm_processor_kwargs or {},
    }


_IGNORED = ("priority", "tokenization_kwargs", "chat_template_content_format")


def _refuse_adapters(lora_request: Any, other: Mapping[str, Any]) -> None:
    if lora_request is not None:
        raise UnsupportedError("LoRA adapters are not supported: merge the adapter into the checkpoint")
    for name, value in other.items():
        if name in ("prompt_adapter_request", "guided_options_request", "tools"):
            if value:
                raise UnsupportedError(f"{name} is not supported" + _WAYS_OUT[name])
        elif name not in _IGNORED:
            raise InputError(f"there is no argument {name!r}")


_WAYS_OUT = {
    "prompt_adapter_request": "",
    "guided_options_request": ": use SamplingParams(structured_outputs={'json': schema})",
    "tools": ": this model has no template for tools",
}
