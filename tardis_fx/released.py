"""Guards modules whose weights :func:`tardis_fx.release` freed: saving, copying or running them is an error."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tardis_fx.errors import ReleasedWeightError
from tardis_fx.graph.site import is_released


def guard(model: nn.Module, released: Iterable[Tensor]) -> None:
    """Guards the modules that hold released weights until the weights have values again.

    Args:
        model: that holds the weights.
        released: the weights.
    """
    identities = set(map(id, released))
    for path, module in model.named_modules():
        weights = {name: tensor for name, tensor in _tensors(module).items() if id(tensor) in identities}
        if not weights:
            continue
        hook = _guard_of(module)
        if hook is None:
            hook = ReleasedGuard(path)
            module.register_state_dict_pre_hook(hook)
            module.register_load_state_dict_pre_hook(hook.load)
            module.register_forward_pre_hook(refuse_eager)
        hook.watch(module, weights)


class ReleasedGuard:
    """Hook before ``state_dict()`` of a module whose weights were released.

    It is attached to the module and to the weights, so that pickling or deep-copying them also calls it.
    """

    def __init__(self, path: str) -> None:
        """Makes a guard without any weights, for the module with this path in the model."""
        self._path = path
        self._names: set[str] = set()
        self._module: weakref.ref[nn.Module] | None = None

    def watch(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Adds released weights of a module, by their names in it."""
        self._module = weakref.ref(module)
        self._names |= weights.keys()
        for weight in weights.values():
            weight._tardis_released = self  # type: ignore[attr-defined]  # pickled with the weight

    def __call__(self, module: nn.Module, prefix: str = "", keep_vars: bool = False) -> None:
        """Refuses ``module.state_dict()`` while weights are released.

        Raises:
            ReleasedWeightError: a weight is still released.
        """
        self.refuse(module, "state_dict() or a checkpoint of the model")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses to pickle or deep-copy the module or a weight.

        Raises:
            ReleasedWeightError: a weight is still released.
        """
        module = None if self._module is None else self._module()
        if module is not None:
            self.refuse(module, "a pickle or a copy of it")
        return ReleasedGuard, (self._path,)

    def load(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Allocates memory for the values that ``module.load_state_dict()`` will copy to the weights."""
        for name, weight in _tensors(module).items():
            if prefix + name in state_dict and is_released(weight):
                weight.data = torch.full_like(weight, torch.nan, memory_format=torch.contiguous_format)

    def refuse(self, module: nn.Module, result: str) -> None:
        """Checks that no weight is still released; ``result`` would hold NaN.

        Raises:
            ReleasedWeightError: a weight is still released.
        """
        released = [name for name, weight in _tensors(module).items() if name in self._names and _is_nan(weight)]
        if released:
            names = ", ".join(f"{self._path}.{name}".lstrip(".") for name in released)
            raise ReleasedWeightError(
                f"{names}: released by tardis_fx.release, so {result} would hold NaN in their place. Load the original "
                f"weights into the model again (load_state_dict), or release with folder=..., which keeps them"
            )


def refuse_eager(module: nn.Module, args: Any) -> None:
    """Hook before ``module.forward()``, which Dynamo does not trace.

    Raises:
        ReleasedWeightError: the module is about to run eagerly.
    """
    hook = None if torch.compiler.is_compiling() else _guard_of(module)
    if hook is not None:
        hook.refuse(module, "the output of an uncompiled call")


def _guard_of(module: nn.Module) -> ReleasedGuard | None:
    return next((hook for hook in module._state_dict_pre_hooks.values() if isinstance(hook, ReleasedGuard)), None)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in (module._parameters | module._buffers).items() if t is not None}


def _is_nan(weight: Tensor) -> bool:
    """Whether a weight has no values; a cast or a move to a device expands the NaN."""
    return not weight.is_meta and weight.numel() > 0 and bool(weight[(0,) * weight.dim()].isnan())
