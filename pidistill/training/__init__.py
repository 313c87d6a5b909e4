"""Do the parts of a run that no two papers differ in: start, load, update, save, resume, measure, evaluate.

In: the config, and what the method computes: losses, rollouts with their advantages, numbers of a step.
Out: trained weights in `output_dir/step_N`, with the state that resumes the run exactly; metrics.jsonl; alarms.

Read start.py first: what every recipe does before its method. Then update.py (one optimizer step), checkpoints.py (save and
resume), publish.py (how a written checkpoint gets its place), training_state.py (what a checkpoint holds beside the weights,
and how damage is found), run_folder.py (who may write where), rounds.py (the sizes of a round and its report),
evaluation.py. keys.py is the table of all config keys.
"""
