"""Play the tool world: a customer service desk with a database, fifteen tools, a policy and scripted customers.

It has the structure of τ-bench's retail domain (arXiv 2406.12045) with data, rules and texts of our own, and needs no language
model to play the customer:

    shop.py         users, products with variants, orders: an SQLite database from a seed, one copy per episode
    tools.py        what the agent can call
    policy.py       what the agent is told; rules that the tools do not check
    wishes.py       what a wish is; kinds.py: the kinds, each with what the expert does about it
    tasks.py        tasks of 1 to 4 wishes, by split
    customer.py     the customer, a state machine
    environment.py  the environment: reward by the final database and by what was said
    dataset.py      rows, the expert's demonstrations, episodes as text
    tokenizer.py    a small tokenizer for models made from nothing
"""

from pidistill.envs.tool_world.dataset import play_expert, render_episode, tool_world_base_dataset, tool_world_dataset
from pidistill.envs.tool_world.environment import ToolWorldEnvironment
from pidistill.envs.tool_world.tokenizer import tool_world_tokenizer
