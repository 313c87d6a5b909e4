"""Pure functions of per-token numbers: divergences, estimators, policy gradients, advantages, reductions."""
