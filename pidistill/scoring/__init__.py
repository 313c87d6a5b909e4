"""Score both views of the completions in one pass of the model; read :mod:`pidistill.scoring.score` first.

Rollouts with their advantages enter: the packer forms micro-batches of them, and `batch` writes each as one tree or as padded
rows. What leaves are :class:`pidistill.types.Scores`, a few numbers per policy token with their gradient. `head` and
`head_numbers` make them from hidden states, chunk by chunk; `mismatch` compares them with what the sampler recorded.
"""
