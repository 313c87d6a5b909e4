"""Draw the kinds of wishes, each with what the expert does about it.

A kind draws one wish of a customer from the shop as it stands (or two, the second after the first was denied), and raises
NothingFits where nothing of the shop fits. What the policy forbids ends with the expert's refusal and leaves the shop as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pidistill.envs.tool_world.shop import RETURN_DAYS, new_address
from pidistill.envs.tool_world.tools import get_product
from pidistill.envs.tool_world.wishes import MORE, Call, Desk, NothingFits, Say, Wish, asked, fresh, late, pending, refused


def _denied(desk: Desk, kind: str, order: dict[str, Any], text: str, because: str, **facts: str) -> Wish:
    """Return a wish about an order that the policy forbids: the expert finds the order, and refuses."""
    moves = (*desk.found(order, text), refused(because))
    return Wish(kind, text, moves, desk.facts(order, text) | facts, denied=True)


# ------------------------------------------------------------------------------------------- cancelling

REASONS = {"no longer needed": "I no longer need it.", "ordered by mistake": "I ordered it by mistake."}
BAD_REASONS = ("I found it cheaper elsewhere.", "It takes too long.", "I do not like the shop any more.")


def cancel(desk: Desk) -> Wish:
    order = desk.order(pending)
    reason, said = desk.rng.choice(list(REASONS.items()))
    text = f"I want to cancel {desk.named(order)}. {said}"
    order_id, total, paid = order["order_id"], order["total"], order["payment_id"]
    moves = (
        *desk.found(order, text),
        asked(f"I would cancel order {order_id} ({reason}) and refund {total} dollars to {paid}."),
        Call("cancel_order", {"order_id": order_id, "reason": reason}),
        Say(f"Order {order_id} is cancelled and {total} dollars are refunded to {paid}. {MORE}"),
    )
    return Wish("cancel", text, moves, desk.facts(order, text) | {"reason": said}, outputs=(str(total),))


def cancel_for_another_reason(desk: Desk) -> Wish:
    order = desk.order(pending)
    said = desk.rng.choice(BAD_REASONS)
    text = f"I want to cancel {desk.named(order)}. {said}"
    return _denied(desk, "cancel_for_another_reason", order, text, "orders are not cancelled for that reason", reason=said)


def cancel_too_late(desk: Desk) -> Wish:
    order = desk.order(lambda order: order["status"] in ("shipped", "delivered"))
    said = desk.rng.choice(list(REASONS.values()))
    text = f"Please cancel {desk.named(order)}. {said}"
    return _denied(desk, "cancel_too_late", order, text, f"the order is {order['status']} already", reason=said)


def cancel_for_somebody_else(desk: Desk) -> Wish:
    order_id = desk.rng.choice(desk.others)
    text = f"My sister asks me to cancel her order {order_id}. She no longer needs it."
    moves = (Call("get_order", {"order_id": order_id}), refused("the order was placed by somebody else"))
    facts = {"order": f"It is {order_id}.", "reason": "She no longer needs it."}
    return Wish("cancel_for_somebody_else", text, moves, facts, denied=True)


# ------------------------------------------------------------------------------------------- variants


def _options_text(variant: dict[str, Any]) -> str:
    return ", ".join(variant["options"].values())


def choose_variant(desk: Desk, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (condition, the one variant that meets it), such as "the cheapest one that is available"."""
    variants = get_product(desk.shop, item["product_id"])["variants"]
    others = [variant for variant in variants if variant["available"] and variant["variant_id"] != item["variant_id"]]
    if not others:
        raise NothingFits
    cheapest, dearest = min(others, key=_price), max(others, key=_price)
    gone = [variant for variant in variants if not variant["available"] and variant["variant_id"] != item["variant_id"]]
    wanted = desk.rng.choice(others)
    conditions = [
        (f"the one that is {_options_text(wanted)}", wanted),
        ("the cheapest other one that is available", cheapest),
        ("the most expensive other one that is available", dearest),
    ]
    if gone:
        condition = f"the one that is {_options_text(gone[0])}, or if that is not available the cheapest other one that is"
        conditions.append((condition, cheapest))
    return desk.rng.choice(conditions)


