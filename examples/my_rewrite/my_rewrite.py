"""Neurons whose output hardly varies become part of the bias; as many of the others stay as the budget allows."""

from tardis_fx.graph.feed_forward import biases, dense, matrices, narrowed
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.statistics.operands import Operands


class Spread(Operands):
    """Mean of what every neuron gives, and how much of the output varies with it; both [h]."""

    merged = {"tokens": "sum", "total": "sum", "square": "sum"}  # over processes that share the batches

    def __init__(self, site):
        super().__init__(site)
        self.tokens, (self.total, self.square) = 0, self._dense.w1.new_zeros(2, len(self._dense.w1)).double()

    def add(self, x, hidden):
        self.tokens += len(hidden)
        self.total += hidden.double().sum(0)
        self.square += hidden.double().square().sum(0)

    def mean(self):
        return self.total / self.tokens

    def varying(self, w2):
        return (self.square / self.tokens - self.mean() ** 2) * w2.double().square().sum(0)


class MyRewrite(StaticRewrite):
    name = "my_rewrite"

    def floor(self, weights):
        return len(weights.w2) * weights.w2.element_size()  # no neuron, and the bias

    def choose(self, observation, sites, config):
        spreads = measured(observation, Spread, sites, config)
        return [self.choice(site.weights, spreads[site.fingerprint], config.budget) for site in sites]

    def choice(self, weights, spread, budget):
        h, w2 = len(weights.w1), weights.w2
        row = (weights.bytes - (0 if weights.b2 is None else weights.b2.nbytes)) // h
        count = min(h, int((budget * weights.bytes - self.floor(weights)) / row))
        order = spread.varying(w2).argsort(descending=True)
        kept, gone = order[:count].sort().values, order[count:]
        bias = w2[:, gone].double() @ spread.mean()[gone] + (0 if weights.b2 is None else weights.b2.double())
        tensors = {"kept": kept.int(), "bias": bias.to(w2.dtype)}
        return Choice(self.floor(weights) + count * row, tensors, {"kept": count})

    def constants(self, plan, weights):
        device = weights.w1.device
        kept = narrowed(weights, plan.tensors["kept"].long().to(device))
        return matrices(kept) | biases(kept) | {"b2": plan.tensors["bias"].to(device)}

    def forward(self, x, constants, plan):
        return dense(x, constants, plan.activation)
