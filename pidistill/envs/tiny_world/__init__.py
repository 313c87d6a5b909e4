"""Play the tiny world: a three-turn tool task on which every method of the package runs on a CPU in minutes.

Read world.py first (the task and its hidden conventions), then environment.py (what answers a turn), then dataset.py.
"""

from pidistill.envs.tiny_world.dataset import tiny_world_base_dataset, tiny_world_dataset
from pidistill.envs.tiny_world.environment import SiblingCalls, TinyWorldEnvironment, VerifierFeedback
from pidistill.envs.tiny_world.world import tiny_world_tokenizer
