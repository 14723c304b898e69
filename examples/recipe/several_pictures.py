"""The recipe's second script (several pictures), with its import and its paths changed."""

import os
import sys
from pathlib import Path

from PIL import Image

import huoyan
from huoyan import LLM, SamplingParams

MODEL_NAME = sys.argv[1] if len(sys.argv) > 1 else "tiny"
ENGINE = os.environ.get("ENGINE", "native")
media = Path(huoyan.__file__).parent / "tiny/media"
files = sys.argv[2:] or [media / "stars.jpg", media / "stars_later.jpg"]
images = [Image.open(file).convert("RGB") for file in files]

llm = LLM(
    model=MODEL_NAME, engine=ENGINE, trust_remote_code=True, gpu_memory_utilization=1, max_model_len=2048
)
tokenizer = llm.get_tokenizer()

messages = [
    {
        "role": "user",
        "content": "(<image>./</image>)\n" * len(images) + "What changed between the two pictures?",
    }
]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

inputs = {"prompt": prompt, "multi_modal_data": {"image": images}}

stop_tokens = ["<|im_end|>", "<|endoftext|>"]
stop_token_ids = [tokenizer.convert_tokens_to_ids(i) for i in stop_tokens]
sampling_params = SamplingParams(
    stop_token_ids=stop_token_ids, use_beam_search=True, temperature=0, best_of=3, max_tokens=64
)

outputs = llm.generate(inputs, sampling_params=sampling_params)
print(outputs[0].outputs[0].text)
