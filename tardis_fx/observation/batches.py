"""Checks the inputs of calibration: the model, the batches, and which of their tokens are padding."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tardis_fx.errors import CalibrationError

_log = logging.getLogger("tardis_fx")

Batch = Tensor | Mapping[str, Any]

#: Keyword arguments, [batch, tokens], that are 0 at padding and 1 elsewhere.
MASKS = ("attention_mask", "decoder_attention_mask")

#: Share of the batches, the last ones, on which a result is evaluated.
EVALUATED = 1 / 8


def uncompiled(model: Any) -> nn.Module:
    """The model without the wrapper of ``torch.compile``.

    Raises:
        CalibrationError: it is not a module.
    """
    from torch._dynamo.eval_frame import OptimizedModule  # slow to import

    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str):
        raise CalibrationError(f"model must be a torch.nn.Module, not the name {model!r}: load the model and pass it")
    hint = ""
    if isinstance(getattr(model, "model", None), nn.Module):
        hint = ": pass its attribute .model"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        hint = ": make an instance of it"
    elif callable(getattr(model, "encode", None)):
        hint = ": a tokenizer makes batches, the model takes them"
    elif isinstance(model, Mapping):
        hint = ": load the weights into a model and pass that"
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    raise CalibrationError(f"model must be a torch.nn.Module, not {name}{hint}")


def checked(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """Checks the model and the batches, and returns the batches as a list.

    Raises:
        CalibrationError: there are no batches, one cannot be an input of the model, or the model is not a module, on
            the meta device or in training mode.
    """
    model = uncompiled(model)
    training = next((name or type(module).__name__ for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise CalibrationError(f"{training} is in training mode: call model.eval() first")
    parameters = list(model.parameters())
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise CalibrationError("the model is on the meta device, where tensors hold no numbers: load its weights first")
    listed = _listed(batches)
    vocabulary = _vocabulary(model)
    for number, batch in enumerate(listed):
        _check(number, batch, vocabulary)
    if ignored := sorted({name for batch in listed for name, mask in _masks(batch) if not _understood(mask)}):
        _log.warning(
            "%s is not [batch, tokens] with 0 at padding and 1 elsewhere: padding counts as text", ", ".join(ignored)
        )
    return listed


def split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Splits batches into those to fit or train on, and the last eighth, at least one, to evaluate on.

    Raises:
        CalibrationError: there are fewer than two.
    """
    if len(batches) < 2:
        raise CalibrationError("at least two batches are needed, one of them to evaluate on")
    held_back = max(1, int(len(batches) * EVALUATED))
    return batches[:-held_back], batches[-held_back:]


def rows_of(batch: Batch) -> int | None:
    """Number of rows of a batch: the first size that all its tensors have; None if there is none."""
    tensors = [value for value in pytree.tree_leaves(_plain(batch)) if isinstance(value, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def first_rows(batch: Batch, count: int) -> Batch:
    """The first rows of a batch that has rows."""
    cut: Batch = pytree.tree_map_only(Tensor, lambda tensor: tensor[:count], _plain(batch))
    return cut


def _plain(batch: Batch) -> Batch:
    """The batch, as a dict if it is another mapping, like those of tokenizers."""
    return batch if isinstance(batch, Tensor) else dict(batch)


def real_tokens(batch: Batch, shape: Sequence[int]) -> Bool[Tensor, "*tokens"] | None:
    """Mask of the tokens of a tensor [*shape, features] that are not padding, or None if the batch has none for it.

    It comes from an attention mask of this shape, or of as many tokens if the shape is flat. Two different masks give
    None.
    """
    masks = [
        mask != 0
        for _, mask in _masks(batch)
        if _understood(mask) and tuple(shape) in (tuple(mask.shape), (mask.numel(),))
    ]
    if not masks or any(not torch.equal(masks[0], mask) for mask in masks[1:]):
        return None
    real: Tensor = masks[0].reshape(tuple(shape))
    return real


def _listed(batches: Iterable[Batch]) -> list[Batch]:
    if isinstance(batches, (Tensor, Mapping)):
        raise CalibrationError("batches must be an iterable of batches: wrap a single one in a list")
    if isinstance(batches, (str, bytes)):
        raise CalibrationError("batches must be an iterable of batches, not text: give it to a tokenizer first")
    try:
        iterator = iter(batches)
    except TypeError:
        raise CalibrationError(f"batches must be an iterable of batches, not {type(batches).__name__}") from None
    if listed := list(iterator):
        return listed
    hint = ": this generator is exhausted, pass a list" if iterator is batches else ""
    raise CalibrationError(f"no calibration batches{hint}")


def _check(number: int, batch: Batch, vocabulary: int | None) -> None:
    """Finds mistakes that would otherwise cause obscure errors inside the model.

    Raises:
        CalibrationError: text or lists instead of tensors, or ids without an embedding.
    """
    if isinstance(batch, str):
        raise CalibrationError("a batch must be a tensor or a dict of keyword arguments, not str: tokenize the text")
    named = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    for name, value in named.items():
        if str(name).endswith(("_ids", "_mask")) and not isinstance(value, (Tensor, type(None))):
            if isinstance(batch, Mapping):
                raise CalibrationError(
                    f"{name} of batch {number} must be a tensor, not {type(value).__name__}: a tokenizer makes tensors "
                    "where it is called with return_tensors='pt'"
                )
            return  # not a batch: running it will raise the error
    ids = named.get("input_ids")
    if vocabulary is None or not isinstance(ids, Tensor) or ids.is_meta or not _integer(ids):
        return
    if ids.dim() == 1:
        raise CalibrationError(
            f"batch {number} holds ids of shape {list(ids.shape)}, and the model takes [batch, tokens]: use ids[None]"
        )
    text_alone = all(_integer(value) for value in named.values() if isinstance(value, Tensor))  # images have own ids
    if text_alone and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise CalibrationError(
            f"batch {number} holds ids from {int(ids.min())} to {int(ids.max())}, and the model has embeddings of 0 to "
            f"{vocabulary - 1}: use the model's own tokenizer"
        )


def _integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _vocabulary(model: nn.Module) -> int | None:
    """Number of ids with embeddings in a transformers model; None for other models."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _masks(batch: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        yield from ((name, batch[name]) for name in MASKS if batch.get(name) is not None)


def _understood(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and (mask.dtype == torch.bool or bool((mask >= 0).all()))
