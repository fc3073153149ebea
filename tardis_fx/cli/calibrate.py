"""The command ``tardis calibrate``, alone or started by ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from tardis_fx.cli.options import Model, config_of, methods_with_settings, torch_dtype
from tardis_fx.config import Config
from tardis_fx.demo.model import DemoModel
from tardis_fx.errors import CalibrationError, ConfigError, PlanFileError

#: Maximum tokens of a window, and windows per batch.
LENGTH, TOGETHER = 256, 8
#: Timeout for other processes, longer than the slowest process takes for its share of a run.
PATIENCE = timedelta(minutes=30)


def calibrate(
    out: Annotated[Path, typer.Argument(help="Where the plan goes.")],
    model: Model = "demo",
    method: Annotated[
        str, typer.Option(help="Options and fields of Config after a colon: partial_linear:budget=0.2,fold_bits=4")
    ] = "partial_linear",
    text: Annotated[
        Path | None, typer.Option(help="A file to calibrate on; the standard library's source by default.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of 256-token windows, spread evenly over the text.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda: under torchrun each process takes a GPU.")] = "cpu",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A folder for finished runs over the text; an interrupted calibration resumes after the last."
        ),
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Fit one FFN at a time: less memory, more runs.")] = False,
) -> None:
    """Calibrate a causal language model; under torchrun the processes share the text."""
    import tardis_fx
    from tardis_fx.demo.model import FOLDER, load
    from tardis_fx.observation.ranks import Ranks

    config = _config(method)
    if dtype != "auto":
        torch_dtype(dtype)
    with _processes(device):
        first = Ranks.initialised().rank == 0
        if first and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
            raise PlanFileError(f"cannot write {out}")  # checked before spending hours
        subject = load(FOLDER if model == "demo" else Path(model), dtype)
        plan = tardis_fx.calibrate(
            subject.model.to(_own(device)),
            [batch.to(_own(device)) for batch in _batches(subject, text, windows)],
            config=replace(config, progress=config.progress and first),
            checkpoint=checkpoint,
            offload=offload,
        )
        if first:
            plan.save(out)
            typer.echo(f"{plan}, written to {out}")


def _config(method: str) -> Config:
    (config, healed), *others = (config_of(*one) for one in methods_with_settings(method))
    if healed or others:
        raise ConfigError(f"calibrate takes one method and heals none: {method!r}")
    return config


@contextmanager
def _processes(device: str) -> Iterator[None]:
    """Joins the processes started by torchrun, if any, for the duration of the calibration."""
    import torch
    import torch.distributed as dist

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no CUDA device")
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        if _own(device).index >= torch.cuda.device_count():
            raise ConfigError(f"more processes on this machine than its {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(_own(device))
    dist.init_process_group("gloo", timeout=PATIENCE)  # statistics are on the CPU for any model device
    try:
        yield
    finally:
        dist.destroy_process_group()


def _own(device: str) -> torch.device:
    """The device of this process."""
    import torch

    return torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)


def _batches(subject: DemoModel, text: Path | None, windows: int) -> list[Tensor]:
    """Batches of windows of the text, [8, length] each."""
    from tardis_fx.demo.model import cut

    ids = subject.read(text) if text else subject.tokens("calibration")
    length = min(LENGTH, subject.context)
    if len(ids) < length:
        raise CalibrationError(f"{len(ids)} tokens of text are less than one window of {length}: give more text")
    return list(cut(ids, windows, length).split(TOGETHER))
