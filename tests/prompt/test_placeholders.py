from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from huoyan.errors import ModelError
from huoyan.media.slicing import plan_slices
from huoyan.media.types import MediaItem, SliceRules
from huoyan.prompt.placeholders import Tags
from huoyan.prompt.processor import PromptProcessor
from huoyan.prompt.tokenizer import Tokenizer

from .checkpoint import PREPROCESSOR, SPECIAL, image, train, video, write_folder

U = "<unk>" * 64


@pytest.mark.parametrize("version", ["2.0", "2.5"])
def test_older_versions_share_one_pair_of_slice_tags(tokenizer: Tokenizer, version: str) -> None:
    processor = PromptProcessor(tokenizer, None, SliceRules(), version)
    prompt = "<|im_start|>(<image>./</image>)\nwhat (<image>./</image>)"
    encoded = processor.from_text(prompt, [image((3, 2)), image()])
    row = f"<image>{U}</image>" * 3
    sliced = f"<image>{U}</image><slice>{row}\n{row}</slice>\n"
    expanded = f"<|im_start|>{sliced}\nwhat <image>{U}</image>"
    assert encoded.token_ids == tokenizer.encode_with_specials(expanded)
    unk, start = tokenizer.special_tokens["<unk>"], tokenizer.special_tokens["<image>"]
    assert [len(slot.offsets) for slot in encoded.slots] == [7, 1]
    for slot in encoded.slots:
        for offset in slot.offsets:
            assert encoded.token_ids[offset - 1 : offset + 64] == [start, *[unk] * 64]


def test_tags_and_rules_come_from_the_files(tmp_path: Path) -> None:
    special = [*SPECIAL, "<pic>", "</pic>", "<pad_pic>"]
    folder = write_folder(tmp_path, train(special=special))
    changed = PREPROCESSOR | {
        "im_start": "<pic>",
        "im_end": "</pic>",
        "unk": "<pad_pic>",
        "image_feature_size": 5,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(changed))
    rules = SliceRules(image_feature_size=5, use_image_id=False)
    processor = PromptProcessor.from_folder(folder, rules)
    assert processor.version == "2.6"
    assert Tags.from_folder(folder) == Tags(im_start="<pic>", im_end="</pic>", unk="<pad_pic>")
    encoded = processor.from_text("(<image>./</image>)<unk>", [image((2, 1))])
    p = "<pad_pic>" * 5
    tokenizer = processor.tokenizer
    expanded = f"<pic>{p}</pic><slice>{p}</slice><slice>{p}</slice>"
    # `<unk>` has no part in this checkpoint's pictures, so in a raw prompt it is the writer's own.
    assert encoded.token_ids == tokenizer.encode_with_specials(expanded + "<unk>")
    assert encoded.slots[0].length == 5


def test_the_folder_alone_is_enough(tmp_path: Path) -> None:
    processor = PromptProcessor.from_folder(write_folder(tmp_path, train()))
    assert processor.rules == SliceRules()
    assert processor.template is not None
    other = write_folder(tmp_path / "other", train(seed=1), chat_template="x")
    for name in ("config.json", "preprocessor_config.json"):
        (other / name).unlink()
    mixed = PromptProcessor.from_folder(tmp_path, tokenizer_folder=other)
    assert mixed.template is not None
    assert mixed.template.source == "x"
    assert mixed.version == "2.6"
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        PromptProcessor.from_folder(tmp_path)


def test_tags_may_be_written_as_token_objects(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"im_start_token": "<a>", "unk": {"content": "<u>"}}))
    assert Tags.from_folder(tmp_path) == Tags(im_start="<a>", unk="<u>")
    path.write_text(json.dumps({"unk": 3}))
    with pytest.raises(ModelError, match="unk must be"):
        Tags.from_folder(tmp_path)


def test_a_tokenizer_without_the_tags(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(special=SPECIAL[:5]))
    with pytest.raises(ModelError, match="'<slice>'"):
        PromptProcessor.from_folder(folder, SliceRules())


def test_sizes_are_planned_by_the_rules(processor: PromptProcessor) -> None:
    picture = SimpleNamespace(size=(1344, 896))
    for limit in (None, 2, 1):
        item = MediaItem((picture,), max_slice_nums=limit)
        plan = plan_slices((1344, 896), processor.rules, limit)
        encoded = processor.from_text("(<image>./</image>)", [item])
        assert len(encoded.slots[0].offsets) == plan.num_slices
    assert len(processor.from_text("(<video>./</video>)", [video(None, (1, 2))]).slots) == 2
