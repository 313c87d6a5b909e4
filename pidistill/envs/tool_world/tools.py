"""Carry out the shop's tools: plain functions on one episode's database.

They check what any such service would: that things exist, that an order's status allows it, that a variant is in stock. What
:data:`pidistill.envs.tool_world.policy.POLICY` says beyond that, no tool checks: the agent must obey it.
"""

import ast
import json
import operator
from typing import Any, Literal

from pidistill.envs.function_tools import ToolError, tools_by_name
from pidistill.envs.tool_world.shop import Shop

Reason = Literal["no longer needed", "ordered by mistake"]
Topic = Literal["damaged item", "lost parcel", "invoice", "warranty"]

# ------------------------------------------------------------------------------------------- reading


def find_user_by_email(state: Shop, email: str) -> str:
    """The user id that belongs to an email address."""
    return _user_id(state.one("SELECT user_id FROM users WHERE email = ?", email.lower()))


def find_user_by_name_zip(state: Shop, first_name: str, last_name: str, zip: str) -> str:
    """The user id that belongs to a name and a zip code."""
    sql = "SELECT user_id FROM users WHERE lower(first_name) = ? AND lower(last_name) = ? AND zip = ?"
    return _user_id(state.one(sql, first_name.lower(), last_name.lower(), zip))


def get_user(state: Shop, user_id: str) -> dict[str, Any]:
    """Name, email, address, payment methods and order ids of a user."""
    user = _required(state.one("SELECT * FROM users WHERE user_id = ?", user_id), f"no user {user_id}")
    payments = state.rows("SELECT payment_id, kind, balance FROM payments WHERE user_id = ? ORDER BY payment_id", user_id)
    orders = state.rows("SELECT order_id FROM orders WHERE user_id = ? ORDER BY order_id", user_id)
    for payment in payments:
        if payment["balance"] is None:
            del payment["balance"]
    return user | {"payments": payments, "orders": [order["order_id"] for order in orders]}


def get_order(state: Shop, order_id: str) -> dict[str, Any]:
    """Owner, status, dates, address, payment method, items and total of an order."""
    order = _order(state, order_id)
    sql = (
        "SELECT items.variant_id, product_id, name, options, items.price, state FROM items JOIN variants USING (variant_id) "
        "JOIN products USING (product_id) WHERE order_id = ? ORDER BY position"
    )
    items = [item | {"options": json.loads(item["options"])} for item in state.rows(sql, order_id)]
    shown = {key: value for key, value in order.items() if value is not None and key != "items_changed"}
    return shown | {"items": items, "total": sum(item["price"] for item in items)}


def list_products(state: Shop) -> dict[str, str]:
    """All products: name and product id."""
    return {row["name"]: row["product_id"] for row in state.rows("SELECT name, product_id FROM products ORDER BY name")}


def get_product(state: Shop, product_id: str) -> dict[str, Any]:
    """Name and variants of a product, with options, price and availability."""
    product = _required(state.one("SELECT * FROM products WHERE product_id = ?", product_id), f"no product {product_id}")
    sql = "SELECT variant_id, options, price, available FROM variants WHERE product_id = ? ORDER BY variant_id"
    variants = [
        row | {"options": json.loads(row["options"]), "available": bool(row["available"])}
        for row in state.rows(sql, product_id)
    ]
    return product | {"variants": variants}


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression.

    Args:
        expression: numbers, + - * / and parentheses, such as (12 + 30) * 2.
    """
    if len(expression) > 200:
        raise ToolError("the expression is longer than 200 characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(int(value) if value == int(value) else round(value, 2))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolError("that is no expression of numbers, + - * / and parentheses that has a value") from error


def _value(node: ast.AST) -> float:
    """Return the value of a syntax tree; nothing is executed."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("not arithmetic")


# ------------------------------------------------------------------------------------------- changing


