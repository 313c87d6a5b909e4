"""Make prompts that ask a model to summarise successful traces; see :mod:`pidistill.rollouts.hints`."""

from typing import Any

from pidistill.chat.messages import transcript_text
from pidistill.chat.templates import check_template
from pidistill.data.agent_traces import UNSOLVED, read_traces
from pidistill.data.dataset import ExampleDataset
from pidistill.privileged.trace_task import TraceTask
from pidistill.types import Example

HINT_TEMPLATE = """\
Below is a conversation in which an assistant with tools did what the user wanted. Write two or three sentences of advice for \
somebody who is about to do the same task and has not seen the conversation: what to find out, what to decide, and which tools \
to call with which values. Plain sentences only, no list, no greeting.

<conversation>
{conversation}
</conversation>"""


def hint_prompts(source: str, template: str = HINT_TEMPLATE, max_tasks: int | None = None, **keys: Any) -> ExampleDataset:
    """Make one prompt per task with a successful trace, in which the user shows the whole trace and asks for advice.

    Tasks without one are counted as ``task_without_success``.

    Args:
        template: ``{conversation}`` stands for the first user message and the trace; the system prompt is not repeated.
        max_tasks: only the first tasks of the source, with and without success.
        keys: arguments of :func:`pidistill.data.agent_traces.read_traces`, the same as for the dataset that reads the hints.
    """
    check_template(template, "dataset.template", ("conversation",))
    tasks = read_traces(source, **keys).tasks[:max_tasks]
    examples = [_prompt(task, template) for task in tasks if task.source is not None]
    without = len(tasks) - len(examples)
    return ExampleDataset(examples, {UNSOLVED: without} if without else {})


def _prompt(task: TraceTask, template: str) -> Example:
    trace = task.source
    said = [message for message in trace.prompt if message["role"] != "system"]
    text = template.format(conversation=transcript_text([*said, *trace.turns]))
    return Example(id=trace.id, messages=[{"role": "user", "content": text}], data={"task": task.task, "trace": trace})
