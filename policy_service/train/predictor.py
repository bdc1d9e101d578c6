"""Fits the predictor of one view and writes it as ONNX.

Gradient-boosted trees, one ensemble per head: on the embedded family's outcomes their held-out log loss is
the lowest in every view. After the first draft: a keyword heuristic 0.536, logistic regression 0.272, a
neural network 0.234, trees 0.198 (`asd-policy compare`; 50,000 prompts to fit, 30,000 others).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingClassifier

from policy_service.train.threads import one_thread

if TYPE_CHECKING:
    import numpy.typing as npt

# Chosen among three settings by log loss on the calibration prompts.
_TREES = {
    "max_iter": 200,
    "learning_rate": 0.08,
    "max_leaf_nodes": 31,
    "min_samples_leaf": 20,
    "l2_regularization": 5.0,
    "max_features": 0.3,
}
# With fewer right or fewer wrong answers, a head is a constant: trees would memorise single prompts.
_LEAST_EXAMPLES = 20


class Head:
    """P(correct) of one stage in one view, as log-odds. trees: None if too few answers differ."""

    def __init__(self, base: float, trees: HistGradientBoostingClassifier | None) -> None:
        self.base = base
        self.trees = trees

    @one_thread()
    def scores(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the log-odds: [n]. features: float32 [n, size]."""
        if self.trees is None:
            return np.full(len(features), self.base)
        scores: npt.NDArray[np.float64] = self.trees.decision_function(features)
        return scores


@one_thread()
def fit_head(features: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_], seed: int) -> Head:
    """Fit one head. features: float32 [n, size]. correct: bool [n]."""
    right = int(correct.sum())
    wrong = len(correct) - right
    if min(right, wrong) < _LEAST_EXAMPLES:
        return Head(float(np.log((right + 1) / (wrong + 1))), None)
    trees = HistGradientBoostingClassifier(random_state=seed, **_TREES)
    return Head(0.0, trees.fit(features, correct))


def export_heads(heads: list[Head], size: int) -> bytes:
    """Return an ONNX model of heads: `features` float32 [n, size] to `scores` float32 [n, heads].

    All trees are in one TreeEnsembleRegressor with a target per head, so one pass computes all scores.
    """
    nodes: dict[str, list[int]] = {
        name: [] for name in ("treeids", "nodeids", "featureids", "truenodeids", "falsenodeids")
    }
    values: list[float] = []
    modes: list[str] = []
    targets: dict[str, list[int]] = {"treeids": [], "nodeids": [], "ids": []}
    weights: list[float] = []
    base = []
    tree_id = 0
    for index, head in enumerate(heads):
        # scikit-learn has no public access to these trees; tests compare the export with the original.
        trees: Any = head.trees
        base.append(head.base if trees is None else float(trees._baseline_prediction.ravel()[0]))  # noqa: SLF001
        ensembles = [] if trees is None else [each[0] for each in trees._predictors]  # noqa: SLF001
        for ensemble in ensembles:
            for node_id, node in enumerate(ensemble.nodes):
                is_leaf = bool(node["is_leaf"])
                nodes["treeids"].append(tree_id)
                nodes["nodeids"].append(node_id)
                nodes["featureids"].append(0 if is_leaf else int(node["feature_idx"]))
                nodes["truenodeids"].append(0 if is_leaf else int(node["left"]))
                nodes["falsenodeids"].append(0 if is_leaf else int(node["right"]))
                values.append(0.0 if is_leaf else _round_down(float(node["num_threshold"])))
                modes.append("LEAF" if is_leaf else "BRANCH_LEQ")
                if is_leaf:
                    targets["treeids"].append(tree_id)
                    targets["nodeids"].append(node_id)
                    targets["ids"].append(index)
                    weights.append(float(node["value"]))
            tree_id += 1
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, size])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, len(heads)])
    if tree_id:
        attributes: dict[str, Any] = {
            **{f"nodes_{name}": ids for name, ids in nodes.items()},
            "nodes_values": values,
            "nodes_modes": modes,
            **{f"target_{name}": ids for name, ids in targets.items()},
            "target_weights": weights,
        }
        graph_nodes = [
            helper.make_node(
                "TreeEnsembleRegressor",
                ["features"],
                ["scores"],
                domain="ai.onnx.ml",
                n_targets=len(heads),
                base_values=base,
                **attributes,
            )
        ]
        initializers = []
    else:
        # A row of zeros per state, plus the constants.
        initializers = [
            helper.make_tensor("zeros", TensorProto.FLOAT, [size, len(heads)], [0.0] * (size * len(heads))),
            helper.make_tensor("base", TensorProto.FLOAT, [len(heads)], base),
        ]
        graph_nodes = [helper.make_node("Gemm", ["features", "zeros", "base"], ["scores"])]
    graph = helper.make_graph(graph_nodes, "predictor", [features], [scores], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    # IR 8 belongs to opset 17; by default onnx writes its newest IR, which older runtimes refuse.
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="asd-policy")
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _round_down(threshold: float) -> float:
    """Return the largest float32 that is not above a threshold: it splits float32 values the same way."""
    rounded = np.float32(threshold)
    if float(rounded) > threshold:
        rounded = np.nextafter(rounded, np.float32(-np.inf))
    return float(rounded)
