from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Block, batches, ffn, inputs
from torch import Tensor, nn

from tardis_fx.observation.batches import rows_of
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run


class Kept:
    """Keeps what an observer sees."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x.clone())

    @property
    def tokens(self) -> Tensor:
        return torch.cat(self.seen)


@torch.no_grad()
def inputs_of(blocks: list[Block], x: Tensor) -> list[Tensor]:
    """What the FFN of each block is given, by hand."""
    found = []
    for block in blocks:
        found.append(block.norm(x))
        x = block(x)
    return found


def test_every_site_is_shown_its_own_inputs_in_every_run() -> None:
    blocks = [Block(ffn(seed=i)) for i in range(3)]
    observation = BatchObservation(nn.Sequential(*blocks).eval(), batches(), progress=False)
    assert [site.site.name for site in observation.sites] == ["0.ffn", "1.ffn", "2.ffn"]
    expected = inputs_of(blocks, torch.cat(batches()))
    for _ in range(2):
        kept = observation.answer(Run("test", lambda _: Kept(), observation.sites))
        for site, x in zip(observation.sites, expected, strict=True):
            torch.testing.assert_close(kept[site.fingerprint].tokens, x)


def test_only_the_sites_asked_for_are_observed() -> None:
    model = nn.Sequential(*(Block(ffn(seed=i)) for i in range(2))).eval()
    observation = BatchObservation(model, batches(), progress=False)
    kept = observation.answer(Run("test", lambda _: Kept(), observation.sites[1:]))
    assert list(kept) == [observation.sites[1].fingerprint]


class Tailed(nn.Module):
    """An FFN, and a tail under which the model runs in a context."""

    def __init__(self, tail: Callable[[Tensor], Tensor], seed: int = 0) -> None:
        super().__init__()
        self.ffn, self.tail = ffn(seed=seed), tail

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.tail(self.ffn(x))


def test_a_run_stops_after_the_last_site_and_leaves_contexts() -> None:
    calls = []

    @torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
    def tail(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin()

    model = Tailed(tail).eval()
    observation = BatchObservation(model, batches(), progress=False)
    calls.clear()
    kept = observation.answer(Run("test", lambda _: Kept(), observation.sites))
    (site,) = observation.sites
    torch.testing.assert_close(kept[site.fingerprint].tokens, torch.cat(batches()))
    assert not calls
    assert not torch.is_inference_mode_enabled()
    assert all(output is not None for _, output, _ in observation.outputs({}))
    assert calls


@pytest.mark.parametrize("seed", [0, 1], ids=["the same weights", "other weights"])
def test_every_graph_runs_if_a_site_comes_after_a_graph_break(seed: int) -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    model = nn.Sequential(Tailed(broken), Tailed(torch.sin, seed)).eval()
    observation = BatchObservation(model, batches(), progress=False)
    kept = observation.answer(Run("test", lambda _: Kept(), observation.sites))
    assert sum(len(kept[site.fingerprint].tokens) for site in observation.sites) == 2 * len(torch.cat(batches()))


def test_a_replaced_site_changes_what_later_sites_see_and_not_what_it_sees_itself() -> None:
    blocks = [Block(ffn(seed=i)) for i in range(2)]
    observation = BatchObservation(nn.Sequential(*blocks).eval(), batches(), progress=False)
    first, second = observation.sites
    run = Run("test", lambda _: Kept(), observation.sites, replaced={first.fingerprint: lambda x: 2 * x})
    kept = observation.answer(run)
    x = torch.cat(batches())
    with torch.no_grad():
        normed = blocks[0].norm(x)
        after = blocks[1].norm(x + 2 * normed)
    torch.testing.assert_close(kept[first.fingerprint].tokens, normed)
    torch.testing.assert_close(kept[second.fingerprint].tokens, after)


def test_a_replaced_site_is_seen_by_the_site_that_follows_directly() -> None:
    model = nn.Sequential(ffn(seed=1), ffn(seed=2)).eval()
    observation = BatchObservation(model, batches(), progress=False)
    first, second = observation.sites
    run = Run("test", lambda _: Kept(), [second], replaced={first.fingerprint: lambda x: 2 * x})
    kept = observation.answer(run)
    torch.testing.assert_close(kept[second.fingerprint].tokens, 2 * torch.cat(batches()))


def test_tokens_come_as_rows_of_float32_whatever_the_batch() -> None:
    model = ffn().bfloat16()
    given = [inputs(5, 16).bfloat16(), inputs(2, 3, 16).bfloat16(), inputs(16).bfloat16()]
    observation = BatchObservation(model, given, progress=False)
    kept = observation.answer(Run("test", lambda _: Kept(), observation.sites))
    (only,) = kept.values()
    assert [(x.shape, x.dtype) for x in only.seen] == [((n, 16), torch.float32) for n in (5, 6, 1)]


def test_no_token_is_missed_where_batches_differ_in_shape() -> None:
    """From the second shape on, the graph has symbolic sizes."""
    given = [models.tokens(2, 8), models.tokens(3, 9), models.tokens(1, 12)]
    observation = BatchObservation(models.gpt2(), given, progress=False)
    kept = observation.answer(Run("test", lambda _: Kept(), observation.sites))
    assert [len(site.tokens) for site in kept.values()] == [16 + 27 + 12] * 2


def test_a_site_knows_its_weights_as_they_are_stored() -> None:
    gpt2 = models.gpt2()
    observation = BatchObservation(gpt2, [models.tokens(2, 8)], progress=False)
    site, mlp = observation.sites[0], gpt2.transformer.h[0].mlp
    assert torch.equal(site.weights.up, mlp.c_fc.weight.T)
    assert torch.equal(site.weights.down, mlp.c_proj.weight.T)
    assert site.weights.up_bias is not None
    assert torch.equal(site.weights.up_bias, mlp.c_fc.bias)
    assert site.parameters[0].data_ptr() == mlp.c_fc.weight.data_ptr()
    assert site.weights.bytes == sum(p.numel() * 4 for p in mlp.parameters())


class Streamed(Block):
    """A block whose weights are in memory, in a buffer that all blocks share, while it runs."""

    def __init__(self, seed: int, buffer: list[Tensor]) -> None:
        super().__init__(ffn(seed=seed))
        self.stored, self.buffer = [parameter.detach().clone() for parameter in self.ffn.parameters()], buffer
        self.register_forward_pre_hook(lambda *_: self.arrive())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def arrive(self) -> None:
        for parameter, value, room in zip(self.ffn.parameters(), self.stored, self.buffer, strict=True):
            parameter.data = room.copy_(value)


def test_sites_whose_weights_share_a_buffer_are_refused_but_for_the_one_that_is_there() -> None:
    buffer = [parameter.detach().clone() for parameter in ffn().parameters()]
    model = nn.Sequential(*(Streamed(seed, buffer) for seed in range(3))).eval()
    observation = BatchObservation(model, batches(), progress=False)
    assert len({site.fingerprint for site in observation.sites}) == 3
    reasons = [str(site.site.reason) for site in observation.sites]
    assert ["took the place" in reason for reason in reasons] == [True, True, False], reasons


# ---- Trials


class Rows(nn.Module):
    """Two blocks one after the other; notes how many rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.rows = nn.Sequential(*(Block(ffn(seed=i)) for i in range(2))), list[int]()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        torch.compiler.disable(self.rows.append)(len(x))
        output: Tensor = self.blocks(x)
        return output


