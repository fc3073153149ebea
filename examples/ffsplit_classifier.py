"""FFSplit as in its paper (arXiv 2401.04044), on a small BERT that is trained here: split, fine-tuned, measured.

    pip install "tardis-fx[demo]" && python examples/ffsplit_classifier.py

The task: does a snippet of the standard library come from a unit test? The classifier is trained, and its split weights
are fine-tuned, on modules of the train split; heavy hitters are found on the calibration split; accuracy is that on
modules of the test split. Of each FFN a quarter of the neurons stays dense, the rest gets a tenth of full rank.
"""

import argparse
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import tardis_fx
from tardis_fx.demo.corpus import Split, modules
from tardis_fx.demo.model import load
from tardis_fx.measure.timing import Ratio, interleave, seconds

#: Tokens of a snippet, characters that hold them, snippets of a batch, rounds of timing.
LENGTH, LONGEST, BATCH, ROUNDS = 64, 800, 16, 20
#: Share of the FFN's bytes: a quarter of the neurons, and the others at a tenth of full rank.
BUDGET = 0.353
#: Results of the paper for BERT-base on GLUE (abstract).
PAPER = {"smaller": "43.1%", "faster": "1.25 to 1.56x", "accuracy lost": "0.3 to 1.0%"}

Batch = dict[str, torch.Tensor]


def batches(split: Split, count: int, seed: int = 0) -> list[Batch]:
    """Batches of snippets of modules drawn at random, half of them from unit tests, with labels."""
    encode = load().tokenizer.encode
    texts: dict[bool, list[str]] = {True: [], False: []}
    for path, text in modules(split, unit_tests=True):
        if len(text) > 2 * LONGEST:
            texts[bool({"test", "tests"}.intersection(path.parts))].append(text)
    if not all(texts.values()):
        raise SystemExit("this Python is installed without the unit tests of its library, or without its source")
    draw = random.Random(seed)
    labels = [i % 2 for i in range(BATCH)]

    def snippet(label: int) -> list[int]:
        while True:
            text = draw.choice(texts[bool(label)])
            start = draw.randrange(len(text) - LONGEST)
            ids: list[int] = encode(text[start : start + LONGEST]).ids
            if len(ids) >= LENGTH:
                return ids[:LENGTH]

    return [
        {"input_ids": torch.tensor([snippet(label) for label in labels]), "labels": torch.tensor(labels)}
        for _ in range(count)
    ]


def train(model: BertForSequenceClassification, batches: list[Batch], rate: float = 5e-4) -> None:
    """One pass of AdamW over the batches; leaves the model in eval mode."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=len(batches))
    model.train()
    for batch in tqdm(batches, desc="training", unit="step"):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(run: Callable[..., Any], batches: list[Batch]) -> float:
    """Share of snippets that are classified correctly."""
    correct = sum(int((run(input_ids=b["input_ids"]).logits.argmax(-1) == b["labels"]).sum()) for b in batches)
    return correct / (BATCH * len(batches))


def main(steps: int = 160, tuning_steps: int = 64, snippets: int = 1024, width: int = 256) -> dict[str, float]:
    """Trains, splits, fine-tunes and measures; returns what it prints."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=load().tokenizer.get_vocab_size(), hidden_size=width, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=LENGTH, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(shape)
    test = batches("test", snippets // BATCH, seed=1)
    train(model, batches("train", steps))

    config = tardis_fx.Config(method="ffsplit", budget=BUDGET, prefill="rewritten")
    plan = tardis_fx.calibrate(model, batches("calibration", 16), config=config)
    tuned = tardis_fx.finetune(model, plan, batches("train", tuning_steps, seed=2), epochs=1, learning_rate=3e-4)

    runs = {"dense": torch.compile(model)}
    for name, rewritten in (("split", plan), ("split and fine-tuned", tuned)):
        options: Any = {"plan": rewritten, "select": "always"}
        runs[name] = torch.compile(model, backend="tardis", options=options)
    figures = {f"accuracy, {name}": accuracy(run, test) for name, run in runs.items()}
    with torch.no_grad():
        ids = test[0]["input_ids"]
        timed = {name: partial(seconds, partial(run, ids)) for name, run in runs.items() if name != "split"}
        times = interleave(timed, ROUNDS)
    figures["faster"] = Ratio.between(times["dense"], times["split and fine-tuned"]).median
    encoder = sum(p.numel() * p.element_size() for p in model.bert.encoder.parameters())
    figures["smaller"] = sum(site.dense_bytes - site.touched_bytes for site in tuned.sites if site.method) / encoder
    report(figures, len(test) * BATCH)
    return figures


def report(figures: Mapping[str, float], snippets: int) -> None:
    """Prints the figures with those of the paper."""
    lost = figures["accuracy, dense"] - figures["accuracy, split and fine-tuned"]
    error = (figures["accuracy, dense"] * (1 - figures["accuracy, dense"]) / snippets) ** 0.5
    print(f"{snippets} snippets of modules never trained on; standard error of an accuracy {error:.1%}")
    for name in ("dense", "split", "split and fine-tuned"):
        print(f"accuracy, {name:<21} {figures[f'accuracy, {name}']:.1%}")
    print(f"{'':<31} {'here':>8}   paper, BERT-base on GLUE")
    print(f"{'accuracy lost':<31} {lost:>8.1%}   {PAPER['accuracy lost']}")
    print(f"{'layers smaller, without embeddings':<31} {figures['smaller']:>5.1%}   {PAPER['smaller']}")
    print(f"{f'faster than Inductor, {BATCH} texts':<31} {figures['faster']:>7.2f}x   {PAPER['faster']}")
    print(f"on {torch.get_num_threads()} threads; stored besides, for recognising the model: its own FFN weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160, help="of training, 16 snippets each")
    main(parser.parse_args().steps)
