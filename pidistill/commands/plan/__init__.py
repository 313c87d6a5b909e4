"""Estimate what a run will take, before it runs: bytes per phase on each rank, and seconds per phase of a round.

    ModelShape (read from the modules, on the meta device) + Workload (lengths, groups, budget) + Setup (how it is trained)
      ─► memory   {phase: {part: bytes}}    the phase with the largest sum has to fit
      ─► seconds  {phase: seconds}          FLOPs and bytes of the phase over a device's rates

All rollouts have the same lengths here. Not counted: communication between ranks, the time of environment and reward,
evaluation, `sft_weight`'s demonstrations, groups that are sampled again, a teacher's memory.

Read command.py first, then reading.py (from a config to shape, workload and setup), memory.py and seconds.py, in which every
term is one line with its reason, and advice.py (what would make a run fit).
"""
