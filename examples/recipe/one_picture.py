"""The recipe's first script (one picture, beam search of three), with its import and its paths changed."""

import os
import sys
from pathlib import Path

from PIL import Image

import huoyan
from huoyan import LLM, SamplingParams

MODEL_NAME = sys.argv[1] if len(sys.argv) > 1 else "tiny"
ENGINE = os.environ.get("ENGINE", "native")
IMAGES = [sys.argv[2] if len(sys.argv) > 2 else Path(huoyan.__file__).parent / "tiny/media/airplane.jpg"]

image = Image.open(IMAGES[0]).convert("RGB")

llm = LLM(
    model=MODEL_NAME, engine=ENGINE, gpu_memory_utilization=1, trust_remote_code=True, max_model_len=2048
)
tokenizer = llm.get_tokenizer()

messages = [{"role": "user", "content": "(<image>./</image>)\n" + "请描述这张图片"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

stop_tokens = ["<|im_end|>", "<|endoftext|>"]
stop_token_ids = [tokenizer.convert_tokens_to_ids(i) for i in stop_tokens]

sampling_params = SamplingParams(
    stop_token_ids=stop_token_ids,
    max_tokens=1024,
    temperature=0,
    use_beam_search=True,
    best_of=3,
)

outputs = llm.generate(
    {"prompt": prompt, "multi_modal_data": {"image": image}}, sampling_params=sampling_params
)
print(outputs[0].outputs[0].text)
