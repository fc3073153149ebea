"""Hypothesis strategies: weights with planted structure, calibration sets, and sites with both.

Every drawn value is a record of a few numbers and names, so that the smallest failing example fits on one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor, nn

from tardis_fx.testing.ffn import ACTIVATIONS, FFN, GatedFFN, ffn, gated_ffn, inputs

#: Kinds of FFN: plain, gated, or gated with gate and up projection in one matrix.
KINDS = ("plain", "gated", "fused")
#: Structures planted in an FFN's weights.
STRUCTURES = ("none", "low rank", "loud neurons", "dead neurons", "nearly affine", "twins", "sparse")
#: Distributions of inputs.
STREAMS = ("normal", "correlated", "scaled", "shifted")


@dataclass(frozen=True)
class Weights:
    """The weights of an FFN.

    Attributes:
        d: input and output width.
        hidden: neurons.
        activation: one of :data:`tardis_fx.testing.ffn.ACTIVATIONS`.
        bias: whether the projections have biases.
        structure: one of :data:`STRUCTURES`: both matrices of rank 2; 30 times the output of a quarter of the neurons;
            pre-activations of half of the neurons far below zero; those of all far above it; every neuron's W1 twice;
            nine tenths of the weights zero. Biases shift the pre-activations (of a gated FFN, those of its gate); they
            are not shifted without biases.
        dtype: of all tensors.
        seed: of the random numbers.
        kind: one of :data:`KINDS`.
    """

    d: int
    hidden: int
    activation: str = "gelu"
    bias: bool = True
    structure: str = "none"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    kind: str = "plain"

    @torch.no_grad()
    def ffn(self) -> FFN | GatedFFN:
        """A module with these weights."""
        if self.kind == "plain":
            model: FFN | GatedFFN = ffn(self.d, self.hidden, self.activation, bias=self.bias, seed=self.seed)
        else:
            fused = self.kind == "fused"
            model = gated_ffn(self.d, self.hidden, self.activation, bias=self.bias, fused=fused, seed=self.seed)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        *entering, down = linears  # the gate, or its half of a fused matrix, comes first
        half = self.hidden // 2
        if self.structure == "low rank":
            for linear in linears:
                u, s, vt = torch.linalg.svd(linear.weight, full_matrices=False)
                linear.weight.copy_((u[:, :2] * s[:2]) @ vt[:2])
        elif self.structure == "loud neurons":
            down.weight[:, : self.hidden // 4].mul_(30)
        elif self.structure == "dead neurons" and self.bias:
            entering[0].bias[:half].sub_(6)
        elif self.structure == "nearly affine" and self.bias:
            entering[0].bias[: self.hidden].add_(6)
        elif self.structure == "twins":
            parameters = [p for linear in entering for p in linear.parameters()]
            for tensor in [part for p in parameters for part in p.split(self.hidden)]:
                tensor[half : 2 * half] = tensor[:half].clone()
        elif self.structure == "sparse":
            for linear in linears:
                linear.weight.mul_(torch.rand(linear.weight.shape, dtype=torch.float32, device="cpu") < 0.1)
        return model.to(self.dtype)


@dataclass(frozen=True)
class Calibration:
    """Batches of one site's inputs.

    Attributes:
        batches: number of batches.
        tokens: number of tokens in each.
        stream: one of :data:`STREAMS`: normal; two strong directions plus weak noise; two features 20 times as large as
            the others; two standard deviations off zero.
        seed: of the random numbers.
    """

    batches: int = 2
    tokens: int = 128
    stream: str = "normal"
    seed: int = 0

    def batch(self, *shape: int, number: int = 0, dtype: torch.dtype = torch.float32) -> Float[Tensor, "... d"]:
        """Inputs of shape [..., d] for a batch number; numbers from ``batches`` on are not used for calibration."""
        x = inputs(*shape, seed=1000 * self.seed + number)
        if self.stream == "correlated":
            directions = inputs(2, shape[-1], seed=self.seed)
            x = inputs(*shape[:-1], 2, seed=1000 * self.seed + number + 500) @ directions + 0.1 * x
        elif self.stream == "scaled":
            x[..., :2] *= 20
        elif self.stream == "shifted":
            x = x + 2
        return x.to(dtype)

    def all(self, d: int, dtype: torch.dtype = torch.float32) -> list[Float[Tensor, "_ {d}"]]:
        """The calibration batches."""
        return [self.batch(self.tokens, d, number=i, dtype=dtype) for i in range(self.batches)]


@dataclass(frozen=True)
class Specimen:
    """FFNs of one shape with a calibration set and a budget.

    Attributes:
        weights: of the first FFN; the others have the next seeds.
        calibration: of all FFNs.
        budget: as in :class:`tardis_fx.Config`.
    """

    weights: Weights
    calibration: Calibration = Calibration()
    budget: float = 0.5

    def ffns(self, count: int = 1) -> list[FFN | GatedFFN]:
        """Makes new copies of the FFNs."""
        return [replace(self.weights, seed=self.weights.seed + i).ffn() for i in range(count)]

    def batches(self) -> list[Float[Tensor, "_ d"]]:
        """The calibration batches in the dtype of the weights."""
        return self.calibration.all(self.weights.d, self.weights.dtype)

    def unseen(self, *shape: int) -> Float[Tensor, "... d"]:
        """Inputs of [*shape, d] with the distribution of the calibration inputs, but not among them."""
        number = self.calibration.batches
        return self.calibration.batch(*shape, self.weights.d, number=number, dtype=self.weights.dtype)


def weights(
    *, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16), kinds: Sequence[str] = KINDS
) -> st.SearchStrategy[Weights]:
    """Weights of small FFNs, whose sizes are multiples of four.

    Args:
        dtypes: to draw from.
        kinds: of :data:`KINDS`, to draw from.
    """
    return st.builds(
        Weights,
        d=st.sampled_from([8, 12, 20]),
        hidden=st.sampled_from([32, 48, 80]),
        activation=st.sampled_from(ACTIVATIONS),
        bias=st.booleans(),
        structure=st.sampled_from(STRUCTURES),
        dtype=st.sampled_from(list(dtypes)),
        seed=st.integers(0, 2**10),
        kind=st.sampled_from(list(kinds)),
    )


def calibration_sets() -> st.SearchStrategy[Calibration]:
    """Calibration sets of one to three batches with 64 to 200 tokens."""
    return st.builds(
        Calibration,
        batches=st.integers(1, 3),
        tokens=st.integers(64, 200),
        stream=st.sampled_from(STREAMS),
        seed=st.integers(0, 2**10),
    )


def sites(
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    budgets: Sequence[float] = (0.5, 0.25, 0.8, 1.0),
    kinds: Sequence[str] = KINDS,
) -> st.SearchStrategy[Specimen]:
    """FFN sites with weights, calibration set and budget.

    Args:
        dtypes: of the weights.
        budgets: to draw from.
        kinds: of FFNs: plain, gated, or gated with one fused matrix.
    """
    return st.builds(Specimen, weights(dtypes=dtypes, kinds=kinds), calibration_sets(), st.sampled_from(list(budgets)))
