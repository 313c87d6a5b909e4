"""Make datasets: rows → Example → (Example, PromptPair), and the order in which they are visited.

Enters: files, folders and Hub datasets (sources.py). Leaves: examples (builders.py, agent_traces.py), their prompts
(prompts.py) and demonstrations (demonstrations.py). Read :mod:`pidistill.data.builders` first; a recipe calls load.py.
"""

from pidistill.data.agent_traces import trace_dataset
from pidistill.data.builders import chat_dataset, gsm8k_dataset, qa_dataset
from pidistill.data.dataset import ExampleDataset
from pidistill.data.demonstrations import build_demonstrations, demonstration, row_completions, sft_demonstrations
from pidistill.data.hint_prompts import hint_prompts
from pidistill.data.load import RecipeData, load_prompts, told_later
from pidistill.data.order import epoch_order
from pidistill.data.prompts import Prompts, build_prompts
from pidistill.data.routes import joined_dataset
from pidistill.data.stock import stock_sft_dataset
from pidistill.privileged.trace_kinds import trace_leak_phrases
