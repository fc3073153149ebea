"""Files in the format of CTranslate2, and a Whisper's tensors by its names."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}
HEADER = (6, "WhisperSpec", 3)


def write(
    path: Path, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], header: tuple[int, str, int] = HEADER
) -> bytes:
    """Writes the file, and returns its content."""
    version, spec, revision = header
    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", revision, len(tensors))]
    for name, tensor in tensors.items():
        values = tensor.numpy().tobytes()
        parts += [text(name), struct.pack("<B", tensor.dim()), np.array(tensor.shape, "<u4").tobytes()]
        parts += [struct.pack("<BI", CODES[tensor.dtype], len(values)), values]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [text(alias) + text(name) for alias, name in aliases.items()]
    path.write_bytes(b"".join(parts))
    return b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def whisper(model: nn.Module, heads: int) -> dict[str, Tensor]:
    """The tensors of transformers' model, as CTranslate2 names and joins them; its output layer is an alias there."""
    state = {name.removeprefix("model."): tensor.half() for name, tensor in model.state_dict().items()}
    tensors = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def linear(name: str, *sources: str) -> None:
        zeros = torch.zeros(len(state[f"{sources[0]}.weight"]), dtype=torch.float16)  # of keys
        tensors[f"{name}/weight"] = torch.cat([state[f"{source}.weight"] for source in sources])
        tensors[f"{name}/bias"] = torch.cat([state.get(f"{source}.bias", zeros) for source in sources])

    def norm(name: str, source: str) -> None:
        tensors[f"{name}/gamma"], tensors[f"{name}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    for side in ("encoder", "decoder"):
        tensors[f"{side}/num_heads"] = torch.tensor(heads, dtype=torch.int16)
        tensors[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(2):
            name, source = f"{side}/layer_{i}", f"{side}.layers.{i}"
            linear(f"{name}/self_attention/linear_0", *(f"{source}.self_attn.{p}_proj" for p in "qkv"))
            linear(f"{name}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            norm(f"{name}/self_attention/layer_norm", f"{source}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{name}/attention/linear_0", f"{source}.encoder_attn.q_proj")
                linear(f"{name}/attention/linear_1", *(f"{source}.encoder_attn.{p}_proj" for p in "kv"))
                linear(f"{name}/attention/linear_2", f"{source}.encoder_attn.out_proj")
                norm(f"{name}/attention/layer_norm", f"{source}.encoder_attn_layer_norm")
            linear(f"{name}/ffn/linear_0", f"{source}.fc1")
            linear(f"{name}/ffn/linear_1", f"{source}.fc2")
            norm(f"{name}/ffn/layer_norm", f"{source}.final_layer_norm")
    return tensors
