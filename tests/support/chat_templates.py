"""Hold chat templates with the structure of published ones, in words of our own.

QWEN25      default system text; tools in the system turn; several calls a turn; results share one user turn
QWEN3       no default; reasoning is kept in turns after the last question only, whatever tools said since; thinking switch
LLAMA31     a system turn with a date, always; tools in the first user turn; one call a turn, "parameters"; results as JSON
LLAMA32     the same with today's date where none is given
R1          the last system text stands in front, without a role; the prompt opens the reasoning, finished turns lose theirs
ALTERNATING as Gemma's: no system role, user and assistant take turns
ONE_SYSTEM  one system message at most, at the front
"""

QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are tiny, a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nFunctions are within <tools></tools> tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nAnswer within <tool_call></tool_call> tags.<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are tiny, a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- set plain_answer = message.role == "assistant" and not message.tool_calls %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or plain_answer %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- set given = messages[0].content if messages[0].role == 'system' else none %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if given is not none %}
        {{- given + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nThese are the functions:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" + (tool | tojson) }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nCall them within <tool_call></tool_call> tags.<|im_end|>\\n" }}
{%- elif given is not none %}
    {{- '<|im_start|>system\\n' + given + '<|im_end|>\\n' }}
{%- endif %}
{#- The last question: the last user message that is not a tool's result in disguise. -#}
{%- set seen = namespace(searching=true, question=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if seen.searching and message.role == "user" and message.content is string %}
        {%- if not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
            {%- set seen.searching = false %}
            {%- set seen.question = messages|length - 1 - loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > seen.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
        {%- else %}
            {{- text }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if text or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {%- set function = call.function or call %}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

_LLAMA_BODY = """\
{%- if tools_in_user_message is not defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if tools is not defined %}
    {%- set tools = none %}
{%- endif %}
{%- set given = '' %}
{%- if messages[0].role == 'system' %}
    {%- set given = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n" }}
{%- endif %}
{{- "Knowledge until: December 2023\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "These functions are there:\\n\\n" }}
    {%- for tool in tools %}
        {{- (tool | tojson(indent=4)) + "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- given + "<|eot_id|>" }}
{%- if tools is not none and tools_in_user_message %}
    {%- if not messages %}
        {{- raise_exception("No user message to put the tools into!") }}
    {%- endif %}
    {{- "<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call of one of these functions.\\n\\n" }}
    {%- for tool in tools %}
        {{- (tool | tojson(indent=4)) + "\\n\\n" }}
    {%- endfor %}
    {{- (messages[0].content | trim) + "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("One tool call at a time, please!") }}
        {%- endif %}
        {%- set function = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {%- if builtin_tools is defined and function.name in builtin_tools %}
            {{- "<|python_tag|>" + function.name + ".call(" }}
            {%- for name, value in function.arguments | items %}
                {{- name + '="' + value + '"' + ("" if loop.last else ", ") }}
            {%- endfor %}
            {{- ")" }}
        {%- else %}
            {{- '{"name": "' + function.name + '", "parameters": ' + (function.arguments | tojson) + '}' }}
        {%- endif %}
        {{- "<|eom_id|>" if builtin_tools is defined else "<|eot_id|>" }}
    {%- elif message.role in ("tool", "ipython") %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson if message.content is mapping or message.content is iterable else message.content }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + (message.content | trim) + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

LLAMA31 = (
    """\
{%- if date_string is not defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
"""
    + _LLAMA_BODY
)
LLAMA32 = (
    """\
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
"""
    + _LLAMA_BODY
)

R1_TOOLS = ["<|tool_calls_begin|>", "<|tool_call|>", "<|tool_calls_end|>", "<|outputs_begin|>", "<|outputs_end|>"]
R1 = """\
{%- set now = namespace(system='', after_tool=false) %}
{%- for message in messages if message.role == 'system' %}
    {%- set now.system = message.content %}
{%- endfor %}
{{- bos_token + now.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set now.after_tool = false %}
        {{- '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- set now.after_tool = false %}
        {{- '<|Assistant|><|tool_calls_begin|>' }}
        {%- for call in message.tool_calls %}
            {{- '<|tool_call|>' + call.function.name + '\\n' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<|tool_calls_end|><|end|>' }}
    {%- elif message.role == 'assistant' and now.after_tool %}
        {%- set now.after_tool = false %}
        {{- '<|outputs_end|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] + '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- ('\\n' if now.after_tool else '<|outputs_begin|>') + message.content }}
        {%- set now.after_tool = true %}
    {%- endif %}
{%- endfor %}
{%- if now.after_tool %}
    {{- '<|outputs_end|>' }}
{%- elif add_generation_prompt %}
    {{- '<|Assistant|><think>\\n' }}
{%- endif %}
"""

ALTERNATING = """\
{%- if messages[0].role == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

ONE_SYSTEM = """\
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('Only the first message may be of the system') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