def distance(function: Any, batch: Any, dense: Tensor, changed: Tensor) -> float:
    return float((changed - dense).square().sum(-1).mean())


def test_a_trial_replaces_one_site_at_a_time_and_tells_how_far_the_output_moves() -> None:
    model, x = Rows(), torch.cat(batches(2))
    observation = BatchObservation(model, [x], progress=False)
    first, second = observation.sites
    found = observation.answer(
        Run("trial", lambda site: lambda x: 1.0 * x if site is first else 0 * x, observation.sites, moved=distance)
    )
    with torch.no_grad():
        one, two = model.blocks
        assert isinstance(one, Block)
        assert isinstance(two, Block)
        dense = two(one(x))
        after_first = x + one.norm(x)
        expected = {first.fingerprint: two(after_first), second.fingerprint: one(x)}
    for identity, changed in expected.items():
        assert found[identity] == pytest.approx(distance(None, None, dense, changed), rel=1e-4)


def test_an_output_that_tells_nothing_ends_a_trial() -> None:
    model = Rows()
    observation = BatchObservation(model, batches(), progress=False)
    model.rows.clear()
    assert not observation.answer(Run("trial", lambda _: lambda x: x, observation.sites, moved=lambda *_: None))
    assert len(model.rows) == 2


@pytest.mark.parametrize(("tokens", "rows"), [(16, 8), (512, 1), (300, 2)])
def test_a_trial_runs_few_rows_of_many_tokens(tokens: int, rows: int) -> None:
    model = Rows()
    observation = BatchObservation(model, [torch.randn(8, tokens, 16)], progress=False)
    model.rows.clear()
    observation.answer(Run("trial", lambda _: lambda x: x, observation.sites, moved=distance))
    assert model.rows == [rows] * 3


def test_a_model_that_takes_no_fewer_rows_is_tried_on_all() -> None:
    class Fixed(Rows):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = super().forward(x) + torch.zeros(8, 1, 1)
            return output

    model = Fixed()
    observation = BatchObservation(model, [torch.randn(8, 300, 16)], progress=False)
    model.rows.clear()
    assert len(observation.answer(Run("trial", lambda _: lambda x: x, observation.sites, moved=distance))) == 2
    assert model.rows[1:] == [8] * 3


def test_a_batch_whose_tensors_have_different_first_sizes_is_tried_whole() -> None:
    assert rows_of({"x": torch.zeros(8, 2), "positions": torch.zeros(1, 2)}) is None
    assert rows_of({"x": torch.zeros(8, 2), "scale": torch.tensor(1.0)}) is None
    assert rows_of({"x": torch.zeros(8, 2), "mask": torch.zeros(8), "flag": True}) == 8
    assert rows_of(UserDict({"x": torch.zeros(8, 2)})) == 8
