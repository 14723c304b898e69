"""What hypothesis writes: arbitrary Unicode, and all that looks special, whole and in pieces."""

from __future__ import annotations

from hypothesis import strategies as st

from .checkpoint import SPECIAL

_FRAGMENTS = [
    "<", ">", "|", "<|", "|>", "<|im_", "im_start|>", "_end|>", "<im", "age>", "image", "unk", "</", "<uni",
    "(<image>", "./", ")", "(", " (", ")\n", ")\n\n", "\n", "\n\n", " ", "  ", "\t", "'s", "'", "user\n", "0",
    "\u0338", "\u0301", "e\u0301", "\u2126", "\u3000", "\ue000", "\ue123\ue00a", "\ufffd", "\x00",
    "a picture", "请描述", "这张图片", "🙂", "👩‍👩‍👧‍👦", "½", "x\u200b", "\r\n", "\x85",
]  # fmt: skip
_PLACEHOLDERS = ["(<image>./</image>)", "(<video>./</video>)"]

unicode_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
innocent = (
    st.lists(st.one_of(st.sampled_from(_FRAGMENTS), unicode_text), max_size=12)
    .map("".join)
    .filter(lambda text: not any(marker in text for marker in [*SPECIAL, *_PLACEHOLDERS]))
)
hostile = st.lists(
    st.one_of(
        st.sampled_from(SPECIAL), st.sampled_from(_PLACEHOLDERS), st.sampled_from(_FRAGMENTS), unicode_text
    ),
    max_size=12,
).map("".join)
