"""Checks that an ONNX model is a predictor as `asd-policy fit` writes it, before onnxruntime loads it.

ONNX is a programming language: models may loop, branch, call functions and read files. A predictor is one
node, either trees or linear, and nothing else is accepted. Trees must end: each node leads only to later
nodes of its tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from asd.visible import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

# Chosen: the largest of the shipped policy has 1 MB.
MOST_MODEL_BYTES = 64 << 20
_FLOAT = 1
_ML = "ai.onnx.ml"
_NODE_KEYS = ("treeids", "nodeids", "featureids", "truenodeids", "falsenodeids")
_TARGET_KEYS = ("treeids", "nodeids", "ids")
_TREE_ATTRIBUTES = frozenset(
    {
        "n_targets",
        "base_values",
        "nodes_values",
        "nodes_modes",
        "target_weights",
        *(f"nodes_{key}" for key in _NODE_KEYS),
        *(f"target_{key}" for key in _TARGET_KEYS),
    }
)


class UnfitModel(Exception):  # noqa: N818 - an error is named by its cause
    """An ONNX model is not a predictor; the message says why."""


def check_model(content: bytes, features: int, heads: int) -> None:
    """Check that a model takes `features` float32 [n, features] and gives `scores` float32 [n, heads].

    Raises UnfitModel.
    """
    try:
        _check(_Model.FromString(content), features, heads)
    except (DecodeError, UnicodeDecodeError) as error:
        raise UnfitModel("it is not ONNX") from error


def _check(model: Any, features: int, heads: int) -> None:
    graph = model.graph
    if len(model.functions) or len(model.training_info):
        raise UnfitModel("it holds functions of its own, which no predictor has")
    if len(graph.node) != 1 or len(graph.sparse_initializer):
        raise UnfitModel(f"it has {len(graph.node)} nodes, and a predictor is one")
    node = graph.node[0]
    for kind, infos, name, size in (
        ("input", graph.input, "features", features),
        ("output", graph.output, "scores", heads),
    ):
        if [info.name for info in infos] != [name] or _shape(infos[0]) != (_FLOAT, (None, size)):
            raise UnfitModel(f"its {kind} must be `{name}`, float32 [n, {size}]")
    if list(node.output) != ["scores"]:
        raise UnfitModel("its node must give `scores`")
    if (node.domain, node.op_type) == (_ML, "TreeEnsembleRegressor"):
        _check_trees(node, graph, features, heads)
    elif (node.domain, node.op_type) == ("", "Gemm"):
        _check_linear(node, graph, features, heads)
    else:
        shown = one_line(f"{node.domain}.{node.op_type}".lstrip("."), 80)
        raise UnfitModel(f"its operator is {shown}; a predictor is a TreeEnsembleRegressor or a Gemm")


def _check_trees(node: Any, graph: Any, features: int, heads: int) -> None:
    if list(node.input) != ["features"] or len(graph.initializer):
        raise UnfitModel("its trees must take `features` alone")
    given: dict[str, Any] = {each.name: each for each in node.attribute}
    if set(given) != _TREE_ATTRIBUTES or len(given) != len(node.attribute):
        wrong = sorted(set(given) ^ _TREE_ATTRIBUTES) or sorted(given)
        raise UnfitModel(f"its trees have other attributes than a predictor's: {one_line(wrong[0], 80)}")
    if given["n_targets"].i != heads:
        raise UnfitModel(f"its trees are for {given['n_targets'].i} heads; there are {heads}")
    nodes = {key: _whole_numbers(given[f"nodes_{key}"].ints) for key in _NODE_KEYS}
    leaves = {key: _whole_numbers(given[f"target_{key}"].ints) for key in _TARGET_KEYS}
    modes = list(given["nodes_modes"].strings)
    values = np.array(given["nodes_values"].floats, np.float32)
    weights = np.array(given["target_weights"].floats, np.float32)
    base = np.array(given["base_values"].floats, np.float32)
    count = len(modes)
    lengths = {len(values), *(len(each) for each in nodes.values())}
    if lengths != {count} or not count:
        raise UnfitModel("its trees' nodes have attributes of different lengths")
    if {len(each) for each in leaves.values()} != {len(weights)} or len(base) != heads:
        raise UnfitModel("its trees' leaves have attributes of different lengths")
    if not all(np.isfinite(each).all() for each in (values, weights, base)):
        raise UnfitModel("its trees hold numbers that are not finite")
    if not set(modes) <= {b"LEAF", b"BRANCH_LEQ"}:
        raise UnfitModel("its trees have nodes of a mode other than LEAF and BRANCH_LEQ")
    _check_ends(nodes, np.array([mode == b"LEAF" for mode in modes]), leaves, features, heads)


def _check_ends(
    nodes: Mapping[str, npt.NDArray[np.int64]],
    is_leaf: npt.NDArray[np.bool_],
    leaves: Mapping[str, npt.NDArray[np.int64]],
    features: int,
    heads: int,
) -> None:
    """Check that every walk through a tree ends at a leaf, and that every leaf adds to a head."""
    trees, ids = nodes["treeids"], nodes["nodeids"]
    begins = np.flatnonzero(np.diff(trees, prepend=-1))
    sizes = np.diff(np.append(begins, len(trees)))
    # Trees and their nodes are numbered from 0, in order.
    is_in_order = np.array_equal(trees[begins], np.arange(len(begins))) and np.array_equal(
        ids, np.arange(len(ids)) - np.repeat(begins, sizes)
    )
    if not is_in_order:
        raise UnfitModel("its trees' nodes are not in order")
    size_of = np.repeat(sizes, sizes)
    for key in ("truenodeids", "falsenodeids"):
        onward = nodes[key]
        if not np.all(is_leaf | ((onward > ids) & (onward < size_of))):
            raise UnfitModel("its trees have a node that does not lead to later ones: they would never end")
    if not np.all((nodes["featureids"] >= 0) & (nodes["featureids"] < features)):
        raise UnfitModel(f"its trees look at features beyond {features}")
    if not np.all((leaves["ids"] >= 0) & (leaves["ids"] < heads)):
        raise UnfitModel(f"its trees' leaves are of heads beyond {heads}")
    tree, node = leaves["treeids"], leaves["nodeids"]
    if not np.all((tree >= 0) & (tree < len(begins))):
        raise UnfitModel("its leaves are of trees that are not there")
    if not np.all((node >= 0) & (node < sizes[tree])):
        raise UnfitModel("its leaves are of nodes that are not there")
    places = begins[tree] + node
    if not np.array_equal(np.sort(places), np.flatnonzero(is_leaf)):
        raise UnfitModel("its leaves are not those of its trees")


def _check_linear(node: Any, graph: Any, features: int, heads: int) -> None:
    names = list(node.input)
    if len(names) != 3 or names[0] != "features" or len(node.attribute):
        raise UnfitModel("its Gemm must take `features` and two constants")
    shapes = {each.name: (each.data_type, tuple(each.dims)) for each in graph.initializer}
    if shapes != {names[1]: (_FLOAT, (features, heads)), names[2]: (_FLOAT, (heads,))}:
        raise UnfitModel(f"the constants of its Gemm must be [{features}, {heads}] and [{heads}] in float32")
    for each in graph.initializer:
        if each.data_location or len(each.external_data):
            raise UnfitModel("its constants are in another file, which no predictor has")
        if len(each.raw_data) % 4:
            raise UnfitModel("its constants are cut off")
        values = np.frombuffer(each.raw_data, "<f4") if each.raw_data else np.array(each.float_data)
        if values.size != int(np.prod(each.dims)) or not np.isfinite(values).all():
            raise UnfitModel("its constants are not finite, or not as many as they should be")


def _shape(info: Any) -> tuple[int, tuple[int | None, ...]]:
    """Return an element type, and the sizes of the dimensions; None for an unknown size."""
    tensor = info.type.tensor_type
    return tensor.elem_type, tuple(
        each.dim_value if each.HasField("dim_value") else None for each in tensor.shape.dim
    )


def _whole_numbers(values: Any) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


def _message_types() -> Any:
    """Return onnx.ModelProto with the checked fields, by their numbers in onnx.proto (IR 8 to 13).

    The package onnx is needed to make models, and is not installed to serve them.
    """
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {
        "int64": field.TYPE_INT64,
        "int32": field.TYPE_INT32,
        "float": field.TYPE_FLOAT,
        "string": field.TYPE_STRING,
        "bytes": field.TYPE_BYTES,
    }
    messages: dict[str, tuple[str, ...]] = {
        "Dimension": ("1 int64 dim_value", "2 string dim_param"),
        "Shape": ("1* Dimension dim",),
        "Tensor": (
            "1* int64 dims",
            "2 int32 data_type",
            "4* float float_data",
            "8 string name",
            "9 bytes raw_data",
            "13* Anything external_data",
            "14 int32 data_location",
        ),
        "TensorType": ("1 int32 elem_type", "2 Shape shape"),
        "Type": ("1 TensorType tensor_type",),
        "ValueInfo": ("1 string name", "2 Type type"),
        "Anything": (),
        "Attribute": (
            "1 string name",
            "3 int64 i",
            "7* float floats",
            "8* int64 ints",
            "9* bytes strings",
        ),
        "Node": (
            "1* string input",
            "2* string output",
            "4 string op_type",
            "5* Attribute attribute",
            "7 string domain",
        ),
        "Graph": (
            "1* Node node",
            "5* Tensor initializer",
            "11* ValueInfo input",
            "12* ValueInfo output",
            "15* Anything sparse_initializer",
        ),
        "Model": ("7 Graph graph", "20* Anything training_info", "25* Anything functions"),
    }
    file = descriptor_pb2.FileDescriptorProto(name="asd_predictor.proto", package="asd.predictor")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for each in fields:
            number, kind, called = each.split()
            made = message.field.add(name=called, number=int(number.rstrip("*")))
            made.label = field.LABEL_REPEATED if number.endswith("*") else field.LABEL_OPTIONAL
            made.type = kinds.get(kind, field.TYPE_MESSAGE)
            if kind not in kinds:
                made.type_name = f".asd.predictor.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("asd.predictor.Model"))


_Model = _message_types()
