"""Text that every Python brings along: docstrings of the standard library, split by module."""

import ast
import re
from functools import cache

import torch

from tardis_fx.demo.corpus import Split, modules

#: A sentence of ordinary words, which a voice can read out.
_PLAIN = re.compile(r"[A-Z][a-z]*(?:(?:,? |-)[a-z]+)+\.")


def sentences(split: Split, count: int, seed: int = 0) -> list[str]:
    """First paragraphs of docstrings of a split's modules, long ones only; evenly spread for seed 0, else drawn."""
    return _chosen([text for first, *_ in _paragraphs(split) if len(text := first) > 60], count, seed)


def spoken(split: Split, count: int, seed: int = 0) -> list[str]:
    """Pairs of sentences of a split's docstrings, 16 to 80 ordinary words; evenly spread for seed 0, else drawn."""
    parts = [s for texts in _paragraphs(split) for text in texts for s in re.split(r"(?<=[.!?]) ", text)]
    plain = _chosen([s for s in parts if _PLAIN.fullmatch(s) and 8 <= len(s.split()) <= 40], 2 * count, seed)
    return [" ".join(pair) for pair in zip(plain[::2], plain[1::2], strict=False)]


def running(split: Split) -> str:
    """Long paragraphs of a split's docstrings, a line for each, without examples in code."""
    return "\n".join(t for texts in _paragraphs(split) for t in texts if len(t) > 60 and ">>>" not in t)


@cache
def _paragraphs(split: Split) -> list[list[str]]:
    """The paragraphs of each docstring, without line breaks."""
    nodes = [node for _, source in modules(split) for node in ast.walk(ast.parse(source))]
    documented = [node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    texts = [text for node in documented if (text := ast.get_docstring(node))]
    return [[" ".join(paragraph.split()) for paragraph in text.split("\n\n")] for text in texts]


def _chosen(texts: list[str], count: int, seed: int) -> list[str]:
    """Different texts: evenly spread for seed 0, else drawn."""
    texts = list(dict.fromkeys(texts))
    if seed:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        return [texts[i] for i in order[:count].tolist()]
    return texts[:: max(1, len(texts) // count)][:count]
