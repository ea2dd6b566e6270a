"""A captured Graph on disk: JSON, one entry a node, no code and no pickles.

A record is small (0.2 MB for SD1.5) and loads in milliseconds, where torch.export.load takes seconds.  It holds no
weights, so one record serves every checkpoint of an architecture.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils import _pytree as pytree

from .errors import GraphError
from .graph import Graph, SizeSpec, Spec, TensorSpec, target_name, target_named, verify

FORMAT = 2


def save(graph: Graph, path: Path) -> bool:
    """Write the record in one piece (a reader sees all of it or nothing).  returns False where the graph holds
    something that only lives in this process, such as a result of an unregistered class, and where the disk is full
    or not ours to write: the next process captures again."""
    try:
        text = json.dumps(encode(graph), separators=(",", ":"))
    except (NotImplementedError, TypeError, ValueError):
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                file.write(gzip.compress(text.encode(), compresslevel=6, mtime=0))
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError:
        return False
    return True


def load(path: Path) -> Graph | None:
    """Read a record.  returns None where there is none, or one that is damaged or of another version: the caller
    captures again and writes a new one."""
    try:
        return decode(json.loads(gzip.decompress(path.read_bytes())))
    except FileNotFoundError:
        return None
    except Exception:  # noqa: BLE001 - a damaged file makes gzip, zlib, json and pytree raise whatever they like
        with suppress(OSError):
            path.unlink()
        return None


def encode(graph: Graph) -> dict[str, Any]:
    """The graph as JSON values.  raises TypeError for an argument that has no JSON form."""
    return {
        "format": FORMAT,
        "nodes": [_node(n) for n in graph.fx.nodes],
        "ranges": graph.ranges,
        "guards": graph.guards,
        "constants": {name: _tensor(t) for name, t in graph.constants.items()},
        "outputs": pytree.treespec_dumps(graph.outputs) if graph.outputs is not None else None,
    }


def decode(record: dict[str, Any]) -> Graph:
    """The inverse of `encode`; the graph is verified."""
    if record["format"] != FORMAT:
        raise GraphError(f"record format {record['format']}, {FORMAT} was expected.")
    graph = Graph(FxGraph())
    nodes: dict[str, Node] = {}
    for op, name, target, args, kwargs, spec, role, source in record["nodes"]:
        function = target_named(target) if op == "call_function" else target
        named = {k: _decode(v, nodes) for k, v in kwargs}
        node = nodes[name] = graph.fx.create_node(op, function, tuple(_decode(args, nodes)), named, name=name)
        if op != "output":
            node.meta["spec"] = _decode_spec(spec)
        if op == "placeholder":
            node.meta |= {"role": role, "source": source}
    graph.ranges = {symbol: (low, high) for symbol, (low, high) in record["ranges"].items()}
    graph.guards = list(record["guards"])
    graph.constants = {name: _decode_tensor(t) for name, t in record["constants"].items()}
    graph.outputs = pytree.treespec_loads(record["outputs"]) if record["outputs"] is not None else None
    verify(graph)
    return graph


def _node(node: Node) -> list[Any]:
    target = target_name(node.target) if node.op == "call_function" else str(node.target)
    meta = node.meta
    args = [_encode(a) for a in node.args]
    kwargs = [[k, _encode(v)] for k, v in node.kwargs.items()]
    return [node.op, node.name, target, args, kwargs, _spec(meta.get("spec")), meta.get("role"), meta.get("source")]


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} has no place in a record.")


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return nodes[value["node"]]
    if "device" in value:
        return torch.device(value["device"])
    return _torch_value(value["torch"])


def _torch_value(name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
        raise GraphError(f"torch.{name} is no dtype, layout or memory format.")
    return found


def _spec(spec: Spec) -> Any:
    if isinstance(spec, TensorSpec):
        return {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
    if isinstance(spec, SizeSpec):
        return {"size": spec.expr}
    return [_spec(s) for s in spec] if spec is not None else None


def _decode_spec(spec: Any) -> Spec:
    if isinstance(spec, list):
        return tuple(_decode_spec(s) for s in spec)
    if spec is None:
        return None
    if "size" in spec:
        return SizeSpec(spec["size"])
    return TensorSpec(tuple(spec["shape"]), _torch_value(spec["dtype"]))


def _tensor(tensor: torch.Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {**_spec(TensorSpec(tuple(tensor.shape), tensor.dtype)), "bytes": base64.b64encode(raw).decode()}


def _decode_tensor(record: dict[str, Any]) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(record["bytes"])), dtype=torch.uint8)
    return raw.view(_torch_value(record["dtype"])).reshape(record["shape"])
