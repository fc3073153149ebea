"""Compilations without the measuring and logging around them, which take up to a third of their time."""

import gc
import logging

import torch._dynamo.guards


def lighten() -> None:
    """Turns off the structured trace and the timing of guards, and collects garbage less often; results stay the same."""
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()  # a record is made for any handler; pytest shows it as an empty line under a failure
    trace.propagate = True  # else pytest adds handlers of its own
    trace.setLevel(logging.CRITICAL)
    # Flushes the CPU's caches to time the guards of a new graph, for a log that nobody reads.
    vars(torch._dynamo.guards)["profile_guard_manager"] = lambda *_: 0.0
    # A full collection visits half a million objects of the libraries, and tracing brings one about every few seconds.
    gc.set_threshold(50_000, 20, 100)