def _price(variant: dict[str, Any]) -> int:
    return variant["price"]


def _swap(desk: Desk, kind: str, fits: Callable[[dict[str, Any]], bool], verb: str, call: str) -> Wish:
    order = desk.order(fits)
    item = desk.rng.choice(order["items"])
    condition, new = choose_variant(desk, item)
    text = f"I want to {verb} the {item['name']} of {desk.named(order)} for {condition}."
    difference = new["price"] - item["price"]
    money = f"{difference} dollars are charged" if difference > 0 else f"{-difference} dollars are refunded"
    arguments = {"order_id": order["order_id"], "variant_ids": [item["variant_id"]]}
    arguments |= {"new_variant_ids": [new["variant_id"]], "payment_id": order["payment_id"]}
    moves = (
        *desk.found(order, text),
        Call("get_product", {"product_id": item["product_id"]}),
        asked(f"I would {verb} the {item['name']} for the one that is {_options_text(new)}; {money} to {order['payment_id']}."),
        Call(call, arguments),
        Say(f"The {item['name']} has been changed to the one that is {_options_text(new)}; {money}. {MORE}"),
    )
    return Wish(kind, text, moves, desk.facts(order, text), outputs=(str(abs(difference)),))


def change_item(desk: Desk) -> Wish:
    return _swap(desk, "change_item", pending, "swap", "modify_order_items")


def exchange(desk: Desk) -> Wish:
    return _swap(desk, "exchange", fresh, "exchange", "exchange_items")


def exchange_for_another_product(desk: Desk) -> Wish:
    order = desk.order(fresh)
    item = order["items"][0]
    names = [row["name"] for row in desk.shop.rows("SELECT name FROM products ORDER BY name") if row["name"] != item["name"]]
    other = desk.rng.choice(names)
    text = f"I want to exchange the {item['name']} of {desk.named(order)} for a {other}."
    because = "items are exchanged for variants of the same product only"
    return _denied(desk, "exchange_for_another_product", order, text, because)


# ------------------------------------------------------------------------------------------- returning


def _return(desk: Desk, order: dict[str, Any], text: str, payment_id: str, found: bool, **settings: Any) -> Wish:
    """Return the wish to return an order's first item; ``settings`` are fields of the wish."""
    item, order_id = order["items"][0], order["order_id"]
    arguments = {"order_id": order_id, "variant_ids": [item["variant_id"]], "payment_id": payment_id}
    moves = (
        *(desk.found(order, text) if found else ()),
        asked(f"I would take back the {item['name']} of order {order_id} and refund {item['price']} dollars to {payment_id}."),
        Call("return_items", arguments),
        Say(f"The {item['name']} has been returned; {item['price']} dollars are refunded to {payment_id}. {MORE}"),
    )
    settings = {"outputs": (str(item["price"]),), "kind": "return_item"} | settings
    return Wish(says=text, moves=moves, facts=desk.facts(order, text) | {"payment": f"To {payment_id}."}, **settings)


def return_item(desk: Desk) -> Wish:
    order = desk.order(fresh)
    item = order["items"][0]
    text = f"I want to return the {item['name']} of {desk.named(order)}."
    text += " The refund should go to the payment method of the order."
    return _return(desk, order, text, order["payment_id"], found=True)


def return_item_to_gift_card(desk: Desk) -> Wish:
    gift = _gift_card(desk)
    order = desk.order(lambda order: gift is not None and fresh(order))
    text = f"I want to return the {order['items'][0]['name']} of {desk.named(order)}. Please refund it to {gift['payment_id']}."
    return _return(desk, order, text, gift["payment_id"], found=True, kind="return_item_to_gift_card")


def return_item_if_enough(desk: Desk) -> Wish:
    """Draw a return that the customer wants only from a certain refund on, which it misses: asked, the customer says no."""
    order = desk.order(fresh)
    item = order["items"][0]
    text = f"I think of returning the {item['name']} of {desk.named(order)}. How much would I get back for it?"
    wish = _return(desk, order, text, order["payment_id"], found=True)
    no = "No, that is too little. Leave it as it is."
    return replace(wish, kind="return_item_if_enough", moves=wish.moves[:-2], confirms=no, declined=True)


