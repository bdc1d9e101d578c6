"""What of ONNX is a predictor: nothing that loops, branches, reads files, or never ends."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import policy_service
from policy_service.artifact import read_artifact
from policy_service.predictor_model import UnfitModel, check_model

_SHIPPED = Path(policy_service.__file__).with_name("policy.zip")


@pytest.fixture(scope="module")
def trees():
    """The smallest shipped model, its features and its heads."""
    artifact = read_artifact(_SHIPPED)
    document, models = artifact.document, artifact.models
    view = min(document.views, key=lambda view: len(models[view.model]))
    return onnx.load_from_string(models[view.model]), document.features, len(view.heads)


def _changed(trees, name, change):
    model, features, heads = trees
    model = onnx.ModelProto.FromString(model.SerializeToString())
    (attribute,) = [each for each in model.graph.node[0].attribute if each.name == name]
    change(attribute)
    return model.SerializeToString(), features, heads


def test_every_shipped_model_is_one():
    artifact = read_artifact(_SHIPPED)
    for view in artifact.document.views:
        check_model(artifact.models[view.model], artifact.document.features, len(view.heads))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("nodes_truenodeids", lambda a: a.ints.__setitem__(0, 0), "never end"),
        ("nodes_falsenodeids", lambda a: a.ints.__setitem__(0, 10**9), "never end"),
        ("nodes_featureids", lambda a: a.ints.__setitem__(0, 10**9), "features"),
        ("target_ids", lambda a: a.ints.__setitem__(0, -1), "heads"),
        ("target_treeids", lambda a: a.ints.__setitem__(0, 10**9), "not there"),
        ("nodes_values", lambda a: a.floats.__setitem__(0, float("nan")), "finite"),
        ("target_weights", lambda a: a.floats.pop(), "lengths"),
        ("nodes_modes", lambda a: a.strings.__setitem__(0, b"BRANCH_GT"), "mode"),
        ("n_targets", lambda a: setattr(a, "i", 10**12), "heads"),
        ("base_values", lambda a: setattr(a, "name", "\x1b[2J"), "attributes"),
    ],
)
def test_damaged_trees_are_refused(trees, name, change, says):
    with pytest.raises(UnfitModel, match=says) as refused:
        check_model(*_changed(trees, name, change))
    assert str(refused.value).isprintable()


def _model(nodes, initializers=(), functions=()):
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size])
        for name, size in (("features", 3), ("scores", 2))
    ]
    graph = helper.make_graph(nodes, "predictor", info[:1], info[1:], list(initializers))
    return helper.make_model(graph, functions=list(functions))


def _external():
    zeros = helper.make_tensor("zeros", TensorProto.FLOAT, [3, 2], [0.0] * 6)
    base = helper.make_tensor("base", TensorProto.FLOAT, [2], [0.0] * 2)
    base.data_location = TensorProto.EXTERNAL
    base.external_data.add(key="location", value="/etc/passwd")
    return _model([helper.make_node("Gemm", ["features", "zeros", "base"], ["scores"])], [zeros, base])


def _loop():
    body = helper.make_graph([], "body", [], [])
    return _model([helper.make_node("Loop", ["features"], ["scores"], body=body)])


def _two():
    node = helper.make_node("Identity", ["features"], ["scores"])
    return _model([node, node])


@pytest.mark.parametrize(
    ("make", "says"), [(_loop, "operator is Loop"), (_external, "another file"), (_two, "2 nodes")]
)
def test_other_models_are_refused(make, says):
    with pytest.raises(UnfitModel, match=says):
        check_model(make().SerializeToString(), 3, 2)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x0a\x05"])
def test_what_is_no_onnx_is_refused(content):
    with pytest.raises(UnfitModel):
        check_model(content, 3, 2)
