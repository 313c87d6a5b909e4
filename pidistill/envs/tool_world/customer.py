"""Play the customer of the tool world: a deterministic state machine that reads what the agent writes by its words.

It states its wishes one after another, gives what it is asked for, answers a request for confirmation, and ends with
:data:`STOP`. It trusts the agent: a wish that the agent calls done or impossible is closed. The database shows what was
really done.
"""

import re
from dataclasses import dataclass

from pidistill.envs.tool_world.wishes import Wish

STOP = "###STOP###"
PATIENCE = 3  # messages in a row that it does not understand before it leaves

_MORE = re.compile(r"anything else|something else|else (can|may|could) i|further (help|assist|question)", re.I)
_IDENTITY = re.compile(r"\be-?mail|\bzip\b|\b(your|first|last|full) name\b|identify|verify (you|who)|who am i", re.I)
_CONFIRM = re.compile(
    r"\bconfirm\b|\bproceed|\bgo ahead|\b(shall|should) i\b|would you like (me )?to|do you (want|agree)|yes or no|yes/no|\(yes|"
    r"is (that|this) (ok|okay|right|correct|all right)",
    re.I,
)
_REFUSAL = re.compile(
    r"\bcan ?not\b|\bcan['’]t\b|\bunable\b|\bnot (able|possible|allowed|permitted)\b|\bnot .{0,20}policy|\bden(ied|y)\b",
    re.I,
)
_DONE = re.compile(
    r"\b(has|have) (now |already |successfully )?been\b|\b(is|are) (now )?(cancell?ed|changed|updated|returned|exchanged)\b"
    r"|\bsuccessfully\b|\bcompleted\b|\ball set\b|\bdone\b",
    re.I,
)
_TOPICS = {
    "order": re.compile(r"\border (id|number)|\bwhich order|\bwhat order", re.I),
    "reason": re.compile(r"\breason\b|\bwhy\b", re.I),
    "payment": re.compile(r"\bpayment|\brefund|\bcard\b|\bpay with", re.I),
    "address": re.compile(r"\baddress\b|\bstreet\b", re.I),
}


@dataclass
class Customer:
    """Play one episode's customer."""

    identity: str  # what it says when asked who it is
    wishes: tuple[Wish, ...]
    at: int = 0  # index of the wish that is open
    identified: bool = False  # it has said who it is; agents then repeat addresses and names without asking for them
    confused: int = 0  # messages in a row that it did not understand

    @property
    def wish(self) -> Wish:
        return self.wishes[self.at]

    @property
    def opening(self) -> str:
        return f"Hello. {self.wishes[0].says}"

    def answer(self, text: str) -> str:
        """Return what the customer says to a message of the agent; it ends with :data:`STOP` where the customer leaves."""
        answer = self._understood(text)
        self.confused = 0 if answer else self.confused + 1
        if answer:
            return answer
        return f"I give up. {STOP}" if self.confused == PATIENCE else f"I am not sure what you mean. {self.wish.says}"

    def _understood(self, text: str) -> str | None:
        """Answer what is understood; the order matters: "is done, anything else?" asks, "I would cancel, confirm?" refunds."""
        if _MORE.search(text):
            return self._next("Thank you.")
        if _IDENTITY.search(text) and not self.identified:
            self.identified = True
            return self.identity
        if self.wish.denied and _REFUSAL.search(text):  # also where something is offered instead
            return self._next("I see.")
        if _CONFIRM.search(text):
            return self._next(self.wish.confirms) if self.wish.declined else self.wish.confirms
        if self.wish.declined and said_all(text, self.wish.outputs):
            return self._next(self.wish.confirms)
        if _REFUSAL.search(text):
            return self._next("I see.")
        if _DONE.search(text) or (self._asks and said_all(text, self.wish.outputs)):
            return self._next("Thank you.")
        return self._told(text)

    def _told(self, text: str) -> str | None:
        """Return what the text asks for, as far as the customer knows it."""
        facts = self.wish.facts
        told = [self.identity] if _IDENTITY.search(text) else []
        told += [facts[topic] for topic, asked in _TOPICS.items() if topic in facts and asked.search(text)]
        return " ".join(told) or None

    @property
    def _asks(self) -> bool:
        """Return whether the wish is a question, which its answer settles."""
        return self.wish.kind.startswith("ask_")

    def _next(self, before: str) -> str:
        if self.at + 1 == len(self.wishes):
            return f"{before} That is all. {STOP}"
        self.at += 1
        return f"{before} {self.wish.says}"


def said_all(text: str, outputs: tuple[str, ...]) -> bool:
    """Return whether the text says each number by itself: 12 is not in 112, 12.5 or V12; 1,200 and 1200.00 are 1200."""
    return numbers_said(text) >= set(outputs)


def numbers_said(text: str) -> set[str]:
    """Return the different whole numbers that the text says by themselves."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"\.00?\b", "", text)
    return set(re.findall(r"(?<![\w.])\d+(?!\w|\.\d)", text))
