"""Neurons whose output hardly varies become part of the bias; as many of the others stay as the budget allows."""

from tardis_fx.graph.feed_forward import biases, dense, matrices, narrowed
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.statistics.operands import Operands


class Spread(Operands):
    """Mean of what every neuron gives, and how much of the output varies with it; both [h]."""

    merged = {"tokens": "sum", "total": "sum", "square": "sum"}  # over processes that share the batches

    def __init__(self, site):
        super().__init__(site)
        self.tokens, (self.total, self.square) = 0, self._dense.up.new_zeros(2, len(self._dense.up)).double()

    def add(self, x, hidden):
        self.tokens += len(hidden)
        self.total += hidden.double().sum(0)
        self.square += hidden.double().square().sum(0)

    def mean(self):
        return self.total / self.tokens

    def varying(self, down):
        return (self.square / self.tokens - self.mean() ** 2) * down.double().square().sum(0)


class MyRewrite(StaticRewrite):
    name = "my_rewrite"

    def floor(self, weights):
        return len(weights.down) * weights.down.element_size()  # no neuron, and the bias

    def choose(self, sites, config):
        spreads = yield measured(Spread, sites)
        return [self.choice(site.weights, spreads[site.fingerprint], config.budget) for site in sites]

    def choice(self, weights, spread, budget):
        h, down = len(weights.up), weights.down
        row = (weights.bytes - (0 if weights.down_bias is None else weights.down_bias.nbytes)) // h
        count = min(h, int((budget * weights.bytes - self.floor(weights)) / row))
        order = spread.varying(down).argsort(descending=True)
        kept, gone = order[:count].sort().values, order[count:]
        bias = down[:, gone].double() @ spread.mean()[gone] + (
            0 if weights.down_bias is None else weights.down_bias.double()
        )
        tensors = {"kept": kept.int(), "bias": bias.to(down.dtype)}
        return Choice(self.floor(weights) + count * row, tensors, {"kept": count})

    def constants(self, plan, weights):
        device = weights.up.device
        kept = narrowed(weights, plan.tensors["kept"].long().to(device))
        return matrices(kept) | biases(kept) | {"down_bias": plan.tensors["bias"].to(device)}

    def forward(self, x, constants, plan):
        return dense(x, constants, plan.activation)
