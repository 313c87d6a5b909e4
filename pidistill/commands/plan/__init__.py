"""Estimate what a run will take, before it runs: bytes per phase on each rank, and seconds per phase of a round.

    ModelShape (read from the modules, on the meta device) + Workload (lengths, groups, budget) + Setup (how it is trained)
      ─► memory   {phase: {part: bytes}}    the phase with the largest sum has to fit
      ─► seconds  {phase: seconds}          FLOPs and bytes of the phase over a device's rates

All rollouts have the same lengths here. Not counted: communication between ranks, the time of environment and reward,
evaluation, `sft_weight`'s demonstrations, groups that are sampled again, a teacher's memory.

shape.py     a decoder's parameters, widths, and the bytes that autograd keeps of one token
workload.py  the work of a round on one rank, how it is trained, its micro-batches and their tokens
memory.py    bytes by phase and part
devices.py   a device's rates, measured or published
seconds.py   seconds by phase
lengths.py   tokens of prompts and completions, from the dataset or as given
reading.py   from a config to shape, workload and setup
estimate.py  both estimates of a config
advice.py    whether a run fits, and what would make it fit
command.py   the `pidistill plan` command
"""
