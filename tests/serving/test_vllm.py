"""vLLM's own engine on rewritten models, against the same plan in transformers; see ``scripts/test_vllm.sh``."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from builders.compiled import compiled
from builders.ffns import exact_plan

from tardis_fx import Config, Plan, calibrate
from tardis_fx.measure.decoding import cache_argument
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.guarded_fold import GuardedFold

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

VOCABULARY, TOKENS, LAYERS = 128, 24, 2
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = _IDS | {
    "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**_IDS, n_embd=64, n_layer=LAYERS, n_head=2, n_positions=64, initializer_range=0.2)
    ),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_SHAPE, word_embed_proj_dim=64, ffn_dim=256, init_std=0.2)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SHAPE, initializer_range=0.2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_SHAPE, intermediate_size=256, initializer_range=0.2)
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_SHAPE, intermediate_size=192, mlp_bias=True, initializer_range=0.2)
    ),
    "gemma": lambda: hf.GemmaForCausalLM(
        hf.GemmaConfig(**_SHAPE, intermediate_size=192, num_key_value_heads=1, head_dim=32, initializer_range=0.2)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SHAPE, intermediate_size=192, initializer_range=0.2)),
}  # fmt: skip


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


#: The third prompt is short enough for its prefill to be rewritten.
PROMPTS = prompts(12, 20, 5, 30)

#: Calls of FFNs in which rows are rewritten, of requests that come one after the other.
REWRITTEN = LAYERS * (len(PROMPTS) * (TOKENS - 1) + 1)


def build(family: str, seed: int = 0) -> hf.PreTrainedModel:
    torch.manual_seed(seed)
    model = _FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (16, 64), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": batch} for batch in ids.split(4)]


@torch.no_grad()
def greedy(model: Any, count: int = TOKENS) -> list[list[int]]:
    """What transformers generates, one prompt at a time."""
    outputs, name = [], cache_argument(model)
    for prompt in PROMPTS:
        ids, past, tokens = torch.tensor([prompt]), None, list[int]()
        for _ in range(count):
            output = model(input_ids=ids, **{name: past}, use_cache=True)
            past = getattr(output, name)
            tokens.append(int(output.logits[0, -1].argmax()))
            ids = torch.tensor([tokens[-1:]])
        outputs.append(tokens)
    return outputs


@dataclass(frozen=True)
class Case:
    """A model on disk with a plan beside it, and what transformers makes of both."""

    folder: Path
    plan: Path
    original: list[list[int]]
    rewritten: list[list[int]]

    def job(self, plan: Path | None = None, prefill: str | None = None, **engine: Any) -> dict[str, Any]:
        extra = {"plan": str(plan or self.plan)} | ({"prefill": prefill} if prefill else {})
        served = {"load_format": "tardis", "model_loader_extra_config": extra}
        return self.plain_job(**served | engine)

    def plain_job(self, **engine: Any) -> dict[str, Any]:
        options = {"model": str(self.folder), "enforce_eager": True, "max_num_seqs": 1}
        return {"prompts": PROMPTS, "tokens": [TOKENS] * len(PROMPTS)} | options | engine


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    @cache
    def make(family: str, method: str = "guarded_fold", budget: float = 0.15) -> Case:
        folder, model = tmp_path_factory.mktemp(family), build(family)
        model.save_pretrained(folder / "model")
        plan = calibrate(model, batches(), config=Config(method=method, budget=budget, progress=False))
        plan.save(folder / "plan.safetensors")
        torch._dynamo.reset()
        case = Case(folder / "model", folder / "plan.safetensors", greedy(model), greedy(compiled(model, plan)))
        assert case.original != case.rewritten  # else a server that ignores the plan would pass
        return case

    return make


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(jobs: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Runs jobs in one process."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_CACHE_ROOT": str(root)},
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def tokens(results: list[dict[str, Any]]) -> list[Any]:
    return [result.get("tokens", result) for result in results]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_tokens_are_those_of_the_same_plan_in_transformers(
    case: Callable[..., Case], cache_root: Path, eager: bool, ranks: int
) -> None:
    cases = [case(family) for family in _FAMILIES]
    results = run([c.job(enforce_eager=eager, tensor_parallel_size=ranks) for c in cases], cache_root)
    assert tokens(results) == [c.rewritten for c in cases]
    if ranks == 1:  # else the calls are made in processes of their own
        assert [sum(max(step) <= GuardedFold.decode_tokens for step in f["steps"]) for f in results] == [
            REWRITTEN
        ] * len(cases)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_plans_in_codes_are_served_by_one_rank_and_refused_by_two(
    case: Callable[..., Case], cache_root: Path, eager: bool
) -> None:
    cases = [case(family, "partial_linear", 0.1) for family in _FAMILIES]
    jobs = [c.job(enforce_eager=eager) for c in cases]
    *results, refused = run([*jobs, cases[0].job(tensor_parallel_size=2)], cache_root)
    assert tokens(results) == [c.rewritten for c in cases]
    assert [sum(max(step) <= GuardedFold.decode_tokens for step in f["steps"]) for f in results] == [REWRITTEN] * len(
        cases
    )
    assert "WorkerProc initialization failed" in refused["error"]  # its log has the ServingError


def test_a_guard_that_corrects_everything_gives_the_unmodified_models_tokens(
    case: Callable[..., Case], cache_root: Path, tmp_path: Path
) -> None:
    jobs = []
    for family in _FAMILIES:
        sites = BatchObservation(build(family), batches(), progress=False).sites
        plan = tmp_path / f"{family}.safetensors"
        entries = [(exact_plan(s.weights, s.parameters, str(s.site.activation)), s.fingerprint) for s in sites]
        Plan(tuple(replace(entry, fingerprint=f) for entry, f in entries), Config()).save(plan)
        jobs.append(case(family).job(plan, prefill="rewritten"))
    assert tokens(run(jobs, cache_root)) == [case(family).original for family in _FAMILIES]


def test_prompts_and_decoding_requests_in_one_step_take_the_branch_of_each(
    case: Callable[..., Case], cache_root: Path
) -> None:
    cases, lengths = [case("opt"), case("llama")], [24, 9, 16, 20]
    jobs = [c.job(max_num_seqs=2, max_num_batched_tokens=64) | {"tokens": lengths} for c in cases]
    for served, result in zip(cases, run(jobs, cache_root), strict=True):
        assert any(
            min(step) == 1 and max(step) > GuardedFold.decode_tokens for step in result["steps"]
        )  # both in one step
        assert result["tokens"] == [ids[:n] for ids, n in zip(served.rewritten, lengths, strict=True)]


def test_a_plan_that_does_not_fit_stops_the_server_and_names_the_site(
    case: Callable[..., Case], cache_root: Path, tmp_path: Path
) -> None:
    served = case("opt")
    stale = build("opt")
    with torch.no_grad():
        stale.model.decoder.layers[1].fc1.weight[0, 0] += 1e-3
    stale.save_pretrained(tmp_path / "stale")
    build("opt", seed=9).save_pretrained(tmp_path / "foreign")
    inside = Path(shutil.copytree(served.folder, tmp_path / "inside"), served.plan.name)
    shutil.copy(served.plan, inside)
    jobs = [
        served.job(model=str(tmp_path / "stale")),
        served.job(model=str(tmp_path / "foreign")),
        served.job(case("gpt2").plan),
        served.job(dtype="bfloat16"),
        served.job(tmp_path / "none.safetensors"),
        served.job(inside, model=str(inside.parent)),
        served.job(model_loader_extra_config={}),
    ]
    expected = [
        ("StaleWeightError", "model.decoder.layers.1: no FFN has its weights"),
        ("PlanMismatchError", "model.decoder.layers.0: no FFN has its weights"),
        ("PlanMismatchError", "transformer.h.0.mlp: "),
        ("PlanMismatchError", "made for torch.float32 weights, but the engine has torch.bfloat16"),
        ("PlanFileError", "cannot read the plan file"),
        ("ServingError", "is in the model's folder"),
        ("ConfigError", '{"plan": "FILE"}'),
    ]
    for result, (kind, message) in zip(run(jobs, cache_root), expected, strict=True):
        assert result["error"].startswith(kind)
        assert message in result["error"]


def test_a_graph_compiled_for_one_plan_is_not_taken_for_another(case: Callable[..., Case], tmp_path: Path) -> None:
    served = case("gpt2")
    plain = [served.plain_job(enforce_eager=False)]
    rewritten = [served.job(enforce_eager=False)]
    generated = [tokens(run(jobs, tmp_path)) for jobs in (plain, rewritten, rewritten, plain)]
    assert generated == [[served.original], [served.rewritten], [served.rewritten], [served.original]]
