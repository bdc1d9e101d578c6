"""The predictor: one ONNX model per view, run by onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.privacy import report_nothing

report_nothing()
import onnxruntime as ort  # noqa: E402 - it reads the environment as it is imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt


class OnnxPredictor:
    """Scores states with the models of an artifact, in the order of the policy's views.

    Each model takes `features` float32 [n, size] and gives `scores` float32 [n, heads].
    """

    def __init__(self, models: Sequence[bytes]) -> None:
        options = ort.SessionOptions()
        # A pass has one row, so further threads only add overhead.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._runs = [
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run for model in models
        ]

    def scores(self, view: int, features: npt.NDArray[np.float32]) -> list[float]:
        """Return the scores of a view's heads. features: float32 [size]."""
        # The scores of the one row, without intermediate arrays.
        row: list[float] = self._runs[view](["scores"], {"features": features[None]})[0][0].tolist()
        return row

    def score_rows(self, view: int, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the scores of many states of a view: float32 [n, heads]. features: float32 [n, size]."""
        scores: npt.NDArray[np.float32] = self._runs[view](["scores"], {"features": features})[0]
        return scores
