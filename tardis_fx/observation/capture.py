"""Runs a model through Dynamo and shows every graph to an observer, as compilation would see it."""

import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from tardis_fx.errors import CalibrationError
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.naming import parameter_name
from tardis_fx.graph.subclasses import stored_tensors
from tardis_fx.graph.surgery import copy
from tardis_fx.graph.unfuse import unfuse
from tardis_fx.runtime.fingerprint import fingerprint


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def own_code(function: Any) -> Callable[..., Any]:
    """Copies a function with a new code object, and so with a separate Dynamo cache."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)


class Capture:
    """A model whose graphs an observer replaces, once for each set of weights that a graph runs with.

    Dynamo may run one graph for several modules, for example for equal blocks between graph breaks. Later calls may
    use other weights than the call that compiled the graph, so every call is checked.

    Dynamo caches compiled code at the code object of the outermost function. Each capture has its own code object, so
    that it leaves the cache of the model's other compiled forms unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
        *,
        linear: bool = False,
    ) -> None:
        """Prepares the capture; nothing is traced before the first call.

        Args:
            model: the model.
            observer: called with each graph and the inputs of a call, once for each set of weights; returns a function
                to run instead for these weights. It receives its own copy of the graph, with parameters named as in
                the model. Its exceptions reach the caller. The owner of a method is not kept alive.
            linear: whether the weights of linear layers outside of FFNs count.
        """
        self._model = model
        # The owner of the method holds the capture; both should be freed with the owner's last reference.
        bound = isinstance(observer, types.MethodType)
        self._observer = weakref.WeakMethod(observer) if bound else lambda: observer
        self.names: dict[int, list[str]] = {}  # of the last batch; weak references would prevent swapping weights
        known = weakref.ref(self)  # the garbage collector does not see references that Dynamo holds
        with torch._dynamo.config.patch(disable=False):
            self._call = torch.compile(own_code(_call), backend=lambda gm, _: _Graph(gm, known, linear))

    def __call__(self, batch: Tensor | Mapping[str, Any], *, gradients: bool = False) -> Any:
        """Runs one batch in the caller's gradient mode.

        Args:
            batch: the model's first argument, or all of them by keyword.
            gradients: whether gradients are recorded.

        Raises:
            CalibrationError: the batch has another type, or is on another device than the model.
        """
        args, kwargs = arguments(batch)
        self._check_devices([v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)])
        self.names = self._named()
        dynamo = torch._dynamo.config.patch(
            recompile_limit=256, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True,
            disable=False, error_on_recompile=False, suppress_errors=False, repro_after=None, optimize_ddp=False,
        )  # fmt: skip
        from torch._inductor import config as inductor_config  # slow to import

        inductor = inductor_config.patch(freezing=False)  # Dynamo reads it to decide whether weights are inputs
        with (
            dynamo, inductor,
            torch.compiler.set_stance("default"),  # another stance may run the model without the observer
            torch.inference_mode(mode=False), torch.set_grad_enabled(gradients), catch_warnings(),
        ):  # fmt: skip
            # Dynamo reads .grad of activations between two graphs and hides the warning, except when it is an error.
            filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self._call(self._model, args, kwargs)

    def _check_devices(self, tensors: list[Tensor]) -> None:
        parameter = next(self._model.parameters(), None)
        for tensor in tensors:
            if parameter is not None and tensor.device != parameter.device:
                raise CalibrationError(
                    f"the batch is on {tensor.device}, the model on {parameter.device}: move one of them"
                )

    def _named(self) -> dict[int, list[str]]:
        """All names of the model's tensors, by their ids."""
        names: dict[int, list[str]] = {}
        for named in (self._model.named_parameters, self._model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(name)
        return names

    def observe(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Gives the observer a copy of a graph, and returns the function to run instead."""
        gm = copy(gm)
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            names = self.names.get(id(value), [])
            if names and parameter_name(node) not in names:
                node.meta["parameter_name"] = names[0]
        observer = self._observer()
        assert observer is not None  # its owner makes the call
        return observer(gm, list(inputs))


class _Graph:
    """A Dynamo graph and its replacement from the observer for each set of weights."""

    def __init__(self, gm: fx.GraphModule, capture: weakref.ref[Capture], linear: bool) -> None:
        self._gm, self._capture = copy(gm), capture
        self._replacements: dict[Hashable, Callable[..., Any]] = {}
        matched = copy(gm)
        unfuse(matched.graph)
        position = {node: i for i, node in enumerate(matched.graph.find_nodes(op="placeholder"))}
        self._sites = [
            (site.function, [position[node] for node in site.parameters if node in position])
            for site in find_sites(matched.graph, linear=linear)
        ]

    def __call__(self, *inputs: Any) -> Any:
        capture = self._capture()
        assert capture is not None  # it makes the call
        key = self._weights(inputs, capture)
        if key not in self._replacements:
            self._replacements[key] = capture.observe(self._gm, inputs)
        return self._replacements[key](*inputs)

    def _weights(self, inputs: Sequence[Any], capture: Capture) -> Hashable:
        """Key of a set of weights: their names, as two modules may have equal weights, and the sites' contents."""
        names = tuple(tuple(capture.names.get(id(value), ())) for value in inputs if isinstance(value, Tensor))
        return names, *(identity([inputs[i] for i in positions], function) for function, positions in self._sites)


def identity(weights: Sequence[Tensor], function: str | None) -> Hashable:
    """Key that distinguishes the weights of a site from others within a process."""
    stored = stored_tensors(weights)
    if any(weight.is_inference() or weight.is_meta for weight in stored):  # slow to hash, or impossible
        return tuple(map(id, stored))
    return fingerprint(stored, function)


def arguments(batch: Tensor | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model for a batch.

    Raises:
        CalibrationError: the batch is neither a tensor nor a mapping.
    """
    batch = recordable(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in batch.items()}
    raise CalibrationError(f"a batch must be a tensor or a dict of keyword arguments, not {type(batch).__name__}")


def recordable(batch: Any) -> Any:
    """The batch with copies of tensors made under ``torch.inference_mode()``, which autograd refuses to record."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)
