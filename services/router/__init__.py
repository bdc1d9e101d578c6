"""The router: asks the policy for a plan, runs stages, and stops or escalates."""
