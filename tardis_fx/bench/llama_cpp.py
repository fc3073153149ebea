"""llama.cpp as a rival: its ``llama-bench`` decodes with a file of the same shape and random weights."""

import json
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tardis_fx.errors import BenchError

#: Weight types: bytes of a block of 32 weights without its float16 scale, and the root mean square of random codes.
TYPES = {"Q8_0": (32, 74.0), "Q4_0": (16, 4.6)}
BLOCK = 32


class Rival(NamedTuple):
    """A contender that decodes in a process of its own.

    Attributes:
        run: decodes, and returns seconds per token.
        touched: weight bytes that a step reads.
    """

    run: Callable[[], float]
    touched: float


def llama_cpp(binaries: Path, config: Any, steps: int, folder: Path) -> dict[str, Rival]:
    """Contenders of each type for the shape of a transformers config, with files in a folder.

    Args:
        binaries: folder of ``llama-bench``.
        config: of a GPT-2 or a Llama.
        steps: tokens decoded in a round, from an empty cache.
        folder: where the files are written.

    Raises:
        BenchError: there is no ``llama-bench``, the package gguf is not installed, or llama.cpp is not timed for such a
            shape.
    """
    program = binaries / "llama-bench"
    if not program.is_file():
        raise BenchError(f"no llama-bench in {binaries}: give the folder of llama.cpp's programs")
    made = {}
    for kind in TYPES:
        path = folder / f"{kind}.gguf"
        touched = _write(config, kind, path)
        command = [program, "-m", path, "-p", 0, "-n", steps, "-t", torch.get_num_threads(), "-r", 1, "-o", "json"]
        made[f"llama.cpp {kind}"] = Rival(partial(_decode, list(map(str, command))), touched)
    return made


def _decode(command: list[str]) -> float:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return 1 / float(json.loads(ended.stdout)[0]["avg_ts"])
    except (ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        reason = (ended.stderr.strip().splitlines() or ["it printed no tokens per second"])[-1]
        raise BenchError(f"llama-bench failed with exit code {ended.returncode}: {reason}") from error


def _write(config: Any, kind: str, path: Path) -> int:
    """Writes a file of random weights; returns the bytes that a step reads."""
    try:
        import gguf
    except ImportError as missing:
        raise BenchError("timing llama.cpp needs gguf: pip install gguf") from missing
    if config.model_type not in ("gpt2", "llama"):
        raise BenchError(f"llama.cpp is timed for the shapes of GPT-2 and Llama, not of {config.model_type}")
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    matrices, vectors = _gpt2(config) if config.model_type == "gpt2" else _llama(config)
    writer.add_feed_forward_length(matrices["blk.0.ffn_up.weight"][0])
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    code_bytes, size = TYPES[kind]
    random = np.random.default_rng(0)
    for name, (rows, columns) in matrices.items():
        shape, width = (rows, columns // BLOCK * (code_bytes + 2)), gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), rows * shape[1], width)
    for name, dimensions in vectors.items():
        writer.add_tensor_info(name, dimensions, np.dtype(np.float32), 4 * int(np.prod(dimensions)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for rows, columns in matrices.values():
        blocks = random.integers(0, 256, (rows, columns // BLOCK, code_bytes + 2), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(columns**-0.5 / size).tobytes(), np.uint8)
        writer.write_tensor_data(blocks.reshape(rows, -1))
    for dimensions in vectors.values():
        writer.write_tensor_data(np.ones(dimensions, np.float32))
    writer.close()
    read = {name: rows * columns // BLOCK * (code_bytes + 2) for name, (rows, columns) in matrices.items()}
    if "output.weight" in matrices:  # else the head is the table of embeddings
        read.pop("token_embd.weight")
    norms = sum(4 * int(np.prod(dimensions)) for dimensions in vectors.values() if len(dimensions) == 1)
    return sum(read.values()) + norms


Matrices = Mapping[str, tuple[int, int]]
Vectors = Mapping[str, tuple[int, ...]]


def _gpt2(config: Any) -> tuple[Matrices, Vectors]:
    """Rows and columns of quantised matrices, and dimensions of tensors in float32."""
    d, hidden = config.hidden_size, config.n_inner or 4 * config.hidden_size
    layer = {"attn_qkv": (3 * d, d), "attn_output": (d, d), "ffn_up": (hidden, d), "ffn_down": (d, hidden)}
    matrices = {"token_embd.weight": (config.vocab_size, d)}
    vectors: dict[str, tuple[int, ...]] = {"position_embd.weight": (config.max_position_embeddings, d)}
    vectors |= {f"output_norm.{part}": (d,) for part in ("weight", "bias")}
    for i in range(config.num_hidden_layers):
        matrices |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        vectors |= {f"blk.{i}.{name}.bias": shape[:1] for name, shape in layer.items()}
        vectors |= {f"blk.{i}.{name}.{part}": (d,) for name in ("attn_norm", "ffn_norm") for part in ("weight", "bias")}
    return matrices, vectors


def _llama(config: Any) -> tuple[Matrices, Vectors]:
    """Rows and columns of quantised matrices, and dimensions of tensors in float32."""
    d, hidden = config.hidden_size, config.intermediate_size
    keys = d // config.num_attention_heads * config.num_key_value_heads
    layer = {
        "attn_q": (d, d), "attn_k": (keys, d), "attn_v": (keys, d), "attn_output": (d, d),
        "ffn_gate": (hidden, d), "ffn_up": (hidden, d), "ffn_down": (d, hidden),
    }  # fmt: skip
    matrices = {"token_embd.weight": (config.vocab_size, d)}
    if not config.tie_word_embeddings:
        matrices["output.weight"] = (config.vocab_size, d)
    vectors: dict[str, tuple[int, ...]] = {"output_norm.weight": (d,)}
    for i in range(config.num_hidden_layers):
        matrices |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        vectors |= {f"blk.{i}.{name}.weight": (d,) for name in ("attn_norm", "ffn_norm")}
    return matrices, vectors
