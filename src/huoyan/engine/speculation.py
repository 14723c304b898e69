"""What one may ask of prompt-lookup speculation (vLLM's `speculative_config` of the method "ngram")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huoyan.errors import InputError, UnsupportedError

_NAMES = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
_DEFAULT_LOOKUP = 5


@dataclass(frozen=True)
class NgramSpeculation:
    """Guess what follows the last tokens: what followed them where prompt or answer had them before.

    Guesses are verified, so answers do not change; where an answer repeats its prompt, or itself, a step gives
    several tokens.
    """

    num_speculative_tokens: int
    """Tokens guessed at once, at most."""
    prompt_lookup_max: int = _DEFAULT_LOOKUP
    """Last tokens that are looked for: of several places the one that agrees in most of them, up to so many."""
    prompt_lookup_min: int = _DEFAULT_LOOKUP
    """A place must agree in so many."""

    def __post_init__(self) -> None:
        for name in _NAMES[1:]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(
                    f"speculative_config: {name} must be a whole number of at least 1 (got {value!r})"
                )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise InputError(
                f"speculative_config: prompt_lookup_min ({self.prompt_lookup_min}) is above prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )

    @staticmethod
    def parse(config: Mapping[str, Any] | None) -> NgramSpeculation | None:
        """Of vLLM's dictionary, with vLLM's defaults: one of the two lengths stands for both, none for 5.

        Raises:
            InputError: a name or a number is wrong.
            UnsupportedError: another method.
        """
        if config is None:
            return None
        if not isinstance(config, Mapping):
            raise InputError(
                'speculative_config is a dictionary such as {"method": "ngram", "num_speculative_tokens": 5} '
                f"(got {config!r})"
            )
        given = {name: value for name, value in config.items() if value is not None}
        method = given.get("method", given.get("model"))
        if method not in ("ngram", "[ngram]"):
            raise UnsupportedError(
                f"speculative_config: huoyan speculates by prompt lookup only (method 'ngram', not {method!r})"
            )
        unknown = set(given) - {*_NAMES, "model"}
        if unknown:
            raise InputError(f"speculative_config has no {min(unknown)!r} here: give {', '.join(_NAMES[1:])}")
        if "num_speculative_tokens" not in given:
            raise InputError("speculative_config needs num_speculative_tokens: how many to guess at once")
        longest = given.get("prompt_lookup_max", given.get("prompt_lookup_min", _DEFAULT_LOOKUP))
        shortest = given.get("prompt_lookup_min", longest)
        return NgramSpeculation(given["num_speculative_tokens"], longest, shortest)
