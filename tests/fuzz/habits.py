"""Ways in which people change the weights of a module that is compiled already."""

import copy
import ctypes
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fuzz.cases import Choices


class Weight(NamedTuple):
    """One parameter of one of a few modules of one class, and new values for it.

    Attributes:
        modules: all of them.
        number: of the module.
        name: of the parameter, as in ``named_parameters``.
        new: values of its shape and dtype, unlike all others.
        buffer: memory of its shape and dtype that every module may be streamed through.
        first: what every module's weight of this name was at first.
    """

    modules: Sequence[nn.Module]
    number: int
    name: str
    new: Tensor
    buffer: Tensor
    first: Sequence[Tensor]

    @property
    def module(self) -> nn.Module:
        """The one that holds it."""
        return self.modules[self.number]

    @property
    def owner(self) -> nn.Module:
        """The submodule whose attribute :attr:`attribute` it is."""
        return self.module.get_submodule(self.name.rpartition(".")[0])

    @property
    def attribute(self) -> str:
        """Its name there."""
        return self.name.rpartition(".")[2]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return self.module.get_parameter(self.name)

    @property
    def other(self) -> nn.Parameter:
        """That of the next module."""
        return self.modules[(self.number + 1) % len(self.modules)].get_parameter(self.name)


Habit = Callable[[Weight], object]


