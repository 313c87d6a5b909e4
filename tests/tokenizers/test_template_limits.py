"""A chat template that never ends, or makes texts without bound, ends in one sentence, in every thread and within seconds."""

import threading
import time

import pytest

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
