"""Decoding with layers of GPT-2 XL, which fit in no cache: the last table of ``tardis demo``."""

import gc
from typing import Any

import torch
from rich.console import Console

from tardis_fx.bench import shapes
from tardis_fx.bench.codes import CALIBRATED
from tardis_fx.bench.model import FROZEN, MARGIN, Contenders
from tardis_fx.bench.plans import random_plans
from tardis_fx.bench.timings import Timing, report, warm_cache
from tardis_fx.measure.decoding import sample_tokens
from tardis_fx.measure.machine import Machine, available_memory, last_level_cache
from tardis_fx.measure.progress import steps
from tardis_fx.measure.timing import LEAST_ROUNDS

#: Layers for which compiling and decoding take less than a minute on two cores; and those of GPT-2 XL.
LAYERS, ALL = 6, 48
#: Weight bytes of a layer, with its share of the vocabulary.
LAYER = 2 * (12 * 1600**2 + 1600 * 50257 // ALL)
STEPS, CONTEXT, SAMPLES = 8, 64, 32
DTYPE = torch.bfloat16


def large_decoding(console: Console) -> list[Timing]:
    """Times layers of GPT-2 XL with random weights, by Inductor and by a plan, and prints the result.

    Raises:
        BenchError: there is not enough memory for a layer.
    """
    gc.collect()
    torch.compiler.reset()
    room = (1 + CALIBRATED.added(DTYPE.itemsize) + 2 * FROZEN) * MARGIN**2
    layers = max(1, min(LAYERS, int(available_memory() / (room * LAYER))))
    config = shapes.config_of("gpt2-xl", layers)
    config.vocab_size = config.vocab_size * layers // ALL
    with steps(console, 4) as done:
        model: Any = shapes.build(config, DTYPE, (1 + CALIBRATED.added(DTYPE.itemsize)) * MARGIN)
        tokens, *batch = sample_tokens(model, 1 + SAMPLES, STEPS, trained=False)
        plans = random_plans(model, torch.stack(batch), [CALIBRATED])
        added = CALIBRATED.added(DTYPE.itemsize) * shapes.weight_bytes(model)
        contenders = Contenders(model, {str(recipe): plan for recipe, plan in plans.items()}, tokens, added)
        contenders.add_frozen()
        frozen = {name: form for name, form in contenders.forms.items() if form.freezing}
        if len(frozen) == len(contenders.forms) // 2:  # each has the same advantage
            contenders.forms = frozen
        done(f"{layers} layers of GPT-2 XL made")
        case = f"GPT-2 XL, {layers} of {ALL} layers, bfloat16"
        timings = contenders.timings(case, LEAST_ROUNDS, CONTEXT, done=done)
        done("decoded")
    console.print(
        "\n".join(["", report(timings, Machine.measured()), *warm_cache(timings, last_level_cache())])
        + f"\n\n{layers} of the {ALL} layers of GPT-2 XL, with as large a part of its vocabulary and random weights. "
        "The plan reads the shares of columns and refinements that a calibrated plan of Whisper tiny.en reads at 15% "
        "of the bytes in bfloat16, where it loses less than codes of 4 bits (docs/results.md).\n"
        "The FFNs of the small model stay in the processor's cache, where fewer instructions count as much as fewer "
        "bytes. The large one fits in no cache: each token reads its weights from memory, so the fewer bytes it reads, "
        "the less time it can take. `tardis bench model` times other shapes, and torchao.",
        markup=False,
        highlight=False,
        soft_wrap=True,  # a file gets the table in whole lines
    )
    return timings
