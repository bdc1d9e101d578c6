"""The idle scaler (`manager` in chart and contract): scales idle stages to zero and activates them."""
