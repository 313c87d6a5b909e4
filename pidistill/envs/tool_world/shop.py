"""Hold the shop of the tool world: users, products and orders in a small SQLite database, one copy per episode.

Everything is drawn from a seed. Prices are whole dollars. Nothing that an agent or a row says becomes part of an SQL text.
"""

import functools
import hashlib
import itertools
import json
import random
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Any

TODAY, RETURN_DAYS = date(2025, 6, 30), 30
N_USERS, N_ORDERS = 200, 500

_TABLES = {
    "users": "user_id TEXT PRIMARY KEY, first_name TEXT, last_name TEXT, email TEXT, street TEXT, city TEXT, zip TEXT",
    "payments": "payment_id TEXT PRIMARY KEY, user_id TEXT, kind TEXT, balance INTEGER",
    "products": "product_id TEXT PRIMARY KEY, name TEXT",
    "variants": "variant_id TEXT PRIMARY KEY, product_id TEXT, options TEXT, price INTEGER, available INTEGER",
    "orders": "order_id TEXT PRIMARY KEY, user_id TEXT, status TEXT, placed_on TEXT, delivered_on TEXT, street TEXT, "
    "city TEXT, zip TEXT, payment_id TEXT, note TEXT, items_changed INTEGER",
    "items": "order_id TEXT, position INTEGER, variant_id TEXT, price INTEGER, state TEXT",
    "ledger": "order_id TEXT, payment_id TEXT, amount INTEGER",
    "transfers": "user_id TEXT, topic TEXT",
}


def _words(text: str) -> list[str]:
    return text.split()


_CHANGING = ("users", "payments", "orders", "items", "ledger", "transfers")

_FIRST = _words(
    "Ada Bela Cora Dario Edda Emil Fatou Finn Greta Hana Hugo Ines Ivo Jana Joel Kaya Kofi Lena Lior Mara Milan Nadia Nils "
    "Olga Omar Paula Pavel Rosa Ravi Sana Sven Tara Timo Uma Vera Viktor Wanda Yara Yusuf Zoe"
)
_LAST = _words(
    "Abend Baker Castro Dahl Eriksen Fischer Gomez Haddad Ito Jansen Keller Lindt Moreau Novak Okafor Petrov Quist Rossi Sato "
    "Tanaka Urban Vogel Weiss Xu Yilmaz Zeman Amadi Brandt Cohen Duarte Elliot Fuchs Greco Hoang Ivanov Jensen Kovacs Lopes "
    "Meyer Nakata"
)
_STREETS = _words("Alder Beech Cedar Elm Hazel Linden Maple Oak Poplar Rowan Spruce Willow")
_CITIES = _words("Arbor Brook Cliff Dale Easton Ford Glen Haven Island Junction")

_COLOURS, _SIZES, _WOODS = ("black", "white", "red", "blue", "green"), ("small", "medium", "large"), ("oak", "pine", "walnut")
_AXES: dict[str, tuple[tuple[str, Sequence[str]], tuple[str, Sequence[str]]]] = {
    "lamp": (("colour", _COLOURS), ("brightness", ("low", "medium", "high"))),
    "textile": (("colour", _COLOURS), ("size", _SIZES)),
    "furniture": (("wood", _WOODS), ("size", _SIZES)),
    "kitchen": (("colour", _COLOURS), ("capacity", ("1 litre", "2 litres", "3 litres"))),
    "device": (("colour", _COLOURS), ("memory", ("small", "large"))),
}
_PRODUCTS = {
    "lamp": "desk lamp|floor lamp|wall lamp|reading lamp|lantern|string light|night light|ceiling lamp|table lamp|work light",
    "textile": "wool blanket|bath towel|rug|curtain|cushion|bed sheet|tablecloth|apron|door mat|quilt",
    "furniture": "bookshelf|side table|stool|coat rack|desk|bench|wardrobe|shoe rack|chair|plant stand",
    "kitchen": "kettle|rice cooker|blender|thermos|casserole|pitcher|coffee maker|mixing bowl|toaster oven|salad spinner",
    "device": "alarm clock|radio|speaker|weather station|photo frame|thermostat|doorbell|vacuum robot|scale|projector",
}


class Shop:
    """Hold one episode's database. Its connection may move between threads, one at a time; a pickle holds all of it."""

    def __init__(self, image: bytes | None = None) -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        if image is not None:
            self._connection.deserialize(image)
        self._connection.row_factory = sqlite3.Row

    def __reduce__(self) -> tuple[type["Shop"], tuple[bytes]]:
        return Shop, (self.image(),)

    def rows(self, sql: str, *parameters: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self._connection.execute(sql, parameters)]

    def one(self, sql: str, *parameters: Any) -> dict[str, Any] | None:
        row = self._connection.execute(sql, parameters).fetchone()
        return None if row is None else dict(row)

    def change(self, sql: str, *parameters: Any) -> None:
        self._connection.execute(sql, parameters)

    def fingerprint(self) -> str:
        """Return a text that is equal for equal contents, whatever the order in which rows were written."""
        digest, cursor = hashlib.sha256(), self._connection.cursor()
        cursor.row_factory = None
        for table in _CHANGING:  # names of our own
            order = ", ".join(str(i + 1) for i in range(_TABLES[table].count(",") + 1))
            digest.update(repr((table, cursor.execute(f"SELECT * FROM {table} ORDER BY {order}").fetchall())).encode())
        return digest.hexdigest()

    def image(self) -> bytes:
        return self._connection.serialize()


