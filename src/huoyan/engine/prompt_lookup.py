"""Guesses of what follows, by prompt lookup (Saxena 2023): what followed the same tokens before.

Guesses cost a little where they are wrong, so a sequence whose guesses keep failing makes fewer and shorter ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from huoyan.engine.sequence import Group
    from huoyan.engine.sequence import Sequence as EngineSequence
    from huoyan.engine.speculation import NgramSpeculation

PLACES = 32
"""Latest places of the same tokens that are compared."""
PATIENCE = 3
"""Drafts without a right token before a sequence pauses."""
SHORTEST_REST, LONGEST_REST = 8, 64
"""Tokens that it goes on without drafts: twice as many each time, so that useless drafts cost a 64th of the steps."""


class PromptLookup:
    """Finds in the tokens of one sequence what its last tokens were followed by before."""

    def __init__(self, longest: int, shortest: int, ids: Iterable[int] = ()) -> None:
        """`longest` and `shortest`: how many of the last tokens must agree."""
        self._longest = longest
        self._shortest = shortest
        self._ids = list(ids)
        self._indexed = shortest - 1
        self._places: dict[tuple[int, ...], list[int]] = {}
        """By each `shortest` neighbours: the positions that follow them."""

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, ids: Iterable[int]) -> None:
        self._ids.extend(ids)

    def find(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest agreeing end, of several places at the latest one.

        Where that place is so near that its continuation runs into the end of the sequence, it goes on with itself:
        a repetition is guessed as going on.
        """
        ids, end = self._ids, len(self._ids)
        # The end itself is indexed when more has followed it.
        for i in range(self._indexed + 1, end):
            self._places.setdefault(tuple(ids[i - self._shortest : i]), []).append(i)
        self._indexed = max(self._indexed, end - 1)
        best, best_agree = 0, 0
        for place in reversed(self._places.get(tuple(ids[end - self._shortest :]), [])[-PLACES:]):
            agree = self._shortest
            while agree < min(self._longest, place) and ids[place - 1 - agree] == ids[end - 1 - agree]:
                agree += 1
            if agree > best_agree:
                best, best_agree = place, agree
                if agree == self._longest:
                    break
        if not best_agree:
            return []
        period = end - best
        return [ids[best + i % period] for i in range(most)]


class _Pace:
    """How long the next draft of a sequence may be."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._next = most
        self._failures = 0
        self._resume_at = 0

    def length(self, num_output: int) -> int:
        return self._next if num_output >= self._resume_at else 0

    def learn(self, drafted: int, right: int, num_output: int) -> None:
        if right:
            self._failures = 0
            self._next = min(self._most, 2 * self._next if right == drafted else right + 1)
            return
        self._failures += 1
        self._next = max(self._next // 2, 1)
        if self._failures >= PATIENCE:
            rest = min(SHORTEST_REST << (self._failures - PATIENCE), LONGEST_REST)
            self._resume_at = num_output + rest


class Speculator:
    """Drafts for one engine's sequences, and what became of them."""

    def __init__(self, config: NgramSpeculation) -> None:
        self.config = config
        self.drafted = 0
        self.accepted = 0
        """Tokens so far."""
        self._states: dict[Group, tuple[PromptLookup, _Pace]] = {}

    def propose(self, seq: EngineSequence, most: int) -> list[int]:
        """Up to `most` tokens that may follow; none that would end the answer, whose turn is not over by a guess."""
        group = seq.group
        state = self._states.get(group)
        if state is None:
            config = self.config
            lookup = PromptLookup(
                config.prompt_lookup_max, config.prompt_lookup_min, group.prompt_ids.tolist()
            )
            state = self._states[group] = (lookup, _Pace(config.num_speculative_tokens))
        lookup, pace = state
        most = min(most, pace.length(len(seq.output_ids)))
        if most < 1:
            return []
        lookup.extend(seq.output_ids[len(lookup) - group.prompt_len :])
        draft = lookup.find(most)
        rules = seq.answer.rules
        for i, token in enumerate(draft):
            if token == rules.eos_token_id or token in rules.token_ids or token in rules.held_back:
                return draft[:i]
        return draft

    def is_guessing(self, group: Group) -> bool:
        """Whether the group's next step may verify guesses: then the host must know its tokens first."""
        if group.width > 1:
            return False
        state = self._states.get(group)
        return state is None or state[1].length(len(group.sequences[0].output_ids)) > 0

    def learn(self, seq: EngineSequence, drafted: Sequence[int], right: int) -> None:
        """The first `right` tokens of a draft were right; `seq` has them."""
        self.drafted += len(drafted)
        self.accepted += right
        if seq.group in self._states:
            self._states[seq.group][1].learn(len(drafted), right, len(seq.output_ids))

    def forget(self, group: Group) -> None:
        """The group has ended."""
        self._states.pop(group, None)
