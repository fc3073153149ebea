"""Measures a real server under load, with and without a plan: ``vllm serve`` on loopback and vLLM's own client.

python benchmarks/serving.py demo --requests 200       # the packaged model
python benchmarks/serving.py wide --requests 200       # random weights, an FFN of 32 MiB a layer

To be run by the Python of an environment with vLLM (scripts/vllm_env.sh).
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from tardis_fx import Config, calibrate
from tardis_fx.bench import shapes
from tardis_fx.demo.model import FOLDER, SEPARATOR, WINDOWS, load
from tardis_fx.measure.machine import conditions

VLLM = [str(Path(sys.executable).with_name("vllm"))]
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def prepare(name: str, folder: Path, budget: float) -> tuple[Path, Path, list[list[int]]]:
    """Writes a model's folder for vLLM and a plan, and returns them with prompts from unseen text."""
    import transformers as hf

    demo = load()
    model: Any = demo.model
    batches = list(demo.windows("calibration", WINDOWS).split(8))
    if name == "wide":
        config = hf.GPT2Config(
            n_embd=1024, n_head=16, n_layer=4, n_positions=256, vocab_size=4096, bos_token_id=0, eos_token_id=0
        )
        model = shapes.build(config, torch.float32, 1)
    model.save_pretrained(folder / "model")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"), eos_token=SEPARATOR)
    tokenizer.save_pretrained(folder / "model")
    plan = folder / "model.tardis.safetensors"
    calibrate(model, batches, config=Config(method="guarded_fold", budget=budget)).save(plan)
    return folder / "model", plan, demo.windows("test", 8)[:, :48].tolist()


@contextmanager
def server(model: Path, plan: Path | None, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Starts a server, waits until it answers, yields its address and process, and stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--served-model-name", "model", "--no-enable-prefix-caching"]
    if plan:
        command += ["--load-format", "tardis", "--model-loader-extra-config", json.dumps({"plan": str(plan)})]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended at its start: see {log}")
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield address, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def memory(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of a process and its descendants, MiB."""
    root = psutil.Process(process.pid)
    return sum(int(p.memory_info().rss) for p in [root, *root.children(recursive=True)]) / 2**20


def load_test(address: str, model: Path, folder: Path, options: argparse.Namespace, requests: int) -> dict[str, Any]:
    """Runs vLLM's own client and returns its results."""
    command = [
        *VLLM, "bench", "serve", "--base-url", address, "--model", "model", "--tokenizer", str(model),
        "--dataset-name", "random", "--random-input-len", str(options.input),
        "--random-output-len", str(options.output),
        "--num-prompts", str(requests), "--max-concurrency", str(options.concurrency), "--ignore-eos",
        "--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", str(folder),
        "--result-filename", "result.json",
    ]  # fmt: skip
    with (folder / "client.log").open("ab") as log:
        subprocess.run(command, check=True, env=ENVIRONMENT, stdout=log, stderr=log)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def complete(address: str, prompts: list[list[int]]) -> list[str]:
    """Requests greedy continuations of prompts, one at a time."""
    texts = []
    for prompt in prompts:
        body = {"model": "model", "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            texts.append(json.load(answer)["choices"][0]["text"])
    return texts


def main() -> None:
    """Serves the model with and without the plan, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["demo", "wide"])
    parser.add_argument("--budget", type=float, default=0.075)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens generated")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="serving_"))
    model, plan, prompts = prepare(options.model, folder, options.budget)
    print(
        f"{options.model}, budget {options.budget:.1%}, {options.requests} requests of "
        f"{options.input} + {options.output}, "
        f"{options.concurrency} at a time; {conditions()}, {os.cpu_count()} CPUs, "
        f"load average {os.getloadavg()[0]:.1f} before; logs in {folder}"
    )
    results, answers = {}, {}
    for name, served in (("original", None), ("plan", plan)):
        with server(model, served, folder / f"{name}.log") as (address, process):
            answers[name] = complete(address, prompts)
            load_test(address, model, folder, options, 8 * options.concurrency)  # warm-up of memory
            before = memory(process)
            results[name] = load_test(address, model, folder, options, options.requests)
            grown = memory(process) - before
            if served:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = results[name]
        print(
            f"{name:9} {result['output_throughput']:8.1f} tokens/s, {result['median_tpot_ms']:7.2f} ms a token, "
            f"{result['median_ttft_ms']:7.1f} ms to the first (medians); {result['completed']} completed, "
            f"{result['failed']} failed; memory {before:.0f} MiB, {grown:+.0f} MiB after; "
            f"load average {os.getloadavg()[0]:.1f}"
        )
    original, rewritten = results["original"], results["plan"]
    print(
        f"ratio plan / original: throughput {rewritten['output_throughput'] / original['output_throughput']:.2f}, "
        f"time per token {rewritten['median_tpot_ms'] / original['median_tpot_ms']:.2f}"
    )
    with server(model, plan, folder / "again.log") as (address, _):
        again = complete(address, prompts)
    print(f"killed and restarted, the same text: {again == answers['plan']}")
    same = sum(map(str.__eq__, answers["original"], answers["plan"]))
    print(f"{same} of {len(prompts)} texts of 64 tokens are the same as the original model's")


if __name__ == "__main__":
    main()