class World:
    """Modules of one class, the weights that they began with, and memory that they share."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._first = [{name: p.detach().clone() for name, p in module.named_parameters()} for module in modules]
        self._buffers = {name: torch.zeros_like(value) for name, value in self._first[0].items()}
        self._names = list(self._buffers)

    def change(self, habit: Habit, choices: Choices) -> str:
        """Changes some weight, and tells which."""
        number, name = choices.below(len(self._modules)), choices.pick(self._names)
        first = [own[name] for own in self._first]
        new = torch.randn_like(first[0]) * (2.0 if first[0].dim() == 1 else 1.0)
        weight = Weight(self._modules, number, name, new, self._buffers[name], first)
        habit(weight)
        return f"{name} of block {number}"


# ---- Counted by PyTorch: any part may be written


def _multiply_in_place(w: Weight) -> None:
    w.parameter.mul_(-2)


def _write_a_row(w: Weight) -> None:
    w.parameter[0] = w.new[0]


def _write_through_detach(w: Weight) -> None:
    w.parameter.detach().view(-1)[::2].mul_(3)


def _copy_into(w: Weight) -> None:
    w.parameter.copy_(w.new)


def _multiply_by_foreach(w: Weight) -> None:
    torch._foreach_mul_(list(w.module.parameters()), -1.5)


def _write_in_inference_mode(w: Weight) -> None:
    with torch.inference_mode():
        w.parameter.copy_(w.new)


def _vector_to_parameters(w: Weight) -> None:
    vector = nn.utils.parameters_to_vector(w.module.parameters())
    nn.utils.vector_to_parameters(torch.randn_like(vector), w.module.parameters())


def _load_state_dict(w: Weight) -> None:
    w.module.load_state_dict(w.module.state_dict() | {w.name: w.new})


def _restore(w: Weight) -> None:
    w.parameter.copy_(w.first[w.number])


# ---- Other tensors in a weight's place


def _replace_data(w: Weight) -> None:
    w.parameter.data = w.new


def _stream_through_a_buffer(w: Weight) -> None:
    w.buffer.copy_(w.first[w.number])
    w.parameter.data = w.buffer


def _stream_new_values_through_a_buffer(w: Weight) -> None:
    w.buffer.copy_(w.new)
    w.parameter.data = w.buffer


def _swap_data_of_two_modules(w: Weight) -> None:
    w.parameter.data, w.other.data = w.other.data, w.parameter.data


def _load_state_dict_by_assigning(w: Weight) -> None:
    w.module.load_state_dict(w.module.state_dict() | {w.name: w.new}, assign=True)


def _replace_the_parameter(w: Weight) -> None:
    setattr(w.owner, w.attribute, nn.Parameter(w.new))


def _delete_and_create_anew(w: Weight) -> None:
    """Into the memory that was just freed, as like as not."""
    shape, dtype = w.new.shape, w.new.dtype
    delattr(w.owner, w.attribute)
    gc.collect()
    made = torch.empty(shape, dtype=dtype, device="cpu").copy_(w.new)
    setattr(w.owner, w.attribute, nn.Parameter(made))


def _free_data_and_allocate(w: Weight) -> None:
    shape, dtype = w.new.shape, w.new.dtype
    w.parameter.data = torch.empty(0, dtype=dtype, device="cpu")
    w.parameter.data = torch.empty(shape, dtype=dtype, device="cpu").copy_(w.new)


def _tie_to_another_module(w: Weight) -> None:
    setattr(w.owner, w.attribute, w.other)


def _copy_another_module(w: Weight) -> None:
    setattr(w.owner, w.attribute, copy.deepcopy(w.other))


def _swap_tensors(w: Weight) -> None:
    with suppress(RuntimeError):  # PyTorch refuses weights to which Dynamo's guards have weak references
        torch.utils.swap_tensors(w.parameter, nn.Parameter(w.new))


def _cast_and_cast_back(w: Weight) -> None:
    w.module.to(torch.float16).to(w.new.dtype)


def _apply_clone(w: Weight) -> None:
    w.module._apply(torch.clone)


def _write_data_and_toggle_requires_grad(w: Weight) -> None:
    w.parameter.data.copy_(w.new)
    w.module.requires_grad_(not w.parameter.requires_grad)


# ---- Not counted: the whole weight is written


def _write_data(w: Weight) -> None:
    w.parameter.data.copy_(w.new)


def _write_by_numpy(w: Weight) -> None:
    if w.new.dtype == torch.bfloat16:
        w.parameter.detach().view(torch.int16).numpy()[...] = w.new.view(torch.int16).numpy()
    else:
        w.parameter.detach().numpy()[...] = w.new.numpy()


def _write_by_dlpack(w: Weight) -> None:
    torch.utils.dlpack.from_dlpack(w.parameter.detach().__dlpack__()).copy_(w.new)


def _write_the_storage(w: Weight) -> None:
    if w.parameter.is_contiguous() and w.parameter.untyped_storage().nbytes() == w.new.nbytes:
        w.parameter.untyped_storage().copy_(w.new.contiguous().untyped_storage())


def _write_the_memory(w: Weight) -> None:
    if w.parameter.is_contiguous():
        ctypes.memmove(w.parameter.data_ptr(), w.new.data_ptr(), w.new.nbytes)


def _write_uncounted_as_fsdp(w: Weight) -> None:
    with torch.autograd.grad_mode._unsafe_preserve_version_counter(w.parameter):
        w.parameter.copy_(w.new)


def _step(w: Weight, optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    parameters = [p for p in w.module.parameters() if p.requires_grad]
    if not parameters:
        return
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimiser(parameters).step()
    for p in parameters:
        p.grad = None


def _step_of_fused_adamw(w: Weight) -> None:
    _step(w, lambda parameters: torch.optim.AdamW(parameters, lr=1.0, fused=True))


def _step_of_fused_sgd(w: Weight) -> None:
    _step(w, lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=True))


def _step_of_foreach_adam(w: Weight) -> None:
    _step(w, lambda parameters: torch.optim.Adam(parameters, lr=1.0, foreach=True))


def _free_the_storage_and_fill_it(w: Weight) -> None:
    """As FSDP frees gathered weights; others may take the memory in between."""
    storage = w.parameter.untyped_storage()
    if w.parameter.is_contiguous() and storage.nbytes() == w.new.nbytes and storage.resizable():
        storage.resize_(0)
        storage.resize_(w.new.nbytes)
        storage.copy_(w.new.contiguous().untyped_storage())


def _share_memory_and_write(w: Weight) -> None:
    w.parameter.share_memory_()
    _write_by_numpy(w)


#: All of them.
HABITS: tuple[Habit, ...] = (
    _multiply_in_place,
    _write_a_row,
    _write_through_detach,
    _copy_into,
    _multiply_by_foreach,
    _write_in_inference_mode,
    _vector_to_parameters,
    _load_state_dict,
    _restore,
    _restore,
    _replace_data,
    _stream_through_a_buffer,
    _stream_new_values_through_a_buffer,
    _swap_data_of_two_modules,
    _load_state_dict_by_assigning,
    _replace_the_parameter,
    _delete_and_create_anew,
    _free_data_and_allocate,
    _tie_to_another_module,
    _copy_another_module,
    _swap_tensors,
    _cast_and_cast_back,
    _apply_clone,
    _write_data_and_toggle_requires_grad,
    _write_data,
    _write_by_numpy,
    _write_by_dlpack,
    _write_the_storage,
    _write_the_memory,
    _write_uncounted_as_fsdp,
    _step_of_fused_adamw,
    _step_of_fused_sgd,
    _step_of_foreach_adam,
    _free_the_storage_and_fill_it,
    _share_memory_and_write,
)
