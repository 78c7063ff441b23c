"""The most memory that this process has held at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_bytes() -> float:
    """Resident bytes at their highest since the process began (the kernel's VmHWM)."""
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if found:
            return float(found[1]) * 1024
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
