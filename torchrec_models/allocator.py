"""The C library's allocator, told to keep what one training step frees for the next.

Left to itself, glibc hands freed blocks of megabytes back to the system, and the next step pays
for new pages, each cleared by the kernel: about 7 % of a step on a CPU.
May import: the standard library.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of ``malloc.h``."""
_LARGEST_KEPT_BLOCK = 32 << 20
"""The most that glibc takes."""
_MOST_KEPT_BYTES = 2**31 - 1
_USERS_WORDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GiB of freed memory, in blocks of up to 32 MiB.

    Nothing changes where the user's environment tunes the allocator, or the C library has no
    ``mallopt``; another allocator that is preloaded does not read these settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(word in os.environ for word in _USERS_WORDS):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
