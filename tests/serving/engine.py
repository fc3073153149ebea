"""Runs vLLM's engine in a process of its own: a job as JSON on standard input, its result as the last line of standard output."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Before vLLM is imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def generate(prompts: list[list[int]], tokens: int, **engine: Any) -> list[list[int]]:
    """The greedy continuations of prompts, which the engine may run together.

    Args:
        prompts: token ids.
        tokens: how many to generate.
        engine: arguments of ``vllm.LLM``.
    """
    from vllm import LLM, SamplingParams

    model = LLM(skip_tokenizer_init=True, enable_prefix_caching=False, dtype="float32", max_model_len=64, **engine)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(generate(**json.load(sys.stdin))))
