"""Say what a wish of a customer is: what is said about it, and what the expert does."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pidistill.envs.tool_world.shop import RETURN_DAYS, TODAY, Shop
from pidistill.envs.tool_world.tools import get_order, get_user

MORE = "Is there anything else?"


class NothingFits(Exception):
    """Say that nothing of the shop fits a kind of wish."""


@dataclass(frozen=True)
class Call:
    """Hold a tool call of the expert."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Say:
    """Hold what the expert writes to the customer."""

    text: str


Move = Call | Say


@dataclass(frozen=True)
class Wish:
    """Hold one thing that a customer wants."""

    kind: str  # name of the function of `kinds` that drew it
    says: str  # how the customer puts it
    moves: tuple[Move, ...]  # what the expert does once the customer is identified
    facts: Mapping[str, str] = field(default_factory=dict)  # answers when asked, by topic: order, reason, payment, address
    confirms: str = "Yes, please."  # the answer when the agent asks for a confirmation
    declined: bool = False  # the customer says no to it, and continues with the next wish
    outputs: tuple[str, ...] = ()  # what the agent must have told the customer
    denied: bool = False  # the policy forbids it
    ends: bool = False  # the conversation is over afterwards


@dataclass
class Desk:
    """Hold a customer who is being served, from whose orders wishes are drawn."""

    shop: Shop  # the shop after the wishes so far
    rng: random.Random
    user_id: str
    knows_orders: bool  # the customer names order ids; otherwise an item, by which the agent must find the order
    others: Sequence[str]  # order ids of other customers
    used: set[str] = field(default_factory=set)  # orders that earlier wishes are about; every wish has an order of its own

    def order(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return one of the customer's unused orders that fits, and mark it used; NothingFits where there is none."""
        orders = [get_order(self.shop, order_id) for order_id in self.user["orders"] if order_id not in self.used]
        fitting = [order for order in orders if fits(order)]
        if not fitting:
            raise NothingFits
        chosen = self.rng.choice(fitting)
        self.used.add(chosen["order_id"])
        return chosen

    @property
    def user(self) -> dict[str, Any]:
        return get_user(self.shop, self.user_id)

    def named(self, order: dict[str, Any]) -> str:
        """Return how the customer names the order."""
        if self.knows_orders or self._same_item(order) > 1:
            return f"order {order['order_id']}"
        return f"the order with the {order['items'][0]['name']}"

    def found(self, order: dict[str, Any], said: str) -> tuple[Call, ...]:
        """Return the calls that find an order which was named in this way."""
        if order["order_id"] in said:
            return (Call("get_order", {"order_id": order["order_id"]}),)
        orders = self.user["orders"]
        tried = orders[: orders.index(order["order_id"]) + 1]
        return Call("get_user", {"user_id": self.user_id}), *(Call("get_order", {"order_id": one}) for one in tried)

    def facts(self, order: dict[str, Any], said: str) -> dict[str, str]:
        known = order["order_id"] in said
        name = order["items"][0]["name"]
        return {"order": f"It is {order['order_id']}." if known else f"I do not remember the number. It has a {name} in it."}

    def _same_item(self, order: dict[str, Any]) -> int:
        name = order["items"][0]["name"]
        orders = [get_order(self.shop, order_id) for order_id in self.user["orders"]]
        return sum(any(item["name"] == name for item in one["items"]) for one in orders)


def pending(order: dict[str, Any]) -> bool:
    return order["status"] == "pending"


def fresh(order: dict[str, Any]) -> bool:
    """Return whether the order was delivered recently enough for its items to be given back."""
    return order["status"] == "delivered" and order["delivered_on"] >= str(TODAY - timedelta(days=RETURN_DAYS))


def late(order: dict[str, Any]) -> bool:
    return order["status"] == "delivered" and not fresh(order)


def refused(because: str) -> Say:
    return Say(f"I am sorry, but that cannot be done: {because}. {MORE}")


def asked(what: str) -> Say:
    return Say(f"{what} Do you confirm (yes or no)?")


def described(move: Call) -> str:
    return f"{move.name}({json.dumps(dict(move.arguments), ensure_ascii=False)})"
