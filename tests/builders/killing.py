"""A judge of cases that dies of some of them, for a process that must survive it."""

import os
import signal
import time

from fuzz.cases import Blocks, Judged


def judge(kind: str, route: str, blocks: Blocks) -> Judged:
    """Dies where some byte is 255, and never answers where one is 254."""
    whole = b"".join(blocks)
    if 255 in whole:
        os.kill(os.getpid(), signal.SIGSEGV)
    if 254 in whole:
        time.sleep(600)
    return Judged("right")
