"""How much memory a calibration takes, measured in a process of its own: ``python -m builders.offload FOLDER``."""

import gc
import json
import re
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tardis_fx
from builders.ffns import Block, batches, config, ffn, planned
from tardis_fx import Plan

D, HIDDEN, SITES = 256, 1024, 7


def mapped(folder: Path) -> nn.Module:
    """A model whose weights are mapped from a file, as transformers leaves them."""
    model = nn.Sequential(*(Block(ffn(D, HIDDEN, seed=i), D) for i in range(SITES))).eval()
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path), assign=True)
    return model


def anonymous() -> int:
    """Bytes of this process's memory that no file holds."""
    (found,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found)


def rise(model: nn.Module, *, offload: bool) -> tuple[int, Plan]:
    """Anonymous memory at the highest point of a calibration, above that before it; and the plan."""
    gc.collect()
    before, highest, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        chosen = config(allocation="per_site", rounding="nearest")
        plan = tardis_fx.calibrate(model, batches(2, 128, D), config=chosen, offload=offload)
    finally:
        done.set()
        watcher.join()
    return highest - before, plan


def main(folder: Path) -> None:
    """Prints what a calibration takes with offloading and without; writes the plans."""
    torch.set_num_threads(1)
    planned(ffn())  # what Dynamo keeps of its first compilation is none of this
    found = {}
    for offload in (True, False):
        name = "offload" if offload else "together"
        found[name], plan = rise(mapped(folder), offload=offload)
        plan.save(folder / name)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
