"""Neurons whose output hardly varies become part of the bias; as many of the others stay as the budget allows."""

from dataclasses import dataclass

from tardis_fx.passes import Choice, Operands, StaticRewrite, biases, dense, matrices, measured, narrowed, one_of


class Spread(Operands):
    """Sums of what every neuron gives and of its square, both [h]."""

    merged = {"tokens": "sum", "total": "sum", "square": "sum"}  # over processes that share the batches

    def __init__(self, site):
        super().__init__(site)
        self.tokens, (self.total, self.square) = 0, self.neurons.down.new_zeros(2, len(self.neurons)).double()

    def add(self, x, hidden):
        self.tokens += len(hidden)
        self.total += hidden.double().sum(0)
        self.square += hidden.double().square().sum(0)


class MyRewrite(StaticRewrite):
    name = "my_rewrite"

    @dataclass(frozen=True)
    class Options:
        rest: str = "mean"  # what the neurons that go leave in the bias: their "mean" or, for comparison, "nothing"

        def __post_init__(self):
            one_of("rest", self.rest, ("mean", "nothing"))

    def floor(self, weights):
        return len(weights.down) * weights.down.element_size()  # no neuron, and the bias

    def choose(self, sites, config):
        spreads = yield measured(Spread, sites)
        return [self.choice(site.weights, spreads[site.fingerprint], config) for site in sites]

    def choice(self, weights, spread, config):
        h, down = len(weights.up), weights.down
        row = (weights.bytes - (0 if weights.down_bias is None else weights.down_bias.nbytes)) // h
        count = min(h, int((config.budget * weights.bytes - self.floor(weights)) / row))
        mean = spread.total / spread.tokens
        varying = (spread.square / spread.tokens - mean**2) * down.double().square().sum(0)
        order = varying.argsort(descending=True)
        kept, gone = order[:count].sort().values, order[count:]
        bias = down[:, gone].double() @ mean[gone] * (self.options(config).rest == "mean")
        bias += 0 if weights.down_bias is None else weights.down_bias.double()
        tensors = {"kept": kept.int(), "bias": bias.to(down.dtype)}
        return Choice(self.floor(weights) + count * row, tensors, {"kept": count})

    def constants(self, plan, weights):
        device = weights.up.device
        kept = narrowed(weights, plan.tensors["kept"].long().to(device))
        return matrices(kept) | biases(kept) | {"down_bias": plan.tensors["bias"].to(device)}

    def forward(self, x, constants, plan):
        return dense(x, constants, plan.activation)