def return_too_late(desk: Desk) -> Wish:
    order = desk.order(late)
    text = f"I want to return the {order['items'][0]['name']} of {desk.named(order)}."
    return _denied(desk, "return_too_late", order, text, f"it was delivered more than {RETURN_DAYS} days ago")


def return_to_another_card(desk: Desk) -> list[Wish]:
    """Draw a return that is denied; the customer then takes the payment method of the order."""
    cards = [one["payment_id"] for one in desk.user["payments"] if one["kind"] != "gift_card"]
    order = desk.order(lambda order: fresh(order) and len(cards) > 1)
    other = next(card for card in cards if card != order["payment_id"])
    text = f"I want to return the {order['items'][0]['name']} of {desk.named(order)}. Please refund it to {other}."
    because = "the refund goes to the payment method of the order or to a gift card"
    then = f"Then return it and refund it to {order['payment_id']}, which I paid with."
    return [
        _denied(desk, "return_to_another_card", order, text, because, payment=f"To {other}."),
        _return(desk, order, then, order["payment_id"], found=False),
    ]


# ------------------------------------------------------------------------------------------- payment and addresses


def _gift_card(desk: Desk) -> dict[str, Any] | None:
    return next((one for one in desk.user["payments"] if one["kind"] == "gift_card"), None)


def _pay_with(desk: Desk, order: dict[str, Any], text: str, payment_id: str, found: bool) -> Wish:
    order_id, total = order["order_id"], order["total"]
    calls = desk.found(order, text) if found else ()
    if found and not any(call.name == "get_user" for call in calls):
        calls = (Call("get_user", {"user_id": desk.user_id}), *calls)
    moves = (
        *calls,
        asked(f"I would charge {total} dollars for order {order_id} to {payment_id} and refund them to {order['payment_id']}."),
        Call("modify_payment", {"order_id": order_id, "payment_id": payment_id}),
        Say(f"Order {order_id} has been changed: {total} dollars are paid with {payment_id}. {MORE}"),
    )
    facts = desk.facts(order, text) | {"payment": f"With {payment_id}."}
    return Wish("change_payment", text, moves, facts, outputs=(str(total),))


def change_payment(desk: Desk) -> Wish:
    payments = desk.user["payments"]
    order = desk.order(lambda order: pending(order) and bool(_covering(payments, order)))
    payment_id = desk.rng.choice(_covering(payments, order))
    return _pay_with(desk, order, f"I want to pay {desk.named(order)} with {payment_id} instead.", payment_id, found=True)


def _covering(payments: Sequence[dict[str, Any]], order: dict[str, Any]) -> list[str]:
    others = [one for one in payments if one["payment_id"] != order["payment_id"]]
    return [one["payment_id"] for one in others if one.get("balance", order["total"]) >= order["total"]]


def change_payment_to_a_short_gift_card(desk: Desk) -> list[Wish]:
    """Draw a change that is denied; a customer with another card then takes that one."""
    gift, payments = _gift_card(desk), desk.user["payments"]
    order = desk.order(lambda order: pending(order) and gift is not None and gift["balance"] < order["total"])
    text = f"Please charge {desk.named(order)} to my gift card {gift['payment_id']} instead."
    found = (Call("get_user", {"user_id": desk.user_id}), *desk.found(order, text)[-1:])
    if order["order_id"] not in text:
        found = desk.found(order, text)
    because = refused(f"the gift card has {gift['balance']} dollars and the order costs {order['total']}")
    facts = desk.facts(order, text) | {"payment": f"With {gift['payment_id']}."}
    wish = Wish("change_payment_to_a_short_gift_card", text, (*found, because), facts, denied=True)
    other = next(iter(_covering(payments, order)), None)
    if other is None:
        return [wish]
    return [wish, _pay_with(desk, order, f"Then charge that order to {other}.", other, found=False)]


