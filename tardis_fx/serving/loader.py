"""vLLM's model loader ``tardis``: loads weights like the ``auto`` loader, then rewrites the FFNs.

Rewriting happens between loading and vLLM's processing of weights: each rank has its shards, and nothing is packed yet.
"""

import hashlib
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from tardis_fx.config import Prefill, one_of
from tardis_fx.errors import ConfigError, PlanFileError, ServingError
from tardis_fx.graph.feed_forward import biases, matrices
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.serving import slots
from tardis_fx.serving.modules import RewrittenFFN, Through
from tardis_fx.serving.shards import shard

# Named after vLLM, because a server only shows messages of its loggers.
_log = logging.getLogger("vllm.tardis_fx")


class TardisLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not installed when types are checked
    """Loads a model and rewrites the FFNs of a plan."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Reads the options and makes the ``auto`` loader.

        Raises:
            ConfigError: the loader's extra config is invalid.
        """
        super().__init__(load_config)
        self._plan, self._prefill = _options(load_config.model_loader_extra_config)
        self._inner = DefaultModelLoader(replace(load_config, load_format="auto", model_loader_extra_config={}))

    def download_model(self, model_config: ModelConfig) -> None:
        """Downloads the model like the ``auto`` loader."""
        self._inner.download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Checks that the engine's configuration supports a plan, then loads the model.

        Raises:
            ServingError: it does not.
            PlanFileError: the plan cannot be read.
            PlanMismatchError: an FFN of the plan is not in the model.
        """
        _check(vllm_config)
        # vLLM finds compiled graphs on disk by its configuration, which excludes that of the loader.
        vllm_config.additional_config["tardis_fx"] = {
            "version": version("tardis-fx"), "plan": _hash(self._plan), "prefill": self._prefill,
        }  # fmt: skip
        model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Loads the weights and rewrites the model.

        Raises:
            PlanFileError: the plan cannot be read.
            PlanMismatchError: an FFN of the plan is not in the model.
            ServingError: the model is already rewritten, or an FFN cannot be removed from it.
        """
        if any(isinstance(module, RewrittenFFN) for module in model.modules()):
            raise ServingError("weights cannot be loaded again into a rewritten model: restart the server")
        path = Path(self._plan).absolute()
        if path.suffix == ".safetensors" and path.parent == Path(model_config.model).absolute():
            raise ServingError(f"{path} is in the model's folder, where vLLM would load it as weights: move it")
        plan = Plan.load(path)
        self._inner.load_weights(model, model_config)
        planned = slots.find(model, plan)
        for slot, entry in planned:
            _rewrite(slot, entry, self._prefill or plan.config.prefill)
        refused = [entry.name for entry in plan.sites if entry not in plan.rewritten]
        _log.info("%s: %d FFNs rewritten; refused by the plan: %s", plan, len(planned), ", ".join(refused) or "none")


def _options(extra: Any) -> tuple[str, Prefill | None]:
    """The plan's file, and a prefill that overrides that of the plan, from ``--model-loader-extra-config``.

    Raises:
        ConfigError: the config is not a mapping, lacks the plan, or has unknown keys.
    """
    if not isinstance(extra, dict) or not isinstance(extra.get("plan"), str) or extra.keys() - {"plan", "prefill"}:
        raise ConfigError(
            'the load format "tardis" needs --model-loader-extra-config \'{"plan": "FILE"}\' and takes no other key '
            f"than prefill; it was given {extra!r}"
        )
    one_of("prefill", extra.get("prefill"), (None, "original", "rewritten"))
    return extra["plan"], extra.get("prefill")


def _check(vllm_config: VllmConfig) -> None:
    """Refuses options that would change the weights, or that are untested.

    Raises:
        ServingError: such an option is set.
    """
    refused = {
        "a device other than the CPU": not current_platform.is_cpu(),
        "LoRA adapters": vllm_config.lora_config is not None,
        "a draft model": vllm_config.speculative_config is not None,
        "pipeline parallelism": vllm_config.parallel_config.pipeline_parallel_size > 1,
        "an additional_config that is not a mapping": not isinstance(vllm_config.additional_config, dict),
    }
    if options := [option for option, is_set in refused.items() if is_set]:
        raise ServingError(f"a plan cannot be served with {', '.join(options)}")


def _hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise PlanFileError(f"cannot read the plan file {path}: {error.strerror}") from error


def _rewrite(slot: slots.Slot, entry: SitePlan, prefill: Prefill) -> None:
    """Replaces an FFN's modules."""
    layers, weights, (rank, size), reduce = slot.layers, slot.weights, slot.shards, slot.reduces
    activation, down = slot.activation(str(entry.activation)), layers.pop(slot.down)
    if size > 1:
        entry = shard(entry, rank, size, down.input_size)
    rewrite = rewrite_named(entry.method)
    constants = rewrite.constants(entry, weights)
    original: dict[str, Tensor] = {}
    if prefill == "original" and not rewrite.exact:
        original = matrices(weights) | biases(weights)
        if rank:
            original.pop("down_bias", None)
    for name, layer in layers.items():
        setattr(slot.parent, name, Through(return_bias=layer.return_bias))
    setattr(slot.parent, activation, nn.Identity())
    ffn = RewrittenFFN(entry, constants, original, d_out=down.output_size, return_bias=down.return_bias, reduce=reduce)
    setattr(slot.parent, slot.down, ffn)