@functools.lru_cache(maxsize=4)
def shop_image(seed: int) -> bytes:
    """Return the database at the start of every episode of a world, as bytes that :class:`Shop` opens."""
    rng, shop = random.Random(f"shop {seed}"), Shop()
    for table, columns in _TABLES.items():
        shop.change(f"CREATE TABLE {table} ({columns})")
    for table, column in (("payments", "user_id"), ("variants", "product_id"), ("orders", "user_id"), ("items", "order_id")):
        shop.change(f"CREATE INDEX {table}_{column} ON {table} ({column})")
    _add_products(shop, rng)
    _add_users(shop, rng)
    _add_orders(shop, rng)
    return shop.image()


def _insert(shop: Shop, table: str, *values: Any) -> None:
    shop.change(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", *values)


def _numbers(rng: random.Random, digits: int) -> Iterator[int]:
    """Return numbers of so many digits, none of them twice."""
    low = 10 ** (digits - 1)
    return iter(rng.sample(range(low, 10 * low), 5000))


def _add_products(shop: Shop, rng: random.Random) -> None:
    numbers = _numbers(rng, 4)
    for family, names in _PRODUCTS.items():
        (first, firsts), (second, seconds) = _AXES[family]
        for name in names.split("|"):
            product_id, base = f"P{next(numbers)}", rng.randrange(15, 180)
            _insert(shop, "products", product_id, name)
            pairs = sorted(rng.sample(list(itertools.product(firsts, seconds)), 6))
            prices = rng.sample(range(base, base + 60), 6)  # all different: the cheapest is one
            in_stock = set(rng.sample(range(6), rng.choice((3, 4, 5))))
            for i, (a, b) in enumerate(pairs):
                options = json.dumps({first: a, second: b})
                _insert(shop, "variants", f"V{next(numbers)}", product_id, options, prices[i], int(i in in_stock))


def _add_users(shop: Shop, rng: random.Random) -> None:
    numbers = _numbers(rng, 4)
    names = rng.sample(list(itertools.product(_FIRST, _LAST)), N_USERS)
    for first, last in names:
        number = next(numbers)
        user_id = f"{first}_{last}_{number}".lower()
        _insert(shop, "users", user_id, first, last, f"{first}.{last}{number % 100}@example.com".lower(), *new_address(rng))
        for kind in rng.sample(("card", "wallet", "card"), rng.choice((1, 2, 2))):
            _insert(shop, "payments", f"{kind}_{next(numbers)}", user_id, kind, None)
        if rng.random() < 0.6:
            _insert(shop, "payments", f"gift_{next(numbers)}", user_id, "gift_card", rng.randrange(10, 500))


def new_address(rng: random.Random) -> tuple[str, str, str]:
    """Return (street, city, zip)."""
    city = rng.randrange(len(_CITIES))
    return f"{rng.randrange(1, 200)} {rng.choice(_STREETS)} Street", _CITIES[city], f"{10 + city}{rng.randrange(100, 1000)}"


def _add_orders(shop: Shop, rng: random.Random) -> None:
    numbers = _numbers(rng, 5)
    users = [user["user_id"] for user in shop.rows("SELECT user_id FROM users ORDER BY user_id")]
    products = [product["product_id"] for product in shop.rows("SELECT product_id FROM products ORDER BY product_id")]
    for owner in [*users, *rng.choices(users, k=N_ORDERS - len(users))]:
        order_id = f"O{next(numbers)}"
        (status,) = rng.choices(("pending", "shipped", "delivered"), (4, 1, 5))
        delivered = TODAY - timedelta(days=rng.randrange(1, 2 * RETURN_DAYS))
        placed = (delivered if status == "delivered" else TODAY) - timedelta(days=rng.randrange(2, 10))
        home = shop.one("SELECT street, city, zip FROM users WHERE user_id = ?", owner)
        payments = shop.rows("SELECT payment_id FROM payments WHERE user_id = ? AND kind != 'gift_card'", owner)
        payment_id = rng.choice(payments)["payment_id"]
        delivered_on = str(delivered) if status == "delivered" else None
        _insert(shop, "orders", order_id, owner, status, str(placed), delivered_on, *home.values(), payment_id, None, 0)
        for position, product_id in enumerate(rng.sample(products, rng.choice((1, 2, 2, 3)))):
            variants = shop.rows("SELECT variant_id, price FROM variants WHERE product_id = ? ORDER BY variant_id", product_id)
            chosen = rng.choice(variants)
            _insert(shop, "items", order_id, position, chosen["variant_id"], chosen["price"], "ordered")
        total = shop.one("SELECT sum(price) AS total FROM items WHERE order_id = ?", order_id)["total"]
        _insert(shop, "ledger", order_id, payment_id, total)