def change_order_address(desk: Desk) -> Wish:
    order = desk.order(pending)
    street, city, zip_code = new_address(desk.rng)
    text = f"Please send {desk.named(order)} to another address: {street}, {city} {zip_code}."
    order_id = order["order_id"]
    moves = (
        *desk.found(order, text),
        asked(f"I would send order {order_id} to {street}, {city} {zip_code}; it costs nothing."),
        Call("modify_order_address", {"order_id": order_id, "street": street, "city": city, "zip": zip_code}),
        Say(f"The address of order {order_id} has been changed. {MORE}"),
    )
    facts = desk.facts(order, text) | {"address": f"{street}, {city} {zip_code}."}
    return Wish("change_order_address", text, moves, facts)


def change_account_address(desk: Desk) -> Wish:
    street, city, zip_code = new_address(desk.rng)
    text = f"I have moved. Please change the address of my account to {street}, {city} {zip_code}."
    moves = (
        asked(f"I would change the address of your account to {street}, {city} {zip_code}."),
        Call("modify_user_address", {"user_id": desk.user_id, "street": street, "city": city, "zip": zip_code}),
        Say(f"The address of your account has been changed. {MORE}"),
    )
    return Wish("change_account_address", text, moves, {"address": f"{street}, {city} {zip_code}."})


# ------------------------------------------------------------------------------------------- questions, and a human


def ask_total(desk: Desk) -> Wish:
    order = desk.order(lambda order: True)
    text = f"What is the total of {desk.named(order)}?"
    moves = (*desk.found(order, text), Say(f"The total is {order['total']} dollars. {MORE}"))
    return Wish("ask_total", text, moves, desk.facts(order, text), outputs=(str(order["total"]),))


def ask_sum(desk: Desk) -> Wish:
    """Draw a question about the sum of two orders, for `calculate`."""
    first, second = desk.order(lambda order: True), desk.order(lambda order: True)
    ids, totals = (first["order_id"], second["order_id"]), (first["total"], second["total"])
    text = f"How much are orders {ids[0]} and {ids[1]} together?"
    moves = (
        *(Call("get_order", {"order_id": order_id}) for order_id in ids),
        Call("calculate", {"expression": f"{totals[0]} + {totals[1]}"}),
        Say(f"Together they are {sum(totals)} dollars. {MORE}"),
    )
    return Wish("ask_sum", text, moves, {"order": f"They are {ids[0]} and {ids[1]}."}, outputs=(str(sum(totals)),))


def ask_cheapest(desk: Desk) -> Wish:
    product = desk.rng.choice(desk.shop.rows("SELECT product_id, name FROM products ORDER BY name"))
    available = [one for one in get_product(desk.shop, product["product_id"])["variants"] if one["available"]]
    price, count = min(map(_price, available)), len(available)
    text = f"How many variants of the {product['name']} are available, and what does the cheapest of them cost?"
    moves = (
        Call("list_products", {}),
        Call("get_product", {"product_id": product["product_id"]}),
        Say(f"There are {count} available, and the cheapest costs {price} dollars. {MORE}"),
    )
    return Wish("ask_cheapest", text, moves, outputs=(str(count), str(price)))


TOPICS = {
    "damaged item": "The last thing that I ordered arrived broken.",
    "lost parcel": "My parcel never arrived, though it is said to be delivered.",
    "invoice": "I need an invoice with another company name.",
    "warranty": "Something that I bought a year ago has stopped working, and it has a warranty.",
}


def need_a_human(desk: Desk) -> Wish:
    topic, text = desk.rng.choice(list(TOPICS.items()))
    moves = (Call("transfer_to_human", {"user_id": desk.user_id, "topic": topic}),)
    return Wish("need_a_human", text, moves, ends=True)


Kind = Callable[[Desk], "Wish | list[Wish]"]
PLAIN: tuple[Kind, ...] = (
    *(cancel, change_item, exchange, return_item, change_payment, change_order_address, change_account_address),
    *(ask_total, ask_cheapest),
)
HARD: tuple[Kind, ...] = (
    *(cancel_for_another_reason, cancel_too_late, cancel_for_somebody_else, exchange_for_another_product, return_too_late),
    *(return_to_another_card, return_item_to_gift_card, return_item_if_enough, change_payment_to_a_short_gift_card, ask_sum),
)
ALWAYS_FIT: frozenset[Kind] = frozenset({ask_cheapest, change_account_address, cancel_for_somebody_else})
