"""A finished request in the shape of OpenAI's `chat.completion` object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huoyan.errors import HuoyanError, InputError

if TYPE_CHECKING:
    from huoyan.api.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs


def chat_completion(output: RequestOutput, model: str, created: int) -> dict[str, Any]:
    """The body of a response. `created` is in seconds since 1970."""
    completion = sum(len(answer.token_ids) for answer in output.outputs)
    prompt = len(output.prompt_token_ids)
    return {
        "id": f"chatcmpl-{output.request_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice(answer) for answer in output.outputs],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def choice(answer: CompletionOutput) -> dict[str, Any]:
    """One answer."""
    return {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "logprobs": None if answer.logprobs is None else {"content": _token_list(answer)},
    }


def error_body(error: HuoyanError) -> dict[str, Any]:
    """What a server answers where the request is wrong or the engine failed."""
    kind = "invalid_request_error" if isinstance(error, InputError) else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.http_status}}


def _token_list(answer: CompletionOutput) -> list[dict[str, Any]]:
    assert answer.logprobs is not None
    return [
        {**_entry(token, found[token]), "top_logprobs": _top(found)}
        for token, found in zip(answer.token_ids, answer.logprobs, strict=False)
        if token in found
    ]


def _top(found: TokenLogprobs) -> list[dict[str, Any]]:
    ranked = sorted(found.items(), key=lambda item: -item[1].logprob)
    return [_entry(token, logprob) for token, logprob in ranked]


def _entry(token: int, logprob: Logprob) -> dict[str, Any]:
    text = f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token
    return {"token": text, "logprob": logprob.logprob, "bytes": list(text.encode("utf-8"))}
