"""How many processors this process may use, considering its affinity mask and the quota of its container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_processors() -> int:
    """The processors of the affinity mask, at most the cgroup's quota rounded up; 1 or more."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min([count, *_quotas()])))


def _quotas() -> Iterator[float]:
    """The quotas, in processors, of this process's cgroups (version 1 or 2) and of the groups above."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):  # not Linux, or hidden
        lines = []
    for line in ["0::/", "0:cpu:/", *lines]:  # in a container the group's path may be that of the host
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version_2 = not controllers
        if not version_2 and "cpu" not in controllers.split(","):
            continue
        base = CGROUPS if version_2 else CGROUPS / "cpu"
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            names = ["cpu.max"] if version_2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            try:
                quota, period = " ".join((folder / name).read_text(encoding="ascii").strip() for name in names).split()
                if quota not in ("max", "-1") and float(period) > 0:
                    yield float(quota) / float(period)
            except (OSError, ValueError):  # no quota here, or a file of another form
                continue
