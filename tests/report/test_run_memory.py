from __future__ import annotations

import mmap
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from rlhf.clock import Clock
from rlhf.memory import MemoryMonitor, device_metrics, pss, rss, tree
from rlhf.metrics import unknown

MIB = 2**20
SIZE = 128 * MIB
HOLD = f"b = bytearray(b'x') * {SIZE}; print('ready', flush=True); input()"


@contextmanager
def _child(code: str) -> Iterator[psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield psutil.Process(process.pid)
    finally:
        process.communicate(b"\n")


def test_tree_holds_the_children() -> None:
    before = rss(tree())
    with _child(HOLD) as child:
        assert child.pid in [p.pid for p in tree()]
        assert SIZE < rss(tree()) - before < SIZE + 64 * MIB
    assert child.pid not in [p.pid for p in tree()]


def test_ended_process_counts_nothing() -> None:
    with _child("print(flush=True); input()") as child:
        pass
    assert rss([child]) == 0
    assert pss([child]) == 0


def _touch(
    shared: mmap.mmap, ready: multiprocessing.synchronize.Event, done: multiprocessing.synchronize.Event
) -> None:
    assert all(shared[i] == 1 for i in range(0, SIZE, 4096))
    ready.set()
    done.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="PSS is known on Linux only")
def test_shared_pages_count_once_in_pss_and_twice_in_rss() -> None:
    context = multiprocessing.get_context("fork")
    with mmap.mmap(-1, SIZE) as shared:
        shared.write(b"\x01" * SIZE)
        ready, done = context.Event(), context.Event()
        alone_rss, alone_pss = rss(tree()), pss(tree())
        child = context.Process(target=_touch, args=(shared, ready, done))
        child.start()
        ready.wait()
        both_rss, both_pss = rss(tree()), pss(tree())
        done.set()
        child.join()
    assert alone_pss is not None
    assert both_pss is not None
    assert both_rss - alone_rss > SIZE
    assert both_pss - alone_pss < SIZE / 4


def test_peak_inside_a_step_and_a_phase_is_seen() -> None:
    clock = Clock()
    with MemoryMonitor(interval=0.02, phase=lambda: clock.phase) as monitor:
        with clock("update"):
            block = bytearray(b"x") * SIZE
            time.sleep(0.4)
            del block
        with clock("rollout"):
            time.sleep(0.2)
        first = monitor.metrics()
        time.sleep(0.2)
        second = monitor.metrics()
    assert unknown(first) == []
    assert first["memory/peak_pss"] - first["memory/pss"] > 0.8 * SIZE
    assert first["memory/peak_update"] - first["memory/peak_rollout"] > 0.8 * SIZE
    assert second["memory/peak_pss"] - second["memory/pss"] < 0.2 * SIZE
    assert "memory/peak_update" not in second
    assert first["memory/rss"] >= first["memory/rss_driver"] > 0
    assert first["memory/processes"] >= 1


def test_monitor_leaves_no_thread() -> None:
    import threading

    with MemoryMonitor(interval=0.01):
        assert "memory-monitor" in [thread.name for thread in threading.enumerate()]
    assert "memory-monitor" not in [thread.name for thread in threading.enumerate()]


def test_no_device_metrics_without_a_device() -> None:
    code = "from rlhf.memory import device_metrics; import torch; print(device_metrics())"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "{}"
    assert isinstance(device_metrics(), dict)
