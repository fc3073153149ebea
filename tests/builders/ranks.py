"""What each of two processes does that calibrate together; their results are files."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from builders.ffns import Block, batches, config, ffn
from tardis_fx import Config, TardisError, calibrate
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.ranks import Ranks
from tardis_fx.observation.run import Run
from tardis_fx.observation.site import SiteObserver
from tardis_fx.passes.guarded_fold import GuardedFold

CONFIGS = {
    "guarded_fold": config(fold_bits=None, row_bits=None),
    "sequential": config(sequential=True),
    "wanda": config(method="wanda"),
    "token_gate": config(method="token_gate", budget=0.7),
    "target_kl": config(target_kl=0.005),
}


def model() -> nn.Module:
    """Two FFNs."""
    return nn.Sequential(*(Block(ffn(seed=i)) for i in range(2))).eval()


class Logits(NamedTuple):
    logits: Tensor


class WithLogits(nn.Module):
    """A model whose output has logits, on which its sites are tried."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = model()
        self.eval()

    def forward(self, x: Tensor) -> Logits:
        return Logits(self.blocks(x))


def tried() -> dict[str, float]:
    """A trial in which rank 0 measures 1 and rank 1 measures 3."""
    observation = BatchObservation(model(), given(), progress=False, ranks=Ranks.initialised())
    run = Run("trial", lambda _: lambda x: x, observation.sites, moved=lambda *_: 1.0 + 2.0 * dist.get_rank())
    return dict(observation.answer(run))


def given() -> list[Tensor]:
    """Five batches, the last one smaller: one rank gets more tokens than the other."""
    return [*batches(4), *batches(1, tokens=40)]


def main(rank: int, folder: Path) -> None:
    """Everything that needs two processes; at the end rank 1 dies in the middle of a calibration."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    for name, chosen in CONFIGS.items():
        calibrate(model(), given(), config=chosen).save(folder / f"{name}-{rank}")
    calibrate(WithLogits(), given(), config=config(method="partial_linear", budget=0.6)).save(
        folder / f"partial_linear-{rank}"
    )
    said: dict[str, Any] = {
        "nan": _error(_with_nan(), config()),
        "batches": _error(given()[rank:], config()),
        "configs": _error(given(), config(budget=0.4 + rank / 10)),
        "threads": _error(given(), config(), threads=1 + rank),
        "checkpoint": _error(given(), config(), checkpoint=folder / f"file-{rank}"),
    }
    said["trial"] = list(tried().values())
    said["batches that fail"] = _error(_failing() if rank else given(), config())
    settled = GuardedFold._settled
    if rank:
        GuardedFold._settled = _broken  # type: ignore[assignment, method-assign]
    said["a rewrite that fails"] = _error(given(), config())
    GuardedFold._settled = settled  # type: ignore[method-assign]
    shown: list[str] = []
    _note(shown)
    calibrate(model(), given(), config=config(), checkpoint=folder / "checkpoint").save(folder / f"resumed-{rank}")
    said["shown"] = "; ".join(shown)
    if rank:
        _note(shown, last=2)
        (folder / "said-1").write_text(json.dumps(said))
    said["dying"] = _error(given(), config(), plan=folder / "dying")
    (folder / f"said-{rank}").write_text(json.dumps(said))


def _with_nan() -> list[Tensor]:
    x = given()
    x[1][3, 2] = torch.nan  # a batch of rank 1
    return x


def _failing() -> Iterator[Tensor]:
    yield from given()
    raise OSError("the disk is gone")


def _broken(*_: object) -> None:
    raise ZeroDivisionError("a bug")


def _error(
    x: Iterable[Tensor], chosen: Config, *, checkpoint: Path | None = None, plan: Path | None = None, threads: int = 1
) -> str:
    torch.set_num_threads(threads)
    try:
        found = calibrate(model(), x, config=chosen, checkpoint=checkpoint)
        if plan is not None:
            found.save(plan)
    except (TardisError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(1)
    return "none"


def _note(shown: list[str], last: int = 1000) -> None:
    """Notes which runs over the batches are made, and dies in the one of number ``last``."""
    show = BatchObservation._show

    def noted(self: BatchObservation, run: Run, observers: Mapping[str, SiteObserver]) -> dict[str, list[int]]:
        shown.append(run.title)
        if self._runs == last:
            os._exit(1)
        return show(self, run, observers)

    BatchObservation._show = noted  # type: ignore[assignment]
