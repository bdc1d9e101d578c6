"""The policy service: predictor, calibration and optimal stopping."""
