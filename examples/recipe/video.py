"""The recipe's third script (video). Its import, its paths and its frame reader (decord, no longer kept up) are
changed; huoyan samples as it did, one frame a second and then at most MAX_NUM_FRAMES of them evenly."""

import os
import sys
from pathlib import Path

import huoyan
from huoyan import LLM, SamplingParams, Video

MODEL_NAME = sys.argv[1] if len(sys.argv) > 1 else "tiny"
ENGINE = os.environ.get("ENGINE", "native")
MAX_NUM_FRAMES = 16
file = sys.argv[2] if len(sys.argv) > 2 else Path(huoyan.__file__).parent / "tiny/media/car.mp4"

llm = LLM(model=MODEL_NAME, engine=ENGINE, gpu_memory_utilization=0.95, max_model_len=4096)
tokenizer = llm.get_tokenizer()
stop_tokens = ["<|im_end|>", "<|endoftext|>"]
stop_token_ids = [tokenizer.convert_tokens_to_ids(i) for i in stop_tokens]

frames = [frame.to_pil() for frame in Video.open(file).sample(max_frames=MAX_NUM_FRAMES).frames]
messages = [
    {
        "role": "user",
        "content": "".join(["(<image>./</image>)"] * len(frames)) + "\nPlease describe this video.",
    }
]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

sampling_params = SamplingParams(
    stop_token_ids=stop_token_ids,
    use_beam_search=False,
    temperature=0.7,
    top_p=0.8,
    top_k=100,
    max_tokens=512,
)

outputs = llm.generate(
    {
        "prompt": prompt,
        "multi_modal_data": {
            "image": {
                "images": frames,
                "use_image_id": False,
                "max_slice_nums": 1 if len(frames) > 16 else 2,
            }
        },
    },
    sampling_params=sampling_params,
)
print(outputs[0].outputs[0].text)
