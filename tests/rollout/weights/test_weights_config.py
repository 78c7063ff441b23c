"""Configuration, the plugin's lightness, and errors that cross processes."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from rollout.weights.config import Transport, WeightsConfig
from rollout.weights.errors import ProbeError, WeightTransferError


def test_defaults_are_valid() -> None:
    assert WeightsConfig().check() == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"readback_columns": -2},
            "weights.readback_columns=-2 must be at least -1: use 0 to read everything back, "
            "-1 to read nothing.",
        ),
        (
            {"tolerance": -0.5},
            "weights.tolerance=-0.5 must be at least 0: use 0 for the format's own.",
        ),
    ],
)
def test_bad_values_are_one_sentence(values: dict[str, float], sentence: str) -> None:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(WeightsConfig), values))
    assert isinstance(config, WeightsConfig)
    assert config.check() == [sentence]


@pytest.mark.parametrize(
    ("on_gpu", "shares_gpu", "expected"),
    [(False, False, Transport.shm), (True, True, Transport.ipc), (True, False, Transport.nccl)],
)
def test_auto_takes_what_fits(on_gpu: bool, shares_gpu: bool, expected: Transport) -> None:
    assert WeightsConfig().resolve(on_gpu=on_gpu, shares_gpu=shares_gpu) is expected
    assert WeightsConfig(transport=expected).resolve(on_gpu=on_gpu, shares_gpu=shares_gpu) is expected


@pytest.mark.parametrize(
    ("transport", "on_gpu", "shares_gpu", "sentence"),
    [
        ("nccl", False, False, "weights.transport=nccl cannot serve engines on a CPU: use shm or auto."),
        (
            "nccl",
            True,
            True,
            "weights.transport=nccl cannot serve engines on a GPU that the learner shares: use ipc or auto.",
        ),
        (
            "ipc",
            True,
            False,
            "weights.transport=ipc cannot serve engines on a GPU of their own: use nccl or auto.",
        ),
    ],
)
def test_a_transport_that_does_not_fit_is_refused(
    transport: str, on_gpu: bool, shares_gpu: bool, sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the whole sentence is compared
        WeightsConfig(transport=Transport(transport)).resolve(on_gpu=on_gpu, shares_gpu=shares_gpu)
    assert str(caught.value) == sentence


def test_tolerances_go_by_format() -> None:
    limits = [WeightsConfig().limit(dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert limits == sorted(limits)
    assert WeightsConfig().limit("float32", "bfloat16") == WeightsConfig().limit("bfloat16") == 0.2
    assert WeightsConfig(tolerance=0.5).limit("float32", "bfloat16") == 0.5


def test_engines_that_cannot_open_the_learners_memory_read_it_over_the_network() -> None:
    assert WeightsConfig().resolve(one_machine=False) is Transport.tcp
    assert WeightsConfig(transport=Transport.tcp).resolve() is Transport.tcp
    sentence = "weights.transport=shm cannot serve engines on a CPU of another machine: use tcp or auto."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        WeightsConfig(transport=Transport.shm).resolve(one_machine=False)
    with pytest.raises(ValueError, match="tcp cannot serve engines on a GPU of their own: use nccl or auto"):
        WeightsConfig(transport=Transport.tcp).resolve(on_gpu=True)


@pytest.mark.parametrize("kind", [WeightTransferError, ProbeError])
def test_errors_cross_processes(kind: type[Exception]) -> None:
    assert str(pickle.loads(pickle.dumps(kind("what happened")))) == "what happened"


def test_plugin_is_light_and_can_be_called_again() -> None:
    program = (
        "import sys\n"
        "from rollout.weights.plugin import RECEIVERS, register\n"
        "register(); register()\n"
        "from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory\n"
        "heavy = {'trainer', 'hydra', 'rollout.weights.receiver'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
        "print([factory._registry[transport]().__name__ for transport in RECEIVERS])\n"
    )
    pytest.importorskip("vllm", reason="vLLM is not installed")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[]", "['ShmReceiver', 'TcpReceiver']"]
