"""Settings of glibc's malloc: keep freed memory in the process instead of returning it to the kernel.

By default glibc returns a large block to the kernel when it is freed. The activations of a Vision Transformer are such
blocks. Each call allocates them again, and the kernel clears every page of them again. The command line changes this
at start-up. A library must not change the allocator of its host, so ``import patchlife`` does not; a server may call
`keep_freed_memory` itself. Nothing changes on other systems and with other C libraries.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "malloc_setting"]

# the parameters of mallopt, from glibc's <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1  # as trim threshold: memory at the top of the heap is never returned
_THRESHOLDS = (2**31 - 1, 32 * 2**20)  # bytes; the largest int, and the most that some versions of glibc accept

_NAMES = ("mmap_threshold", "mmap_max", "trim_threshold", "top_pad")
_OPTIONS = {f"MALLOC_{name.upper()}_": f"glibc.malloc.{name}" for name in _NAMES}
"""Environment variables that set the same parameters, each with its name in GLIBC_TUNABLES."""

DEFAULT, KEEPS = "default", "keeps freed memory"

_kept = False


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, so that later allocations use it again without page faults.

    Call it before large tensors are allocated. The process then holds its largest amount of memory until it ends.
    That amount can be larger than by default, by a few copies of the largest block. Blocks of 2 GiB and more are still
    returned; in threads other than the main one, blocks of 64 MiB and more; in versions of glibc that accept no larger
    threshold, blocks of 32 MiB and more.

    Returns:
        Whether it is in force. False, and nothing is changed: without glibc, or if the user has set one of the
        parameters (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_`, or the
        same in `GLIBC_TUNABLES`), or preloads another malloc (`LD_PRELOAD`).
    """
    global _kept
    if _kept or _chosen_by_user() or not _has_glibc():
        return _kept
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a Python without dynamic loading
        return False
    large = any(mallopt(_MMAP_THRESHOLD, threshold) for threshold in _THRESHOLDS)
    _kept = bool(large and mallopt(_TRIM_THRESHOLD, _NEVER))
    return _kept


def malloc_setting() -> str:
    """The setting in force: "default", "keeps freed memory", or what the user has set in the environment."""
    return _chosen_by_user() or (KEEPS if _kept else DEFAULT)


def _chosen_by_user() -> str:
    """The user's own settings in the environment, as text; empty if there are none."""
    chosen = [f"{name}={os.environ[name]}" for name in _OPTIONS if name in os.environ]
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    chosen += [entry for entry in tunables if entry.partition("=")[0] in _OPTIONS.values()]
    preloaded = os.environ.get("LD_PRELOAD", "").replace(" ", ":").split(":")
    chosen += [os.path.basename(library) for library in preloaded if "malloc" in os.path.basename(library)]
    return ", ".join(chosen)


def _has_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # musl
        return False
