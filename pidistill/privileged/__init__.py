"""Show the teacher what the student does not see: privileged information.

Enters: an :class:`~pidistill.types.Example`, or a sampled rollout. Leaves: the two prompts of a
:class:`~pidistill.types.PromptPair`. Read :mod:`pidistill.privileged.prompt` first.

    kind of privileged information                         made by
    a column of the row, as text or as messages            pidistill.data.chat_dataset, qa_dataset (``privileged_key``)
    a worked solution, or the final answer                 pidistill.data.gsm8k_dataset (``privileged``)
    what an agent did in a recorded episode                pidistill.data.trace_dataset (``kind``); the kinds: trace_kinds.py
    advice that a model wrote about a recorded episode     ``kind: hints`` with ``hints``; the file: hint_file.py
    what a world knows about its own tasks                 pidistill.envs.tiny_world, pidistill.envs.tool_world
    a sibling's success, what the environment answered     hindsight.py, after a round is sampled
    the critique of a judge                                judges.py, through ``hindsight.feedback``
    something else in its place (control arms)             controls.py (``privileged.control``)
"""

from pidistill.privileged.hindsight import Hindsight, Transcript
from pidistill.privileged.prompt import PrivilegedPrompt

__all__ = ["Hindsight", "PrivilegedPrompt", "Transcript"]
