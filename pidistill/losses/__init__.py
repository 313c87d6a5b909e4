"""Compute pure functions of per-token numbers; read :mod:`pidistill.losses.divergences` first.

Log-probs (of whole distributions, or of the sampled tokens), rewards and group numbers enter. What leaves is one number per
policy token or per rollout: a divergence, an estimate of a KL, a policy-gradient loss, an advantage, a weight; and, at the very
end, the scalar of a micro-batch (:mod:`pidistill.losses.reductions`). Nothing here knows a model, a config or a rank.
"""
