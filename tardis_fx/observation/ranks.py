"""The processes that share a calibration: each runs a part of the batches, and all fit to the sums of all batches.

Every rank makes the same decisions from the same sums, so that only statistics are exchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tardis_fx.errors import CalibrationError, TardisError
from tardis_fx.observation.site import Merge

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of the default process group of ``torch.distributed``, or this process alone.

    Attributes:
        rank: of this process; rank 0 writes files.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1
    _shared: list[BaseException] = field(default_factory=list, compare=False, repr=False)  # errors that all ranks know

    @classmethod
    def initialised(cls) -> "Ranks":
        """The ranks of the process group if one is initialised, else this process alone."""
        together = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if together else cls()

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """The batches that this rank runs: every ``count``-th one."""
        return batches[self.rank :: self.count]

    def attempt(self, function: Callable[[], T]) -> list[T]:
        """Calls a function on every rank and returns the results of all ranks in order.

        Raises:
            TardisError: the function raised it on some rank; then every rank raises, because none can continue alone.
            CalibrationError: it raised another error on another rank, or a rank died or did not answer within the
                timeout of the process group.
        """
        if self.count == 1:
            return [function()]
        raised: Exception | None = None
        try:
            result: Any = function()
        except Exception as error:
            result, raised = _typed(error), error
        results: list[Any] = [None] * self.count
        with self._answered():
            dist.all_gather_object(results, result)
        if raised is not None:
            raise self._known(raised)
        for rank, result in enumerate(results):
            if isinstance(result, TardisError):
                raise self._known(type(result)(f"rank {rank}: {result}"))
        return results

    @contextmanager
    def together(self) -> Iterator[None]:
        """Stops all ranks if one fails: an error between two exchanges is sent in place of the next exchange.

        The ranks must make an exchange after the block.
        """
        try:
            yield
        except BaseException as error:
            if self.count > 1 and not any(error is known or error.__cause__ is known for known in self._shared):
                with suppress(CalibrationError), self._answered():  # another rank may also have died
                    dist.all_gather_object([None] * self.count, _typed(error))
            raise
        finally:
            self._shared.clear()

    def agree(self, title: str, value: Any) -> None:
        """Checks that a value is the same on all ranks.

        Raises:
            CalibrationError: a rank has another value.
        """
        first, *others = self.attempt(lambda: value)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise self._known(
                    CalibrationError(f"{title} of rank {rank} and of rank 0 differ: {_difference(other, first)}")
                )

    def merged(self, tensor: Tensor, how: Merge) -> Tensor:
        """Merges the tensors of all ranks, bit-identical on every rank; see :mod:`.merging`.

        Raises:
            CalibrationError: a rank died or did not answer within the timeout of the process group.
        """
        if self.count == 1:
            return tensor
        if how == "joined":
            return torch.cat(self.attempt(lambda: tensor))
        operation = {"sum": dist.ReduceOp.SUM, "least": dist.ReduceOp.MIN, "greatest": dist.ReduceOp.MAX}[how]
        merged = tensor.to(_device()).clone()
        with self._answered():
            dist.all_reduce(merged, operation)
        return merged.to(tensor.device)

    def _known(self, error: Exception) -> Exception:
        self._shared.append(error)
        return error

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._known(
                CalibrationError(f"another process of the calibration died or did not answer in time: {error}")
            ) from error


def arithmetic() -> dict[str, Any]:
    """Properties of this machine that may change the last bit of a product, and so a decision of the fit."""
    return {
        "version of torch": torch.__version__,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
    }


def _typed(error: BaseException) -> TardisError:
    """The form in which an error is sent to other ranks."""
    return error if isinstance(error, TardisError) else CalibrationError(f"{type(error).__name__}: {error}")


def _device() -> torch.device:
    """Device for the process group's tensors: statistics are on the CPU, which NCCL alone does not support."""
    takes_cpu = "cpu:" in dist.get_backend_config() or dist.get_backend() != "nccl"
    return torch.device("cpu") if takes_cpu else torch.device("cuda", torch.cuda.current_device())


def _difference(left: Any, right: Any) -> str:
    if isinstance(left, dict) and isinstance(right, dict):
        names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
        return "; ".join(f"{name}: {left.get(name)} and {right.get(name)}" for name in names[:4])
    return f"{left} and {right}"
