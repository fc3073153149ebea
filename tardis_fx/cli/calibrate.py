"""The command ``tardis calibrate``, alone or started by ``torchrun``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

import tardis_fx
from tardis_fx.cli.options import Device, Model, StoredDType, Windows, available, config_of, methods_with_settings
from tardis_fx.demo.model import LENGTH, WINDOWS, cut, load
from tardis_fx.errors import ConfigError, PlanFileError
from tardis_fx.measure.requirements import check_writable
from tardis_fx.observation.ranks import Ranks

#: Windows per batch.
TOGETHER = 8
#: Timeout for other processes, longer than the slowest process takes for its share of a run.
PATIENCE = timedelta(minutes=30)


def calibrate(
    out: Annotated[Path, typer.Argument(help="Where the plan goes.")],
    model: Model = "demo",
    method: Annotated[
        str, typer.Option(help="Options and fields of Config after a colon: guarded_fold:budget=0.2,fold_bits=4")
    ] = "partial_linear",
    bits: Annotated[
        float | None, typer.Option(help="Bits read per token and FFN weight, instead of a budget in bytes.")
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Smallest budget whose KL to the dense model is at most this, in nats.")
    ] = None,
    linear_bits: Annotated[
        int | None, typer.Option(help="4 or 8: code the linear layers outside of FFNs in so many bits.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A file to calibrate on; the standard library's source by default.")
    ] = None,
    windows: Windows = WINDOWS,
    dtype: StoredDType = "auto",
    device: Device = "cpu",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder for finished runs over the text, after which a calibration resumes.")
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Fit one FFN at a time: less memory, more runs.")] = False,
) -> None:
    """Calibrate a causal language model; under torchrun the processes share the text."""
    (name, settings), *others = methods_with_settings(method)
    options = {"bits": bits, "target_kl": target_kl, "linear_bits": linear_bits}
    options = {name: value for name, value in options.items() if value is not None}
    if twice := options.keys() & settings:
        raise ConfigError(f"{', '.join(twice)} of {method!r} is also given as an option: leave out one")
    config, healed = config_of(name, settings | options)
    if healed or others:
        raise ConfigError(f"calibrate takes one method and does not heal: {method!r}")
    with _processes(device) as target:
        first = Ranks.initialised().rank == 0
        if first:
            check_writable(out, PlanFileError)  # before spending hours
        subject = load(model, dtype)
        ids = subject.read(text) if text else subject.tokens("calibration")
        plan = tardis_fx.calibrate(
            subject.model.to(target),
            cut(ids, windows, min(LENGTH, subject.context)).to(target).split(TOGETHER),
            config=replace(config, progress=config.progress and first),
            checkpoint=checkpoint,
            offload=offload,
        )
        if first:
            plan.save(out)
            typer.echo(f"{plan}, written to {out}")


@contextmanager
def _processes(device: str) -> Iterator[torch.device]:
    """Joins the processes started by torchrun, if any, for the duration of the calibration; gives this one's device."""
    target = available(device)
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield target
        return
    if device == "cuda":
        if target.index >= torch.cuda.device_count():
            raise ConfigError(f"more processes on this machine than its {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(target)
    dist.init_process_group("gloo", timeout=PATIENCE)  # statistics are on the CPU for any model device
    try:
        yield target
    finally:
        dist.destroy_process_group()
