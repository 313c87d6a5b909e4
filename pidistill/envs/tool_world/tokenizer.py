"""Make a small tokenizer for the tool world, for models that are trained from nothing on a CPU.

A byte-level BPE trained on the world's own texts, with a chat template that writes tools, calls and results in the hermes form,
saved as a model folder has them: what runs with it runs with a downloaded model's tokenizer.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pidistill.chat.messages import messages_text
from pidistill.envs.tool_world.dataset import SCHEMAS, play_expert, privileged_text
from pidistill.envs.tool_world.policy import POLICY
from pidistill.envs.tool_world.tasks import draw_tasks
from pidistill.privileged.prompt import DEFAULT_TEMPLATE
from pidistill.tokenizers.hf_chat import HFChatTokenizer

VOCAB_SIZE = 1536
SPECIAL = ("<|pad|>", "<|turn|>", "<|end|>")
_TAGS = ("<tool_call>", "</tool_call>")
_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|turn|>' + message.role + '\\n' + message.content }}
    {%- if loop.first and tools %}
        {{- '\\n\\nTools:' }}
        {%- for tool in tools %}
            {{- '\\n' + tool.function | tojson }}
        {%- endfor %}
        {{- '\\n\\nTo call one, write <tool_call>{"name": ..., "arguments": ...}</tool_call>.' }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function %}
        {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
        {{- '<tool_call>{"name": "' + function.name + '", "arguments": ' + function.arguments | tojson + '}</tool_call>' }}
    {%- endfor %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}
"""


def tool_world_tokenizer(path: str, max_seq_len: int | None = None) -> HFChatTokenizer:
    """Return the tokenizer in the folder ``path``, which is made if it does not exist.

    Args:
        path: e.g. ``runs/tool_world/tokenizer``. Several processes may make it at once; the first one's stays.
        max_seq_len: prompt + completion limit in tokens.
    """
    folder = Path(path)
    if not (folder / "tokenizer.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        write_tokenizer(made)
        try:
            os.replace(made, folder)  # refused where another process was first
        except OSError:
            shutil.rmtree(made)
    return HFChatTokenizer(str(folder), max_seq_len=max_seq_len)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; the files are the same on every machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(_TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def _corpus() -> list[str]:
    texts = [POLICY, DEFAULT_TEMPLATE, *map(json.dumps, SCHEMAS)] * 4
    for task in draw_tasks("train", 60):
        texts += [messages_text(play_expert(task)), *(privileged_text(task, kind) or "" for kind in ("calls", "instruction"))]
    return texts