def cancel_order(state: Shop, order_id: str, reason: Reason) -> str:
    """Cancel a pending order and refund its total to its payment method."""
    order = _order(state, order_id, "pending")
    state.change("UPDATE orders SET status = 'cancelled', note = ? WHERE order_id = ?", reason, order_id)
    total = sum(row["price"] for row in _items(state, order_id))
    _book(state, order_id, order["payment_id"], -total)
    return f"{order_id} is cancelled; {total} is refunded to {order['payment_id']}"


def modify_order_items(state: Shop, order_id: str, variant_ids: list[str], new_variant_ids: list[str], payment_id: str) -> str:
    """Replace items of a pending order by other variants; once per order.

    Args:
        variant_ids: the items to replace.
        new_variant_ids: what each of them is replaced by, in the same order.
        payment_id: pays or receives the difference in price.
    """
    order = _order(state, order_id, "pending")
    if order["items_changed"]:
        raise ToolError(f"the items of {order_id} were changed before")
    pairs = _pairs(state, order_id, variant_ids, new_variant_ids)
    _payment(state, order, payment_id)
    for item, new in pairs:
        sql = "UPDATE items SET variant_id = ?, price = ? WHERE order_id = ? AND position = ?"
        state.change(sql, new["variant_id"], new["price"], order_id, item["position"])
    state.change("UPDATE orders SET items_changed = 1 WHERE order_id = ?", order_id)
    difference = sum(new["price"] - item["price"] for item, new in pairs)
    _book(state, order_id, payment_id, difference)
    return f"the items of {order_id} are changed; the difference of {difference} is booked to {payment_id}"


def modify_order_address(state: Shop, order_id: str, street: str, city: str, zip: str) -> str:
    """Change the delivery address of a pending order."""
    _order(state, order_id, "pending")
    state.change("UPDATE orders SET street = ?, city = ?, zip = ? WHERE order_id = ?", street, city, zip, order_id)
    return f"{order_id} goes to {street}, {city} {zip}"


def modify_payment(state: Shop, order_id: str, payment_id: str) -> str:
    """Change the payment method of a pending order; the old one gets its total back."""
    order = _order(state, order_id, "pending")
    _payment(state, order, payment_id)
    if payment_id == order["payment_id"]:
        raise ToolError(f"{order_id} is paid with {payment_id} already")
    total = sum(row["price"] for row in _items(state, order_id))
    _book(state, order_id, order["payment_id"], -total)
    _book(state, order_id, payment_id, total)
    state.change("UPDATE orders SET payment_id = ? WHERE order_id = ?", payment_id, order_id)
    return f"{order_id} is paid with {payment_id}"


def return_items(state: Shop, order_id: str, variant_ids: list[str], payment_id: str) -> str:
    """Take items of a delivered order back.

    Args:
        payment_id: gets the refund.
    """
    order = _order(state, order_id, "delivered")
    items = _chosen(state, order_id, variant_ids)
    _payment(state, order, payment_id)
    for item in items:
        _set_item_state(state, order_id, item, "returned")
    refund = sum(item["price"] for item in items)
    _book(state, order_id, payment_id, -refund)
    return f"{len(items)} items of {order_id} are returned; {refund} is refunded to {payment_id}"


def exchange_items(state: Shop, order_id: str, variant_ids: list[str], new_variant_ids: list[str], payment_id: str) -> str:
    """Exchange items of a delivered order for other variants.

    Args:
        variant_ids: the items to give back.
        new_variant_ids: what is sent for each of them, in the same order.
        payment_id: pays or receives the difference in price.
    """
    order = _order(state, order_id, "delivered")
    pairs = _pairs(state, order_id, variant_ids, new_variant_ids)
    _payment(state, order, payment_id)
    for item, new in pairs:
        _set_item_state(state, order_id, item, f"exchanged for {new['variant_id']}")
    difference = sum(new["price"] - item["price"] for item, new in pairs)
    _book(state, order_id, payment_id, difference)
    return f"{len(pairs)} items of {order_id} are exchanged; the difference of {difference} is booked to {payment_id}"


def modify_user_address(state: Shop, user_id: str, street: str, city: str, zip: str) -> str:
    """Change the address of a user's account; orders keep theirs."""
    _required(state.one("SELECT user_id FROM users WHERE user_id = ?", user_id), f"no user {user_id}")
    state.change("UPDATE users SET street = ?, city = ?, zip = ? WHERE user_id = ?", street, city, zip, user_id)
    return f"the address of {user_id} is {street}, {city} {zip}"


