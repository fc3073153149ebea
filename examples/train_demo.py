"""Trains the demo's language model: a small GPT-2 on the source of the running Python's standard library.

    python examples/train_demo.py --minutes 60 --out tardis_fx/demo/model
    python examples/train_demo.py --minutes 60 --architecture opt --out models/relu
    python examples/train_demo.py --minutes 60 --architecture llama --out models/swiglu
    python examples/train_demo.py --minutes 60 --width 512 --layers 4 --out models/wide

Architecture: transformers' GPT2LMHeadModel (GELU), OPTForCausalLM (ReLU) or LlamaForCausalLM (SwiGLU), 8 heads, context
256, byte-level BPE of 4096 tokens; the demo's model has 6 layers, d = 256, 5.9M parameters. Data: the modules of the
``train`` split and their unit tests (``tardis_fx/demo/corpus.py``); the ``test`` split is never read, the
``calibration`` split is read for the loss printed on the way. AdamW, one cosine cycle over the wall-clock time given,
bfloat16 autocast, seed 0. What a run took and reached is written in ``config.json`` under ``training``.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel

from tardis_fx.demo.corpus import modules

CONTEXT = 256
SEPARATOR = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids of all texts in a row, each behind a separator."""
    ids = [i for e in tokenizer.encode_batch([SEPARATOR + t for t in texts]) for i in e.ids]
    return torch.tensor(ids)


def batch(ids: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(ids) - CONTEXT, (size,), generator=generator)
    return torch.stack([ids[s : s + CONTEXT] for s in starts])


@torch.no_grad()
def evaluate(model: PreTrainedModel, ids: torch.Tensor, windows: int = 32) -> float:
    """Mean loss per token, in nats, over windows spread evenly over the text."""
    model.eval()
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, windows).long()
    losses: list[float] = [model(x := ids[s : s + CONTEXT][None], labels=x).loss.item() for s in starts]
    model.train()
    return sum(losses) / len(losses)


def save(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, run: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"
    }  # tied
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(
        json.dumps(model.config.to_diff_dict() | {"training": run}, indent=2, sort_keys=True) + "\n"
    )


def config_of(architecture: str, width: int, layers: int) -> PreTrainedConfig:
    if architecture == "opt":
        return OPTConfig(
            vocab_size=4096, max_position_embeddings=CONTEXT, hidden_size=width, ffn_dim=4 * width,
            num_hidden_layers=layers, num_attention_heads=8, word_embed_proj_dim=width, activation_function="relu",
            dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(
            vocab_size=4096, max_position_embeddings=CONTEXT, hidden_size=width, intermediate_size=11 * width // 4,
            num_hidden_layers=layers, num_attention_heads=8, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    return GPT2Config(
        vocab_size=4096, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("tardis_fx/demo/model"))
    parser.add_argument("--architecture", choices=("gpt2", "opt", "llama"), default="gpt2")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    texts = [text for _, text in modules("train", unit_tests=True)]
    tokenizer = train_tokenizer([text for _, text in modules("train")])
    train, held_out = encode(tokenizer, texts), encode(tokenizer, [text for _, text in modules("calibration")])
    print(f"{len(train):,} training tokens, {len(held_out):,} held-out tokens")

    model = AutoModelForCausalLM.from_config(config_of(arguments.architecture, arguments.width, arguments.layers))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
    step_model = torch.compile(model)

    budget, started, steps, tokens = arguments.minutes * 60, 0.0, 0, 0
    bar = tqdm(total=round(budget), unit="s")
    while steps < 3 or time.perf_counter() - started < budget:
        if steps == 2:  # compilation does not count
            started = time.perf_counter()
        elapsed = time.perf_counter() - started if started else 0.0
        fraction = elapsed / budget
        rate = (
            arguments.learning_rate
            * min(1.0, (steps + 1) / 100)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batch(train, arguments.batch_tokens // CONTEXT, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens = steps + 1, tokens + ids.numel()
        bar.n = round(elapsed)
        bar.set_postfix(step=steps, tokens=f"{tokens / 1e6:.1f}M", loss=f"{loss.item():.3f}")
        if steps % 250 == 0:
            save(arguments.out, model, tokenizer, {"steps": steps, "tokens": tokens})
            bar.write(f"step {steps}: {tokens / 1e6:.1f}M tokens, held-out loss {evaluate(model, held_out):.3f}")
    bar.close()

    run = {
        "steps": steps,
        "tokens": tokens,
        "minutes": arguments.minutes,
        "seed": 0,
        "held_out_loss": round(evaluate(model, held_out, 256), 4),
    }
    save(arguments.out, model, tokenizer, run)
    print(json.dumps(run))


if __name__ == "__main__":
    main()
