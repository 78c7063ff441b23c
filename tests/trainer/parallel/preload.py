"""What every rank of a test needs, imported once by the server that ranks are forked from."""

import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

import trainer.parallel.leader  # noqa: F401
