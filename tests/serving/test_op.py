from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders.ffns import Oracle, oracle

from tardis_fx.passes.base import rewrite_named
from tardis_fx.passes.pipeline import DECODE_TOKENS
from tardis_fx.serving import op

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, fx

GUARDED, EXACT = range(20), range(20, 30)


class Site:
    """An FFN with a plan, as the op takes it."""

    def __init__(self, tokens: int) -> None:
        self.made: Oracle = oracle(8, 40, tokens, "gelu", d_out=6)
        entry, w = self.made.plan(GUARDED, EXACT), self.made.weights
        self.constants = rewrite_named("partial_linear").constants(entry, w)
        self.original = {"up": w.up, "up_bias": w.up_bias, "down": w.down, "down_bias": w.down_bias}
        self.text = op.spec(entry, list(self.constants), list(self.original))
        self.always = op.spec(entry, list(self.constants), [])

    def __call__(self, x: Tensor, *, prefill: str = "original") -> Tensor:
        constants = list(self.constants.values())
        if prefill == "rewritten":
            return torch.ops.tardis.serve(x, constants, [], self.always, 6)
        return torch.ops.tardis.serve(x, constants, list(self.original.values()), self.text, 6)


def in_steps_of(monkeypatch: pytest.MonkeyPatch, *lengths: int) -> None:
    monkeypatch.setattr(op, "query_lengths", lambda rows: list(lengths))


@pytest.mark.parametrize("lengths", [(1, 20, 3, 9), (20, 1), (1, 20), (9, 8, 9), (2, 3), (10, 12)])
def test_every_row_of_a_mixed_step_takes_the_branch_of_its_request(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    in_steps_of(monkeypatch, *lengths)
    site = Site(sum(lengths))
    rewritten, dense = site.made.rewritten(GUARDED, EXACT), site.made.dense()
    assert not torch.isclose(rewritten, dense, rtol=1e-3).all(1).any()  # else the branches could not be told apart
    few = torch.tensor([n <= DECODE_TOKENS for n in lengths]).repeat_interleave(torch.tensor(lengths))
    torch.testing.assert_close(site(site.made.x), torch.where(few[:, None], rewritten, dense))


def test_many_decoding_requests_take_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps_of(monkeypatch, *[1] * (DECODE_TOKENS + 1), 12)
    site = Site(DECODE_TOKENS + 13)
    torch.testing.assert_close(site(site.made.x), site.made.dense())


def test_every_row_is_rewritten_where_the_original_is_not_given() -> None:
    site = Site(20)
    torch.testing.assert_close(site(site.made.x, prefill="rewritten"), site.made.rewritten(GUARDED, EXACT))


def test_leading_axes_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps_of(monkeypatch, 2, 10)
    site = Site(12)
    torch.testing.assert_close(site(site.made.x.view(1, 12, 8)), site(site.made.x).view(1, 12, 6))


def test_one_graph_with_one_node_for_the_site_serves_steps_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "query_lengths", lambda rows: [rows])
    site, graphs = Site(20), []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    run = torch.compile(site, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (20, 3, 12):
        x = site.made.x[:tokens].clone()
        torch.testing.assert_close(run(x), site(x))
    assert [[target for target in graph if "tardis" in str(target)] for graph in graphs] == [[torch.ops.tardis.serve]]


def test_sites_of_equal_settings_have_equal_text() -> None:
    assert Site(3).text == Site(5).text
