"""Names sites and parameters by the model's module paths."""

import re
from collections import Counter
from dataclasses import replace
from itertools import takewhile

from torch import fx

from tardis_fx.graph.site import Site


def parameter_name(node: fx.Node) -> str:
    """Name of a lifted parameter as in ``model.named_parameters()``, from the source that Dynamo recorded.

    After a graph break the source begins at some module inside the model; the capture of an observation, which has the
    model, then records the name itself. A weight that the graph computes is named after the first parameter that it is
    computed from.
    """
    while node.op != "placeholder" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    source = getattr(node, "_dynamo_source", None)
    text = getattr(source, "name", None) or str(node.target)
    text = text() if callable(text) else text
    parts = re.findall(r"\['([^']+)'\]|\.(?!_modules|_parameters|_buffers)(\w+)", text.partition("]")[2])
    name = node.meta.get("parameter_name") or ".".join(a or b for a, b in parts) or str(text)
    module, parametrised, rest = name.partition(".parametrizations.")
    return f"{module}.{rest.split('.')[0]}" if parametrised else name


def named(sites: list[Site]) -> list[Site]:
    """Names the sites by the module path that their weights share, or by the first weight where two sites agree."""
    modules = [[parameter_name(p.weight).split(".")[:-1] for p in (site.up, site.down)] for site in sites]
    common = [takewhile(lambda parts: parts[0] == parts[1], zip(*paths, strict=False)) for paths in modules]
    shared = [".".join(part for part, _ in parts) for parts in common]
    weights = {(name, site.up.weight, site.down.weight) for name, site in zip(shared, sites, strict=True)}
    owners = Counter(name for name, *_ in weights)  # an FFN that runs twice counts once
    unique = [
        name if name and owners[name] == 1 else ".".join(paths[0]) for name, paths in zip(shared, modules, strict=True)
    ]
    return [replace(site, name=name) for site, name in zip(sites, unique, strict=True)]
