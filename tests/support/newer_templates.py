"""Hold chat templates with the structure of newer models' ones, in words of our own; chat_templates.py has the older ones.

SMOLLM2     a default system text, and no tools
QWEN3_2507  as QWEN3 of chat_templates.py, without reasoning
SMOLLM3     a header with date and thinking mode, always; tools as Python prints them; no calls; /no_think in the system text
QWEN35      XML calls; the prompt opens the reasoning, or closes an empty one; one system message, a question is needed
QWEN3_CODER XML calls, values as Python prints them; a default system text with tools only; no reasoning
GEMMA3      the system text stands in front of the first question; roles take turns, the assistant is "model"; no tools
HARMONY     gpt-oss: channels; the system text is the developer's; reasoning is shown up to the last answer; one call a turn
OLMO3       functions in the system turn; the last turn ends with another token than the earlier ones; calls as Python
MINISTRAL3  no generation prompt: a turn begins behind [/INST]; calls as [TOOL_CALLS]name[ARGS]{...}
"""

import re
from pathlib import Path

from tests.support.chat_templates import QWEN3
from tests.support.tiny_tokenizers import model_folder

SMOLLM2 = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a tiny assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3_2507 = re.sub(r"\n    {%- if enable_thinking .*?{%- endif %}", "", QWEN3, flags=re.DOTALL)

SMOLLM3 = """\
{%- if enable_thinking is not defined %}
    {%- set enable_thinking = true %}
{%- endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{%- set given = '' %}
{%- if messages[0].role == 'system' %}
    {%- set given = messages[0].content %}
    {%- if '/no_think' in given %}
        {%- set mode = '/no_think' %}
    {%- endif %}
    {%- set given = given.replace('/no_think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## About\\n\\nToday: ' + strftime_now('%d %B %Y') + '\\nMode: ' + mode }}
{{- '\\n\\n## Instructions\\n\\n' }}
{{- (given or 'You are tiny, and you think in steps.') + '\\n\\n' }}
{%- if tools %}
    {{- '### Tools\\n\\nThese are within <tools></tools>:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | string + '\\n' }}
    {%- endfor %}
    {{- '</tools>\\n\\n' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if mode == '/no_think' %}
            {{- '<think>\\n\\n</think>\\n' }}
        {%- endif %}
        {{- message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if mode == '/no_think' %}
        {{- '<think>\\n\\n</think>\\n' }}
    {%- endif %}
{%- endif %}
"""

