"""Find out what a chat template does, by rendering small conversations with it."""

import re
from collections.abc import Iterable

from pidistill.chat.tool_calls import PROBE_CONVERSATION, PROBE_TOOL, written_format
from pidistill.tokenizers.chat_template import ChatTemplate, TemplateRefusal
from pidistill.tokenizers.markers import unused_word
from pidistill.types import Message, Tools

QUESTION: Message = {"role": "user", "content": "question"}


def find_rewritten_turns(template: ChatTemplate) -> list[str]:
    """Return which assistant turns the template shows differently from how they were sampled, once the conversation continues.

    A turn with and one without reasoning are rendered, answered by a user and by a tool. Some templates end the last turn with
    another token than the earlier ones, and some show the system text and the tools with the last question only.
    """
    found = []
    for role in ("user", "tool"):
        for kind, reasoning in (("with reasoning", "reason\n</think>\n\n"), ("without reasoning", "")):
            try:
                prompt = template.render([QUESTION], None, True)
                opened = not reasoning or prompt.rstrip().endswith("<think>")
                said = ("" if opened else "<think>\n") + reasoning + "answer"
                answered = [QUESTION, {"role": "assistant", "content": said}, {"role": role, "content": "more"}]
                conversation = template.render(answered, None, True)
                ended = template.render(answered[:-1], None, False).rstrip()
            except TemplateRefusal:  # a template that knows no tool role, or refuses the order
                continue
            if not conversation.startswith(prompt + said):
                found.append(f"turns {kind} that a {role} message follows")
            elif not conversation.startswith(ended):
                found.append(f"the ends of turns that a {role} message follows")
    found += [f"what stands before turns that a {role} message follows" for role in _moving_roles(template)]
    return list(dict.fromkeys(found))


def _moving_roles(template: ChatTemplate) -> list[str]:
    """Return after messages of which roles the template writes the system text or the tools in another place."""
    begin, call = [{"role": "system", "content": "text"}, QUESTION], PROBE_CONVERSATION[-1]
    result: Message = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "more"}
    found = []
    for role, continued in (("user", [{"role": "assistant", "content": "answer"}, QUESTION]), ("tool", [call, result])):
        answered = [*begin, *continued]
        for skipped, tools in ((0, [PROBE_TOOL]), (0, None), (1, [PROBE_TOOL])):  # some know no system role, or no tools
            try:
                before = template.render(begin[skipped:], tools, False).rstrip()
                moves = not template.render(answered[skipped:], tools, True).startswith(before)
            except TemplateRefusal:
                continue
            found += [role] if moves else []
            break
    return found


def find_default_system(template: ChatTemplate, tools: Tools) -> str | None:
    """Return the text s for which [system s, user] and [user] give the same prompt; None where there is none."""
    word = unused_word([QUESTION], tools)
    try:
        implicit = template.render([QUESTION], tools, False)
        explicit = template.render([{"role": "system", "content": word}, QUESTION], tools, False)
        if explicit.count(word) != 1:
            return None
        before, behind = explicit.split(word)
        found = implicit[len(before) : len(implicit) - len(behind)]
        again = template.render([{"role": "system", "content": found}, QUESTION], tools, False)
    except TemplateRefusal:  # a template without a system role, or one that wants its system text non-empty
        return None
    return found if implicit == before + found + behind == again else None


def find_tool_format(template: ChatTemplate) -> str | None:
    """Return the form in which the template writes tool calls: "none" for no form, None for an unknown one."""
    try:
        return written_format(template.render(PROBE_CONVERSATION, [PROBE_TOOL], False))
    except TemplateRefusal:  # a template that refuses tools
        return "none"


def shows_tools(template: ChatTemplate) -> bool:
    """Return whether the template writes the tools of a prompt."""
    try:
        return "probe_name" in template.render([QUESTION], [PROBE_TOOL], True)
    except TemplateRefusal:
        return False


def find_separators(template: ChatTemplate, added: Iterable[str]) -> set[str]:
    """Return the added tokens that the template writes between the messages of a plain conversation.

    The conversation has a system message where the template takes one, because default system texts may hold other tags. Some
    vocabularies add runs of whitespace or HTML tags; only what looks like a tag and separates turns is control. Tags of
    reasoning, which some templates write around an empty one, are text that models write themselves.
    """
    turns = [QUESTION, {"role": "assistant", "content": "answer"}, QUESTION]
    plain = ""
    for conversation in ([{"role": "system", "content": "text"}, *turns], turns):
        try:
            plain = template.render(conversation, None, False)
            break
        except TemplateRefusal:
            continue
    return {token for token in added if token[0] in "<[" and token not in ("<think>", "</think>") and token in plain}


def find_end_of_turn(template: ChatTemplate, stop: re.Pattern[str], control: re.Pattern[str]) -> tuple[bool, str | None]:
    """Return whether the template writes a stop token after an assistant turn, and the control token that it writes there.

    (True, None) where the template refuses a question with its answer: nothing is known then.
    """
    word = unused_word([QUESTION], None)
    try:
        text = template.render([QUESTION, {"role": "assistant", "content": word}], None, False)
    except TemplateRefusal:
        return True, None
    _, found, behind = text.rpartition(word)
    first = control.search(behind)
    return not found or stop.search(behind) is not None, first[0] if first else None
