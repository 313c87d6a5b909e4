"""Test that a chat template without an end or a bound ends in one sentence, in every thread and within seconds."""

import json
import threading
import time

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pidistill.errors import InputError
from pidistill.tokenizers import HFChatTokenizer, template_limits
from pidistill.tokenizers.chat_template import ChatTemplate
from tests.support.chat_templates import LLAMA31, QWEN3, QWEN25
from tests.support.tiny_tokenizers import qwen_folder

QUESTION = [{"role": "user", "content": "q"}]
R = "range(100000)"
ENDLESS = {
    "nested loops": f"{{% for a in {R} %}}{{% for b in {R} %}}{{% for c in {R} %}}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "loops with a loop variable": f"{{% for a in {R} %}}{{% for b in {R} %}}{{{{ loop.last }}}}{{% endfor %}}{{% endfor %}}",
    "loops with a condition": f"{{% for a in {R} %}}{{% for b in {R} if b < 0 %}}{{% endfor %}}{{% endfor %}}",
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "filters within a loop": f"{{% for a in {R} %}}{{{{ {R} | map('upper') | list | length }}}}{{% endfor %}}",
}
LARGE = {
    "a multiplied text": "{{ 'a' * 10 ** 11 }}",
    "a multiplied list": "{{ ([0] * 10 ** 11) | length }}",
    "a large power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "a product in a loop": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a doubled text": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a joined text": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a block set twice": (
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
        "{% endfor %}"
    ),
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "a wide format of a method": "{{ '{:99999999999}'.format(1) }}",
    "a centred text": "{{ 'a' | center(10000000000) }}",
    "a padded text": "{{ 'a'.ljust(10000000000) }}",
    "a replaced text": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "a filter that replaces": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "a joined list": "{{ (['a' * 1000000] * 1000000) | join }}",
    "a list of one large text": "{{ (['a' * 1000000] * 1000000) | string }}",
    "a generator of large texts": "{{ range(100000) | map('string') | map('replace', '1', 'b' * 1000000) | join }}",
    "a text that is formatted in many places": "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "a text that is put in many places": "{{ ('%(a)s' * 100000) % {'a': 'a' * 1000000} }}",
    "one list in many places": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}"
    ),
    "one list in many places, written out": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
}


def rendered(text: str) -> str:
    return ChatTemplate({"default": text}, {}).render(QUESTION, None, True)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_does_not_end_is_stopped_after_the_time(kind, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.3)
    start = time.thread_time()
    with pytest.raises(InputError, match=r"does not come to an end \(it ran for more than 0\.3 seconds\); mend the file"):
        rendered(ENDLESS[kind])
    assert time.thread_time() - start < 3.0


@pytest.mark.parametrize("kind", LARGE)
def test_a_text_or_number_without_bound_is_refused_before_it_is_made(kind):
    start = time.thread_time()
    with pytest.raises(InputError, match="does not come to an end"):
        rendered(LARGE[kind])
    assert time.thread_time() - start < 5.0


def test_a_macro_without_an_end_is_one_sentence():
    with pytest.raises(InputError, match="it calls itself without end"):
        rendered("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


def test_the_limit_holds_in_another_thread_and_each_rendering_has_its_own_time(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.3)
    template, said = ChatTemplate({"default": ENDLESS["nested loops"]}, {}), []

    def render():
        try:
            template.render(QUESTION, None, True)
        except InputError as error:
            said.append(str(error))

    for _ in range(2):
        thread = threading.Thread(target=render)
        thread.start()
        thread.join(20)
    assert len(said) == 2 and all("more than 0.3 seconds" in sentence for sentence in said)


def test_a_tokenizer_with_such_a_template_is_refused_once_and_not_once_per_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.5)
    start = time.thread_time()
    with pytest.raises(InputError, match="does not come to an end"):
        HFChatTokenizer(str(qwen_folder(tmp_path, ENDLESS["nested loops"])))
    assert time.thread_time() - start < 3.0


@pytest.mark.parametrize("template", [QWEN25, QWEN3, LLAMA31])
def test_a_conversation_of_thousands_of_turns_is_within_the_limits(template):
    turns = [{"role": "user", "content": "q " * 100}, {"role": "assistant", "content": "a " * 100}] * 2000
    start = time.thread_time()
    text = ChatTemplate({"default": template}, {"bos_token": "<s>"}).render([*turns, *QUESTION], None, True)
    assert text.count("q q q") >= 2000 and time.thread_time() - start < template_limits.MAX_SECONDS / 2


# ------------------------------------------------------------------------------------------- the same text as without limits

USED = [
    "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem else '-' }}{{ loop.nextitem is defined }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{% continue %}{% endfor %}{{ messages | length }}",
    "{% for m in messages[::-1] %}{{ m.role ~ ': ' ~ m.content ~ 3 ~ none ~ missing }}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for k, v in d | dictsort %}{{ k, v }}{% endfor %}",
    "{% for x in tree recursive %}{{ x.name }}({{ loop(x.children) }}){{ loop.depth }}{% endfor %}",
    "{% set ns = namespace(n=0, t='') %}{% for i in range(5) %}{% set ns.n = ns.n + i * 2 ** i %}{% endfor %}{{ ns.n % 7 }}",
    "{% macro say(m, end='!') %}{{ m.role | upper }}{{ end }}{{ varargs }}{% endmacro %}{{ say(messages[0]) }}",
    "{% macro box() %}[{{ caller('x') }}]{% endmacro %}{% call(y) box() %}{{ y }}{% endcall %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | groupby('role') | list | length }}{{ ['b', 'a'] | sort | join }}",
    "{{ 'abc' | list }}{{ d | list }}{{ d | join }}",
    "{{ d | tojson }}{{ d | tojson(indent=2) }}{{ messages[1].content.split('b')[-1].lstrip('\n').strip() | trim }}",
    "{{ '%s is %d' % ('a', 3) }}{{ '{} and {x:>4}'.format(1, x='z') }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ (1, 2) + (3,) }}",
    "{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}{{ ', '.join(['x', 'y']) }}{{ 'a'.center(5) }}{{ -7 // 2 }}",
    "{% set x %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ x * 2 }}{% filter upper %}abc{{ x }}{% endfilter %}",
    "{{ missing is defined }}{{ d is mapping }}{{ messages is iterable }}{{ 'b' in 'abc' }}{{ none }}{{ missing or 'else' }}",
    "{% for x in missing %}{{ x }}{% endfor %}{{ missing | default('d') }}{{ 7.5 | round | int }}{{ [3, 1] | max }}",
    "{% set j = joiner(',') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("text", USED)
def test_what_templates_use_is_rendered_as_jinjas_own_sandbox_renders_it(text):
    own = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    own.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    values = {"d": {"b": 1, "a": [2, {"c": "ü"}]}, "tree": [{"name": "r", "children": [{"name": "s", "children": []}]}]}
    messages = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "a b\n c "},
        {"role": "user", "content": ""},
    ]
    expected = own.from_string(text).render(messages=messages, **values)
    assert ChatTemplate({"default": text}, values).render(messages, None, False) == expected != ""
