"""The processor class that vLLM asks for; it takes only the tokenizer from it."""

from transformers.processing_utils import ProcessorMixin


class MiniCPMVProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **_):
        super().__init__(image_processor, tokenizer)
