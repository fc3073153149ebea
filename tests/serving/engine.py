"""Runs vLLM's engine: jobs as a JSON list on standard input, their results as the last line of standard output.

All in one process, one engine after the other, because most of the time goes into importing vLLM.
"""

import json
import os
import sys
from typing import Any
from unittest import mock

# Before vLLM is imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def generate(prompts: list[list[int]], tokens: list[int], **engine: Any) -> dict[str, Any]:
    """The greedy continuations of prompts, which the engine may run together.

    Args:
        prompts: token ids.
        tokens: how many to generate for each.
        engine: arguments of ``vllm.LLM``.

    Returns:
        ``tokens``; and in ``steps``, for each call of a rewritten FFN in this process that asked, how many tokens each
        request brought.
    """
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from tardis_fx.serving import op
    from tardis_fx.serving.step import query_lengths

    steps: list[list[int]] = []

    def asked(rows: int) -> list[int]:
        steps.append(query_lengths(rows))
        return steps[-1]

    replaced = mock.patch.object(op, "query_lengths", asked)
    replaced.start()
    try:
        options = {"dtype": "float32", "max_model_len": 64, "enable_prefix_caching": False, "skip_tokenizer_init": True}
        model = LLM(**options | engine)
        sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in tokens]
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "steps": steps}
    finally:
        model = None
        replaced.stop()
        torch.compiler.reset()
        cleanup_dist_env_and_memory()


def main() -> None:
    results = []
    for job in json.load(sys.stdin):
        try:
            results.append(generate(**job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.write("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
