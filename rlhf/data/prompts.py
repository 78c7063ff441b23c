"""`PromptBuilder`: examples -> `Prompt`s, through the chat template, with the length filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.data.config import DataConfig, OverlongPrompts
from rlhf.data.examples import Example, Message
from rlhf.errors import UserError
from rlhf.models import PLAIN_TEMPLATE, ModelConfig
from rollout.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024
"""Prompts tokenized in one call."""


@dataclass(slots=True, kw_only=True)
class BuiltPrompts:
    """Rendered prompts, and what the length filter did."""

    prompts: list[Prompt]
    overlong: int
    """Examples left out because their prompt exceeds `limit`."""
    longest: int
    """Tokens of the longest prompt seen, left out or not."""
    limit: int

    def line(self) -> str:
        """The filter's work in one line for the console."""
        found = f"{len(self.prompts)} prompts, the longest of {self.longest} tokens"
        return found + (f"; {self.overlong} over {self.limit} tokens left out" if self.overlong else "")


class PromptBuilder:
    """Writes prompts the way that one model wants them.

    The tokenizer's chat template (already overridden by `load_tokenizer` where `model.chat_template` says so)
    is rendered to text, and the ids are those of that text with nothing added: the template brings its own
    special tokens. With `model.chat_template=none` a prompt is plain text and the tokenizer adds what it
    always adds (a BOS, for models that have one).
    Raises `UserError` when the model has no template and plain text was not asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, model: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._plain = model.chat_template == PLAIN_TEMPLATE
        self._template_args: dict[str, Any] = dict(model.chat_template_args)
        if not self._plain and not tokenizer.chat_template:
            raise UserError(
                f"model.path={model.path} has no chat template (a base model?): set model.chat_template to a "
                f".jinja file, or to {PLAIN_TEMPLATE} for plain text."
            )

    def build(self, examples: Sequence[Example]) -> BuiltPrompts:
        """Render and tokenize every example, in order; prompts over `data.max_prompt_tokens` are counted out.

        Raises `UserError` when the template refuses a conversation, when nothing is left, or, under
        `data.overlong_prompts=fail`, at the first prompt over the limit.
        """
        limit = self._data.max_prompt_tokens
        built = BuiltPrompts(prompts=[], overlong=0, longest=0, limit=limit)
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            texts = [self.render(example) for example in chunk]
            for example, text, ids in zip(chunk, texts, self._encode(texts)):
                built.longest = max(built.longest, len(ids))
                if len(ids) <= limit:
                    built.prompts.append(_prompt(example, text, ids))
                elif self._data.overlong_prompts is OverlongPrompts.drop:
                    built.overlong += 1
                else:
                    raise UserError(
                        f"the prompt of {example.id} has {len(ids)} tokens, over data.max_prompt_tokens="
                        f"{limit}: raise it, or set data.overlong_prompts=drop."
                    )
        if examples and not built.prompts:
            raise UserError(
                f"all {len(examples)} prompts exceed data.max_prompt_tokens={limit} (the longest has "
                f"{built.longest} tokens): raise it."
            )
        return built

    def render(self, example: Example) -> str:
        """The text that the model sees, up to where its own turn begins."""
        messages = chat(example, self._data)
        if self._plain:
            return "\n\n".join(message["content"] for message in messages)
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._template_args
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses {example.id} with turns of {roles} ({error}): change "
                f"data.system_prompt, the data, or model.chat_template."
            ) from None
        return str(text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=self._plain)["input_ids"]
        return [list(ids) for ids in encoded]


def chat(example: Example, data: DataConfig) -> list[Message]:
    """The turns of a prompt: `data.system_prompt` unless they bring one, `data.template` around the user's
    last."""
    turns = (
        [{"role": "user", "content": example.prompt}]
        if isinstance(example.prompt, str)
        else list(example.prompt)
    )
    last = data.template.replace("{prompt}", turns[-1]["content"])
    turns[-1] = {**turns[-1], "content": last}
    if data.system_prompt and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": data.system_prompt})
    return turns


def _prompt(example: Example, text: str, ids: list[int]) -> Prompt:
    return Prompt(
        id=example.id,
        token_ids=ids,
        text=text,
        answer=example.answer,
        source=example.source,
        row=example.row,
    )
