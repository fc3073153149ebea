"""Builds language models of known shapes with random weights, or loads them from a folder."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tardis_fx.demo.model import FOLDER, load_weights
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.measure.machine import available_memory
from tardis_fx.measure.requirements import needed_by

#: Transformers config and changes of its defaults, by name; "demo", the packaged model's shape, is one more.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {}),
    "gpt2-xl": ("GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "opt-6.7b": ("OPTConfig", {
        "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }),
    "falcon-7b": ("FalconConfig", {}),
    "tinyllama-1.1b": ("LlamaConfig", {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }),
    "llama-7b": ("LlamaConfig", {}),
}  # fmt: skip


def config_of(shape: str | Path, layers: int | None = None) -> Any:
    """The transformers config of a shape or of a model's folder, with some or all (None) of the layers.

    Raises:
        ConfigError: there is no such shape, or it has fewer layers.
        BenchError: transformers is not installed, or the folder has no config of a causal language model.
    """
    folder = FOLDER if shape == "demo" else shape
    if isinstance(folder, str) and folder not in SHAPES:
        raise ConfigError(f"no shape {shape!r}: choose one of demo, {', '.join(SHAPES)}")
    with needed_by("`tardis bench model`"):
        import transformers as hf
    if isinstance(folder, str):
        name, changes = SHAPES[folder]
        config = getattr(hf, name)(**changes)
    else:
        if not (folder / "config.json").is_file():
            raise BenchError(f"no config.json in {folder}")
        try:
            config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                hf.AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise BenchError(f"no causal language model in {folder}: {str(error).splitlines()[0]}") from error
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ConfigError(f"layers must lie between 1 and {config.num_hidden_layers}, not {layers}")
        config.num_hidden_layers = layers
    return config


def build(config: Any, dtype: torch.dtype, room: float, device: str = "cpu", folder: Path | None = None) -> nn.Module:
    """Builds a model with random weights, or those in a folder, in eval mode and without gradients.

    Args:
        config: of transformers.
        dtype: of all weights.
        room: peak memory of the comparison, as a multiple of the weights.
        device: of the model.
        folder: of the weights; None makes random ones.

    Raises:
        BenchError: there is not enough memory.
        DemoError: the folder holds no weights of such a model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        weights = weight_bytes(AutoModelForCausalLM.from_config(config, dtype=dtype))
    need, free = weights * room, available_memory(device)
    if need > free:
        raise BenchError(
            f"the comparison takes about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: choose fewer layers "
            f"(of {config.num_hidden_layers}), another dtype, or fewer plans"
        )
    torch.manual_seed(0)
    if folder is not None:
        return load_weights(folder, config=config, dtype=dtype).to(device)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights; tied weights count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def step_bytes(model: Any) -> int:
    """Weight bytes that a decoded token reads: all except embedding tables, of which it reads only a row."""
    tables = {id(m.weight): m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.pop(id(model.get_output_embeddings().weight), None)  # tied: the head reads it whole
    return weight_bytes(model) - sum(tables.values())
