"""vLLM's exceptions in one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an exception of vLLM says, without the frame that pydantic puts around it."""
    text = str(error)
    if "Value error, " in text:
        text = text.split("Value error, ", 1)[1].split(" [type=", 1)[0]
    elif "[type=" in text:
        # pydantic: the number of errors, then for each its field and, indented, what is wrong with it.
        parts = text.split(" [type=", 1)[0].splitlines()[1:]
        text = ": ".join(part.strip() for part in parts)
    words = " ".join(text.split()) or type(error).__name__
    return words if len(words) <= 400 else words[:399] + "…"


def is_refusal(error: BaseException) -> bool:
    """Whether vLLM says that what it was given is wrong: 0.26 raises ValueErrors, 0.32 has a family of its own."""
    family = {base.__name__ for base in type(error).__mro__}
    return not family.isdisjoint({"ValueError", "TypeError", "NotImplementedError", "VLLMClientError"})