QWEN35 = """\
{%- set given = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\nThese are the functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nCall them within <tool_call> and <function=name>.' }}
    {{- ('\\n\\n' + given if given else '') + '<|im_end|>\\n' }}
{%- elif given %}
    {{- '<|im_start|>system\\n' + given + '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(question=-1) %}
{%- for message in messages %}
    {%- set text = message.content | trim %}
    {%- if message.role == 'user' and not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
        {%- set seen.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if seen.question < 0 %}
    {{- raise_exception('No question of a user was found.') }}
{%- endif %}
{%- for message in messages %}
    {%- set text = message.content | trim %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('The system message must be the first.') }}
        {%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + text + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > seen.question %}
            {{- '<think>\\n' + thought | trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '' if loop.first and not text else '\\n\\n' if loop.first else '\\n' }}
            {{- '<tool_call>\\n<function=' + function.name + '>\\n' }}
            {%- for name, value in function.arguments | items %}
                {{- '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem and loop.previtem.role != 'tool' }}
        {{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

QWEN3_CODER = """\
{%- set given = messages[0].content if messages[0].role == 'system' else '' %}
{%- if given or tools %}
    {{- '<|im_start|>system\\n' + (given or 'You are tiny, and you use a computer.') }}
    {%- if tools %}
        {{- '\\n\\n# Tools\\n\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n<function>\\n<name>' + tool.function.name + '</name>' }}
            {%- for name, schema in tool.function.parameters.properties | items %}
                {{- '\\n<parameter>\\n<name>' + name + '</name>\\n<type>' + schema.type | string + '</type>\\n</parameter>' }}
            {%- endfor %}
            {{- '\\n</function>' }}
        {%- endfor %}
        {{- '\\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content | trim %}
            {{- '\\n' + message.content | trim + '\\n' }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for name, value in call.function.arguments | items %}
                {%- set is_nested = value is mapping or (value is sequence and value is not string) %}
                {%- set value = value | tojson | safe if is_nested else value | string %}
                {{- '<parameter=' + name + '>\\n' }}
                {{- value }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n' if loop.previtem and loop.previtem.role != 'tool' }}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>\\n' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA3 = """\
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
    {%- set first = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns: user, assistant, user, ...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- first if loop.first }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

HARMONY = """\
{{- '<|start|>system<|message|>You are tiny.\\nToday: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' }}
{{- reasoning_effort | default('medium') + '\\n\\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- set given = '' %}
{%- if messages[0].role == 'system' or messages[0].role == 'developer' %}
    {%- set given = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if given or tools %}
    {{- '<|start|>developer<|message|>' + ('# Instructions\\n\\n' + given + '\\n\\n' if given else '') }}
    {%- if tools %}
        {{- '# Tools\\n\\nnamespace functions {\\n\\n' }}
        {%- for tool in tools %}
            {{- '// ' + tool.function.description + '\\ntype ' + tool.function.name + ' = (_: {' }}
            {%- for name, schema in tool.function.parameters.properties | items %}
                {{- name + ': ' + schema.type | string + ', ' }}
            {%- endfor %}
            {{- '}) => any;\\n\\n' }}
        {%- endfor %}
        {{- '} // namespace functions' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(called=none) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if '<|channel|>final<|message|>' in (message.content or '') %}
            {{- raise_exception('The content has tags of a channel.') }}
        {%- endif %}
        {%- if 'tool_calls' in message %}
            {%- set later = namespace(answer=false) %}
            {%- for other in messages[loop.index:] %}
                {%- if other.role == 'assistant' and 'tool_calls' not in other %}
                    {%- set later.answer = true %}
                {%- endif %}
            {%- endfor %}
            {%- if message.content and message.thinking %}
                {{- raise_exception('Give content or thinking beside a call, not both.') }}
            {%- elif (message.content or message.thinking) and not later.answer %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + (message.content or message.thinking) + '<|end|>' }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- call.arguments | tojson + '<|call|>' }}
            {%- set last.called = call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if message.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
            {%- set last.called = none %}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
            {%- set last.called = none %}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {%- if last.called is none %}
            {{- raise_exception('A result without a call before it.') }}
        {%- endif %}
        {{- '<|start|>functions.' + last.called + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- elif message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}
"""

OLMO3 = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are tiny and call functions. ' }}
    {%- if tools is none %}
        {{- 'There are none now. <functions></functions>' }}
    {%- else %}
        {{- 'They are: <functions>' + (tools | tojson) + '</functions>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '<|im_start|>system\\n' + message.content }}
        {{- ' <functions>' + (tools | tojson) + '</functions>' if tools is not none }}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- if message.tool_calls %}
            {{- '<function_calls>' }}
            {%- for call in message.tool_calls %}
                {{- call.function.name + '(' }}
                {%- for name, value in call.function.arguments | items %}
                    {{- name + '=' + (value | tojson) + ('' if loop.last else ', ') }}
                {%- endfor %}
                {{- ')' + ('' if loop.last else '\\n') }}
            {%- endfor %}
            {{- '</function_calls>' }}
        {%- endif %}
        {{- '<|im_end|>\\n' if not loop.last else eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>environment\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|im_start|>assistant\\n' }}
    {%- endif %}
{%- endfor %}
"""

MINISTRAL3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- set turn = namespace(index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {%- if (message.role == 'user') != (turn.index % 2 == 0) %}
            {{- raise_exception('After the system message, user and assistant take turns.') }}
        {%- endif %}
        {%- set turn.index = turn.index + 1 %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {%- if not message.content and not message.tool_calls %}
            {{- raise_exception('An assistant message needs text or a call.') }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_HARMONY = ["start", "end", "message", "channel", "constrain", "return", "call", "endoftext"]
_MISTRAL = ["INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_RESULTS"]
# template → (special tokens, other added ones, tokenizer_config's eos and bos, generation_config's ends of a turn)
TOKENS = {
    SMOLLM2: (_CHATML, [], "<|im_end|>", "<|im_start|>", ["<|im_end|>"]),
    QWEN3_2507: (_CHATML, ["<think>", "</think>", "<tool_call>", "</tool_call>"], "<|im_end|>", None, _CHATML[::2]),
    SMOLLM3: (_CHATML, ["<think>", "</think>"], "<|im_end|>", None, ["<|im_end|>"]),
    QWEN35: (_CHATML, ["<think>", "</think>", "<tool_call>", "</tool_call>"], "<|im_end|>", None, _CHATML[::2]),
    QWEN3_CODER: (_CHATML, ["<tool_call>", "</tool_call>"], "<|im_end|>", None, _CHATML[::2]),
    GEMMA3: (["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"], "<eos>", "<bos>", ["<eos>", "<end_of_turn>"]),
    HARMONY: ([f"<|{name}|>" for name in _HARMONY], [], "<|return|>", None, ["<|return|>", "<|endoftext|>", "<|call|>"]),
    OLMO3: (_CHATML, ["<functions>", "</functions>"], "<|endoftext|>", None, ["<|im_end|>", "<|endoftext|>"]),
    MINISTRAL3: (
        ["<s>", "</s>", "[TOOL_CALLS]", "[ARGS]", *(f"[{slash}{name}]" for name in _MISTRAL for slash in ("", "/"))],
        [], "</s>", "<s>", ["</s>"],
    ),
}  # fmt: skip


def newer_folder(path: Path, template: str) -> Path:
    """Write a tokenizer with the control tokens of the template's family, as the family's folders hold it."""
    special, added, eos, bos, ends = TOKENS[template]
    return model_folder(path, template, special, added, eos=eos, bos=bos, generation_eos=ends)
