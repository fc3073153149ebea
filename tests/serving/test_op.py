from collections.abc import Callable
from functools import cache

import pytest
import torch
from builders.ffns import planned
from torch import Tensor, fx, nn

from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.serving import op
from tardis_fx.testing.ffn import FFN, GatedFFN, ffn, gated_ffn, inputs
from tardis_fx.testing.observation import observed

D, D_OUT = 16, 6

Make = Callable[[], FFN | GatedFFN]


@cache
def planned_ffn(make: Make, method: str) -> tuple[SiteWeights, SitePlan]:
    """An FFN that narrows its input, and its plan."""
    model = make()
    model.down.weight, model.down.bias = (nn.Parameter(p.detach()[:D_OUT]) for p in model.down.parameters())
    return observed(model).weights, planned(model, method=method).rewritten[0]


class Site:
    """An FFN with a plan, as the op takes it."""

    def __init__(self, tokens: int, make: Make = ffn, method: str = "guarded_fold") -> None:
        (w, entry), rewrite, self.x = planned_ffn(make, method), rewrite_named(method), inputs(tokens, D)
        self.constants, self.original = rewrite.constants(entry, w), matrices(w) | biases(w)
        self.rewritten = rewrite.forward(self.x, self.constants, entry)
        self.dense = dense(self.x, self.original, str(entry.activation))
        self.text = op.spec(entry, list(self.constants), list(self.original))
        self.always = op.spec(entry, list(self.constants), [])

    def __call__(self, x: Tensor, *, prefill: str = "original") -> Tensor:
        constants = list(self.constants.values())
        if prefill == "rewritten":
            return torch.ops.tardis.serve(x, constants, [], self.always, D_OUT)  # type: ignore[no-any-return]
        return torch.ops.tardis.serve(x, constants, list(self.original.values()), self.text, D_OUT)  # type: ignore[no-any-return]


def in_steps_of(monkeypatch: pytest.MonkeyPatch, *lengths: int) -> None:
    monkeypatch.setattr(op, "query_lengths", lambda rows: list(lengths))


@pytest.mark.parametrize("make", [ffn, gated_ffn])
@pytest.mark.parametrize("method", ["guarded_fold", "partial_linear"])
@pytest.mark.parametrize("lengths", [(1, 20, 3, 9), (20, 1), (1, 20), (9, 8, 9), (2, 3), (10, 12)])
def test_every_row_of_a_mixed_step_takes_the_branch_of_its_request(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], make: Make, method: str
) -> None:
    in_steps_of(monkeypatch, *lengths)
    site = Site(sum(lengths), make, method)
    assert (
        not torch.isclose(site.rewritten, site.dense, rtol=1e-3).all(1).any()
    )  # else the branches could not be told apart
    few = torch.tensor([n <= GuardedFold.decode_tokens for n in lengths]).repeat_interleave(torch.tensor(lengths))
    expected = torch.where(few[:, None], site.rewritten, site.dense)
    rtol, atol = (2e-3, 1e-3) if method == "partial_linear" else (1.3e-6, 1e-5)  # its kernel rounds inputs to codes
    torch.testing.assert_close(site(site.x), expected, rtol=rtol, atol=atol)


def test_many_decoding_requests_take_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps_of(monkeypatch, *[1] * (GuardedFold.decode_tokens + 1), 12)
    site = Site(GuardedFold.decode_tokens + 13)
    torch.testing.assert_close(site(site.x), site.dense)


def test_every_row_is_rewritten_where_the_original_is_not_given() -> None:
    site = Site(20)
    torch.testing.assert_close(site(site.x, prefill="rewritten"), site.rewritten)


def test_leading_axes_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps_of(monkeypatch, 2, 10)
    site = Site(12)
    torch.testing.assert_close(site(site.x.view(1, 12, D)), site(site.x).view(1, 12, D_OUT))


def test_one_graph_with_one_node_for_the_site_serves_steps_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "query_lengths", lambda rows: [rows])
    site, graphs = Site(20), []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    run = torch.compile(site, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (20, 3, 12):
        x = site.x[:tokens].clone()
        torch.testing.assert_close(run(x), site(x))
    assert [[target for target in graph if "tardis" in str(target)] for graph in graphs] == [[torch.ops.tardis.serve]]


def test_sites_of_equal_settings_have_equal_text() -> None:
    assert Site(3).text == Site(5).text
