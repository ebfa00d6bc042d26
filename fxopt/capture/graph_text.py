"""What AOTAutograd is given, as text: Dynamo's graph, its inputs and the settings that come with them.

It says what torch's own hash of these says (`AOTAutogradCachePickler`). That pickles names, code and chains of sources,
which takes longer than everything else about a hit. As there, `gm.meta` is left out, which AOTAutograd does not read.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.capture.private import qualified_name
from fxopt.ir.canonical import UnwritableError, argument

_OTHERWISE_KNOWN = frozenset(
    ("fw_compiler", "bw_compiler", "inference_compiler", "partition_fn", "decompositions", "aot_id", "cache_info")
)
"""Fields of AOTAutograd's configuration that are fxopt's own functions, numbers of this process, or the cache's."""


def graph_text(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], config: Any) -> str:
    """Canonical JSON of a Dynamo graph without attributes and modules, its (fake) inputs and torch's AOTConfig.

    Raises UnwritableError when something in them has no canonical text.
    """
    numbers = {node: k for k, node in enumerate(gm.graph.nodes)}
    nodes = [[node.op, _target(node), *_arguments(node, numbers)] for node in gm.graph.nodes]
    return json.dumps([nodes, [_layout(x) for x in inputs], gm.training, _settings(config)], sort_keys=True)


def _target(node: fx.Node) -> str:
    match node.op:
        case "placeholder" | "output":
            return ""
        case "call_method":
            return str(node.target)
        case "call_function":
            return _function_name(node.target)
    raise UnwritableError(f"a node {node.op}")


def _function_name(target: Any) -> str:
    """A name that leads to `target`, and so to nothing else. Raises UnwritableError for a function without one."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target)
    name = qualified_name(target)
    module, _, path = name.rpartition(".")
    while module and module not in sys.modules:
        module, _, parent = module.rpartition(".")
        path = f"{parent}.{path}"
    try:
        found = operator.attrgetter(path)(sys.modules[module or "builtins"])
    except AttributeError:
        found = None
    if found is not target:
        raise UnwritableError(f"{target} is not what {name} means")
    return name


def _arguments(node: fx.Node, numbers: dict[fx.Node, int]) -> list[Any]:
    return [argument(a, numbers.__getitem__) for a in (list(node.args), dict(node.kwargs))]


def _layout(x: torch.Tensor) -> list[Any]:
    """Of a strided tensor with sizes that are numbers."""
    bits = [x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference()]
    return [str(x.dtype), str(x.device), list(x.shape), list(x.stride()), x.storage_offset(), bits]


def _settings(config: Any) -> dict[str, Any]:
    """AOTConfig's fields, those that torch adds in another version included; of sources their names."""
    out = {}
    for field, value in vars(config).items():
        if field == "aot_autograd_arg_pos_to_source":
            out[field] = None if value is None else [None if source is None else source.name for source in value]
        elif field not in _OTHERWISE_KNOWN:
            out[field] = argument(value, _no_node)
    return out


def _no_node(node: fx.Node) -> Any:
    raise UnwritableError(f"a node among settings: {node.name}")
