"""Play the tool world: a customer service desk with a database, fifteen tools, a policy and scripted customers.

It has the structure of τ-bench's retail domain (arXiv 2406.12045) with data, rules and texts of our own, and needs no language
model to play the customer. Read policy.py first (what the agent is told), then tools.py on the database of shop.py,
wishes.py and kinds.py (what customers want), customer.py, environment.py (the reward) and dataset.py (the rows).
"""

from pidistill.envs.tool_world.dataset import play_expert, render_episode, tool_world_base_dataset, tool_world_dataset
from pidistill.envs.tool_world.environment import ToolWorldEnvironment
from pidistill.envs.tool_world.tokenizer import tool_world_tokenizer