def transfer_to_human(state: Shop, user_id: str, topic: Topic) -> str:
    """Hand the customer over to a human colleague; the conversation ends."""
    _required(state.one("SELECT user_id FROM users WHERE user_id = ?", user_id), f"no user {user_id}")
    state.change("INSERT INTO transfers VALUES (?, ?)", user_id, topic)
    return "the customer is handed over"


# ------------------------------------------------------------------------------------------- checks and bookings


def _required(row: dict[str, Any] | None, otherwise: str) -> dict[str, Any]:
    if row is None:
        raise ToolError(otherwise)
    return row


def _user_id(row: dict[str, Any] | None) -> str:
    return _required(row, "no such user")["user_id"]


def _order(state: Shop, order_id: str, status: str | None = None) -> dict[str, Any]:
    order = _required(state.one("SELECT * FROM orders WHERE order_id = ?", order_id), f"no order {order_id}")
    if status is not None and order["status"] != status:
        raise ToolError(f"{order_id} is {order['status']}, not {status}")
    return order


def _items(state: Shop, order_id: str) -> list[dict[str, Any]]:
    return state.rows("SELECT position, variant_id, price, state FROM items WHERE order_id = ? ORDER BY position", order_id)


def _chosen(state: Shop, order_id: str, variant_ids: list[str]) -> list[dict[str, Any]]:
    """Return the order's items of these variants, each once, none of them given back before."""
    items = {item["variant_id"]: item for item in _items(state, order_id) if item["state"] == "ordered"}
    if not variant_ids or len(set(variant_ids)) < len(variant_ids):
        raise ToolError("give at least one item, and each once")
    for variant_id in variant_ids:
        _required(items.get(variant_id), f"{order_id} has no item {variant_id} that could be given back or replaced")
    return [items[variant_id] for variant_id in variant_ids]


def _pairs(
    state: Shop, order_id: str, variant_ids: list[str], new_variant_ids: list[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (item, variant that takes its place) for each pair."""
    items = _chosen(state, order_id, variant_ids)
    if len(new_variant_ids) != len(items):
        raise ToolError(f"{len(items)} items and {len(new_variant_ids)} new variants do not match")
    news = []
    for new_id, item in zip(new_variant_ids, items, strict=True):
        new = _required(state.one("SELECT * FROM variants WHERE variant_id = ?", new_id), f"no variant {new_id}")
        if not new["available"] or new_id == item["variant_id"]:
            raise ToolError(f"{new_id} is {'the item itself' if new['available'] else 'out of stock'}")
        news.append(new)
    return list(zip(items, news, strict=True))


def _payment(state: Shop, order: dict[str, Any], payment_id: str) -> None:
    sql = "SELECT payment_id FROM payments WHERE payment_id = ? AND user_id = ?"
    found = state.one(sql, payment_id, order["user_id"])
    _required(found, f"{payment_id} is no payment method of {order['user_id']}")


def _book(state: Shop, order_id: str, payment_id: str, amount: int) -> None:
    """Charge ``amount`` (a refund where negative); gift cards have a balance."""
    state.change("INSERT INTO ledger VALUES (?, ?, ?)", order_id, payment_id, amount)
    state.change("UPDATE payments SET balance = balance - ? WHERE payment_id = ? AND kind = 'gift_card'", amount, payment_id)


def _set_item_state(state: Shop, order_id: str, item: dict[str, Any], said: str) -> None:
    state.change("UPDATE items SET state = ? WHERE order_id = ? AND position = ?", said, order_id, item["position"])


READING = (find_user_by_email, find_user_by_name_zip, get_user, get_order, list_products, get_product, calculate)
CHANGING = (
    *(cancel_order, modify_order_items, modify_order_address, modify_payment, return_items, exchange_items),
    *(modify_user_address, transfer_to_human),
)
TOOLS = tools_by_name((*READING, *CHANGING))
