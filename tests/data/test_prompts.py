"""`PromptBuilder`: exact ids of the chat template, system prompt, plain text, length filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.data.config import DataConfig, OverlongPrompts
from rlhf.data.examples import Example, Message
from rlhf.data.prompts import PromptBuilder, chat
from rlhf.errors import UserError
from rlhf.models import ModelConfig, load_tokenizer, resolve

STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}X"


def example(prompt: str | list[Message], index: int = 0) -> Example:
    return Example(id=f"s:{index}", source="s", prompt=prompt, answer="32", key="k", row={"column": index})


def builder(folder: Path, data: DataConfig | None = None, **model: Any) -> PromptBuilder:
    config = ModelConfig(path=str(folder), **model)
    return PromptBuilder(load_tokenizer(resolve(config), config), data or DataConfig(), config)


def test_text_and_ids_of_one_prompt(tiny_llama: Path) -> None:
    data = DataConfig(system_prompt="Be brief.")
    (prompt,) = builder(tiny_llama, data).build([example("What is 11 + 21?")]).prompts
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 11 + 21?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.token_ids.count(1) == 3
    assert prompt.token_ids[0] == 1, "the template's own <|im_start|>, and no second one before it"
    assert prompt.token_ids[1] != 1
    assert (prompt.id, prompt.source, prompt.answer, prompt.row) == ("s:0", "s", "32", {"column": 0})


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen"])
def test_ids_are_those_of_the_template(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    config = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(resolve(config), config)
    examples = [example(text, i) for i, text in enumerate(["a", "né  7", "x\n\ty", "<|im_end|>"])]
    for given, prompt in zip(examples, builder(folder).build(examples).prompts):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": given.text}], add_generation_prompt=True, return_dict=False
        )
        assert prompt.token_ids == expected
        assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_turns_are_kept_and_their_system_turn_wins() -> None:
    turns = [
        {"role": "system", "content": "own"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    data = DataConfig(system_prompt="common", template="<{prompt}>")
    assert [turn["content"] for turn in chat(example(turns), data)] == ["own", "a", "b", "<c>"]
    assert [turn["content"] for turn in chat(example(turns[1:]), data)] == ["common", "a", "b", "<c>"]
    assert turns[3]["content"] == "c", "the data are not changed"


def test_template_text_is_taken_literally() -> None:
    data = DataConfig(template="{prompt}\nPut it in \\boxed{} {answer}.")
    text = chat(example("Solve {x}."), data)[0]["content"]
    assert text == "Solve {x}.\nPut it in \\boxed{} {answer}."


def test_template_override_inline_and_from_a_file_with_arguments(tiny_llama: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ '<think>' if think else '' }}"
    file = tmp_path / "own.jinja"
    file.write_text(template)
    for given in (template, str(file)):
        for think, expected in ((True, "[hi]<think>"), (False, "[hi]")):
            build = builder(tiny_llama, chat_template=given, chat_template_args={"think": think})
            assert build.render(example("hi")) == expected


def test_plain_text_for_base_models(tiny_llama: Path) -> None:
    data = DataConfig(system_prompt="Q and A.", template="Q: {prompt}\nA:")
    (prompt,) = builder(tiny_llama, data, chat_template="none").build([example("1 + 1")]).prompts
    assert prompt.text == "Q and A.\n\nQ: 1 + 1\nA:"
    assert 1 not in prompt.token_ids


def test_no_template_and_none_asked_for(tiny_llama: Path) -> None:
    config = ModelConfig(path="some/base")
    tokenizer = load_tokenizer(resolve(ModelConfig(path=str(tiny_llama))), config)
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"model.path=some/base has no chat template .*set model.chat_template to a .jinja"
    ):
        PromptBuilder(tokenizer, DataConfig(), config)


def test_template_that_refuses_a_system_turn(tiny_llama: Path) -> None:
    build = builder(tiny_llama, DataConfig(system_prompt="Be brief."), chat_template=STRICT)
    with pytest.raises(
        UserError,
        match=r"the chat template refuses s:0 with turns of system, user \(no system turn\): change data",
    ):
        build.build([example("hi")])


def test_long_prompts_are_left_out_and_counted(tiny_llama: Path) -> None:
    """Around a user's turn: 3 special tokens, "user", "assistant" and 3 line ends, a token a byte: 19."""
    examples = [example("x" * n, n) for n in (1, 5, 6, 7, 100)]
    built = builder(tiny_llama, DataConfig(max_prompt_tokens=19 + 6)).build(examples)
    frame = len(builder(tiny_llama).build([example("x")]).prompts[0].token_ids) - 1
    assert frame == 19
    assert [prompt.row["column"] for prompt in built.prompts] == [1, 5, 6]
    assert (built.overlong, built.longest) == (2, 119)
    assert built.line() == "3 prompts, the longest of 119 tokens; 2 over 25 tokens left out"


def test_long_prompt_can_stop_the_run(tiny_llama: Path) -> None:
    data = DataConfig(max_prompt_tokens=28, overlong_prompts=OverlongPrompts.fail)
    with pytest.raises(
        UserError, match=r"the prompt of s:1 has 29 tokens, over data.max_prompt_tokens=28: raise it"
    ):
        builder(tiny_llama, data).build([example("x"), example("x" * 10, 1)])


def test_all_prompts_too_long(tiny_llama: Path) -> None:
    with pytest.raises(
        UserError, match=r"all 2 prompts exceed data.max_prompt_tokens=5 \(the longest has 22 tokens\)"
    ):
        builder(tiny_llama, DataConfig(max_prompt_tokens=5)).build([example("x"), example("xyz")])


def test_more_prompts_than_one_chunk_keep_their_order(tiny_llama: Path) -> None:
    built = builder(tiny_llama).build([example(str(i), i) for i in range(2500)])
    assert [prompt.row["column"] for prompt in built.prompts] == list(range(2500))
    assert builder(tiny_llama).build([]).prompts == []
