"""A Ray cluster of two nodes on this machine: two `ray start`, with processes and ports of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

STORE = "--object-store-memory=100000000"

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
"""As `docs/ray.md` advises, and a machine low on memory must not fail a test."""


class Cluster:
    """`head` and `worker`, each with resources of its own; started on entry, gone without a trace on exit."""

    def __init__(self, head_cpus: int, worker_cpus: int) -> None:
        self._cpus = {"head": head_cpus, "worker": worker_cpus}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""
        """`host:port` of the head."""

    def __enter__(self) -> Cluster:
        """Start both; their resources `here` and `there` say which is which."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        ray = Path(sys.executable).with_name("ray")
        subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self._start("head", "here", "--head", f"--port={port}", f"--temp-dir={self._folder.name}")
        _until(lambda: _answers(port))
        self.start_worker()
        _until(lambda: b"Ray runtime started" in self._log("worker").read_bytes())
        return self

    def start_worker(self) -> None:
        """Start the worker, also again; returns before it has joined."""
        self._start("worker", "there", f"--address={self.address}")

    def __exit__(self, *error: object) -> None:
        for name in ("worker", "head"):
            self.kill(name)
        self._folder.cleanup()

    def pid(self, name: str) -> int:
        """The process above all others of a node."""
        return self._nodes[name].pid

    def kill(self, name: str) -> None:
        """SIGKILL to every process of a node, which takes its engines with it."""
        node = self._nodes.pop(name, None)
        if node is None:
            return
        for process in _family(node.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def _log(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.log"

    def _start(self, name: str, resource: str, *arguments: str) -> None:
        options = [f"--num-cpus={self._cpus[name]}", f'--resources={{"{resource}": 1}}', STORE]
        ray = Path(sys.executable).with_name("ray")
        with self._log(name).open("wb") as file:
            self._nodes[name] = subprocess.Popen(
                [ray, "start", *arguments, *options, "--block", "--disable-usage-stats"],
                stdout=file,
                stderr=file,
                env=os.environ | SETTINGS,
            )


def _family(pid: int) -> Iterator[psutil.Process]:
    """Children first, so that no parent starts them again; not what has left the family."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        yield from parent.children(recursive=True)
        yield parent


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _until(holds: object, seconds: float = 120.0) -> None:
    assert callable(holds)
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "the node did not start"
        time.sleep(0.1)
