"""Compiled programs, kept on disk between runs: JAX's persistent compilation cache."""

import collections
import os
import time
from pathlib import Path

import jax

VARIABLE = "SIT_JAX_CACHE"  # another folder, or empty for none
HIT = "/jax/compilation_cache/cache_hits"
_seen = collections.Counter()


def begin(environ=os.environ):
    """Turns the cache on, in ~/.cache/sit_jax unless VARIABLE or JAX's own is set.

    To be called after jax.distributed has begun: of several processes only the first
    one writes, and they have to know which of them is that.
    """
    if HIT not in _seen:
        _seen[HIT] = 0
        jax.monitoring.register_event_listener(_note)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = environ.get(VARIABLE, "~/.cache/sit_jax")
    if folder:
        try:
            folder = Path(folder).expanduser()  # some containers have no home
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return  # no place to keep anything is no reason not to run
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compiled(lower):
    """lower() -> a lowered program; -> it compiled, and in words how long that took."""
    begun = time.perf_counter()
    lowered = lower()
    traced, hits = time.perf_counter(), _seen[HIT]  # tracing runs small programs too
    program = lowered.compile()
    ended = time.perf_counter()
    words = f"in {ended - begun:.1f} s, {traced - begun:.1f} of them tracing"
    return program, f"{words} ({_where(_seen[HIT] > hits)})"


def _where(hit):
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        return "no compilation cache"
    return f"found in {folder}" if hit else f"not found in {folder}"


def _note(event, **more):
    if event in _seen:
        _seen[event] += 1
