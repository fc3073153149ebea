"""Runs a model through Dynamo and shows every graph to an observer, as compilation would see it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tardis_fx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def own_code(function: Any) -> Callable[..., Any]:
    """A copy of a function with a code object, and so with a cache of Dynamo's, of its own."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)


class Capture:
    """A model whose graphs an observer replaces.

    Dynamo keeps what it compiled at the code object of the outermost function. Each capture has one of its own, so
    that it leaves nothing behind in the cache of the model's other compiled forms.
    """

    def __init__(
        self, model: nn.Module, observer: Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]
    ) -> None:
        """Prepares the capture; nothing is traced before the first call.

        Args:
            model: the model.
            observer: is called with every graph and its inputs, and returns what to run in its place.
        """
        self._model = model
        self._call = torch.compile(own_code(_call), backend=observer)

    def __call__(self, batch: Tensor | Mapping[str, Any], *, gradients: bool = False) -> Any:
        """Runs one batch.

        Args:
            batch: the model's first argument, or all of them by keyword.
            gradients: whether they are recorded.

        Raises:
            CalibrationError: the batch is neither, or lies on another device than the model.
        """
        args, kwargs = arguments(batch)
        self._check_devices([v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)])
        dynamo = torch._dynamo.config.patch(
            recompile_limit=256, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True
        )
        from torch._inductor import config as inductor_config  # takes its time

        inductor = inductor_config.patch(freezing=False)  # Dynamo asks it whether weights are inputs
        with dynamo, inductor, torch.set_grad_enabled(gradients):
            return self._call(self._model, args, kwargs)

    def _check_devices(self, tensors: list[Tensor]) -> None:
        parameter = next(self._model.parameters(), None)
        for tensor in tensors:
            if parameter is not None and tensor.device != parameter.device:
                raise CalibrationError(
                    f"the batch is on {tensor.device}, the model on {parameter.device}: move one of them"
                )


def arguments(batch: Tensor | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments of the model.

    Raises:
        CalibrationError: it is neither a tensor nor a mapping.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in batch.items()}
    raise CalibrationError(f"a batch must be a tensor or a dict of keyword arguments, not {type(batch).__name__}")
