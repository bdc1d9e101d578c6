"""How the router calls stages, the policy service and the scaler."""
