"""A small GPT-2 whose linear layers outside of FFNs are wide enough for codes, and its plan."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tardis_fx import Config, Plan, calibrate
from tardis_fx.plan import SitePlan

VOCABULARY, D = 96, 64


def gpt2() -> hf.PreTrainedModel:
    """Two blocks; the head has the table of the embeddings."""
    torch.manual_seed(0)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**ids, n_layer=2, n_embd=D, n_head=2, n_positions=64)).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token numbers."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [tokens(8, 64, seed=seed) for seed in range(4)]
FEW, MANY = tokens(1, 4, seed=9), tokens(2, 40, seed=9)


def config(**changed: Any) -> Config:
    """Leaves the FFNs as they are."""
    given: dict[str, Any] = {"method": {"*": None}, "linear_bits": 4, "prefill": "rewritten", "progress": False}
    return Config(**given | changed)


@cache
def layers_planned() -> Plan:
    """The plan of :func:`gpt2`."""
    return calibrate(gpt2(), BATCHES, config=config())


@torch.no_grad()
def logits(run: Callable[..., Any], ids: Tensor) -> Tensor:
    """What a form of the model gives."""
    output: Tensor = run(ids, use_cache=False).logits
    return output


def layers(plan: Plan) -> list[SitePlan]:
    """The entries of the layers in codes."""
    return [layer for layer in plan.linear_layers if isinstance(layer, SitePlan)]
