"""Memory that pictures are made in is kept for the next ones.

Each picture takes tens of megabytes for a moment. glibc gives so much back to the system at once and asks for it again
with the next picture, page by page, which takes a tenth to a fifth of the time that a picture does. The library leaves
a process's memory to the program that it is part of; here the program is ours.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM, _TOP_PAD, _MMAP, _ARENAS = -1, -2, -3, -8  # mallopt's numbers, from malloc.h
_KEPT = 512 << 20  # bytes that are kept when nothing uses them
_AHEAD = 64 << 20  # bytes that are asked for at once
_LARGEST = 32 << 20  # bytes of a tensor that is kept so: the most that glibc takes


def keep_freed_memory() -> bool:
    """Let this process keep up to half a gigabyte of what it frees, for all its threads together. To be called before
    it starts threads. Returns whether the C library is one that can be told so."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*pair) for pair in ((_ARENAS, 1), (_MMAP, _LARGEST), (_TRIM, _KEPT), (_TOP_PAD, _AHEAD)))
