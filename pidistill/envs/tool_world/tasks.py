"""Draw tasks of the tool world: a customer, wishes one after another, and what the expert does about them."""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pidistill.envs.tool_world.kinds import ALWAYS_FIT, HARD, PLAIN, need_a_human
from pidistill.envs.tool_world.shop import Shop, shop_image
from pidistill.envs.tool_world.tools import CHANGING, TOOLS
from pidistill.envs.tool_world.wishes import Call, Desk, Move, NothingFits, Say, Wish, described
from pidistill.errors import InputError

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
LEVELS = (1, 2, 3, 4)
_WRITES = frozenset(function.__name__ for function in CHANGING)
_HARD_PROB = 0.4  # that a wish is of a hard kind, in a task with two or more wishes
_HUMAN_PROB = 0.08  # that the last wish needs a human
_ORDER_WEIGHT = 4  # of kinds that need a fitting order; kinds that always fit have weight 1
_KNOWS_ORDERS_PROB = 0.7
_EMAIL_PROB = 0.5


@dataclass(frozen=True)
class ToolTask:
    """Hold one task. The agent sees nothing of it other than what the customer says."""

    world_seed: int  # the shop at the start, `shop_image`
    split: str
    level: int  # how many wishes the customer has
    user_id: str
    identity: str  # what the customer says when asked who it is
    wishes: tuple[Wish, ...]
    moves: tuple[Move, ...]  # everything that the expert does, from the first message on

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(move for move in self.moves if isinstance(move, Call))

    @property
    def writes(self) -> tuple[Call, ...]:
        return tuple(call for call in self.calls if call.name in _WRITES)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return what the agent must have told the customer."""
        return tuple(output for wish in self.wishes for output in wish.outputs)

    @functools.cached_property
    def final_fingerprint(self) -> str:
        """Return the fingerprint of the shop after the expert's calls."""
        shop = Shop(shop_image(self.world_seed))
        for call in self.writes:
            TOOLS[call.name].call(dict(call.arguments), shop)
        return shop.fingerprint()

    @property
    def instruction(self) -> str:
        """Return what the customer knows and wants, which is hidden from the agent until it is said."""
        lines = [f"I am {self.user_id}. Asked who I am, I say: {self.identity}"]
        for number, wish in enumerate(self.wishes, 1):
            known = " ".join(wish.facts.values())
            lines.append(f"{number}. {wish.says}" + (f" ({known})" if known else ""))
            if wish.declined:
                lines.append(f"   Asked to confirm, I say: {wish.confirms}")
        return "\n".join(lines)


@functools.lru_cache(maxsize=16)
def split_users(world_seed: int) -> dict[str, tuple[str, ...]]:
    """Return the users of each split: 60%, 20% and 20% of them, shuffled. No user is in two splits."""
    users = [row["user_id"] for row in Shop(shop_image(world_seed)).rows("SELECT user_id FROM users ORDER BY user_id")]
    random.Random(f"users {world_seed}").shuffle(users)
    cut, end = round(len(users) * SHARES["train"]), round(len(users) * (1 - SHARES["test"]))
    return {"train": tuple(users[:cut]), "validation": tuple(users[cut:end]), "test": tuple(users[end:])}


def draw_tasks(split: str, n: int, world_seed: int = 0, levels: Sequence[int] = LEVELS) -> list[ToolTask]:
    """Return the first ``n`` tasks of a split, all different, the levels in turn. A larger ``n`` begins with the same tasks.

    Every task asks for something that an agent who does nothing does not do: a change, a hand-over or an answer.
    """
    rng = random.Random(f"tasks {world_seed} {split} {list(levels)}")
    users = split_users(world_seed)[split]
    tasks, seen = [], set()
    for _ in range(200 * n):
        if len(tasks) == n:
            break
        task = _draw(rng, split, users, world_seed, levels[len(tasks) % len(levels)])
        if task is not None and task.instruction not in seen and (task.writes or task.outputs):
            seen.add(task.instruction)
            tasks.append(task)
    if len(tasks) < n:
        raise InputError(f"dataset.n is {n}, but the {split} split has no more than about {len(tasks)} tasks; lower it")
    return tasks


def _draw(rng: random.Random, split: str, users: Sequence[str], world_seed: int, level: int) -> ToolTask | None:
    """Return a task of a random user; None where its orders do not give as many wishes."""
    shop = Shop(shop_image(world_seed))
    user_id = rng.choice(users)
    other = rng.choice([user for user in users if user != user_id])
    others = [row["order_id"] for row in shop.rows("SELECT order_id FROM orders WHERE user_id = ? ORDER BY order_id", other)]
    desk = Desk(shop, rng, user_id, rng.random() < _KNOWS_ORDERS_PROB, others)
    human = rng.random() < _HUMAN_PROB
    known = shop.one("SELECT first_name, last_name, zip, email FROM users WHERE user_id = ?", user_id)  # before any change
    wishes: list[Wish] = []
    for _ in range(10 * level):
        if len(wishes) < level - human:
            _add_wish(desk, wishes, level, level - human)
    if len(wishes) < level - human:
        return None
    wishes += [need_a_human(desk)] * human
    identity, found = _identity(known, rng)
    moves = (Say("Please tell me your email address, or your first name, last name and zip code."), found)
    moves += tuple(move for wish in wishes for move in wish.moves)
    return ToolTask(world_seed, split, level, user_id, identity, tuple(wishes), moves)


def _add_wish(desk: Desk, wishes: list[Wish], level: int, most: int) -> None:
    """Draw one wish, or two that belong together, and carry them out: the next one starts from the shop after it."""
    kinds = HARD if level > 1 and desk.rng.random() < _HARD_PROB else PLAIN
    weights = [1 if kind in ALWAYS_FIT else _ORDER_WEIGHT for kind in kinds]
    try:
        drawn = desk.rng.choices(kinds, weights)[0](desk)
    except NothingFits:
        return
    drawn = [drawn] if isinstance(drawn, Wish) else drawn
    unknown = [wish for wish in drawn if wish.kind not in {one.kind for one in wishes}]
    if len(unknown) < len(drawn) or len(wishes) + len(drawn) > most:
        return  # a customer does not want the same twice
    for wish in drawn:
        for move in wish.moves:
            if isinstance(move, Call) and move.name in _WRITES:
                TOOLS[move.name].call(dict(move.arguments), desk.shop)
        wishes.append(wish)


def _identity(user: Mapping[str, str], rng: random.Random) -> tuple[str, Call]:
    """Return (what the customer says when asked who it is, the expert's call for it)."""
    if rng.random() < _EMAIL_PROB:
        return f"My email address is {user['email']}.", Call("find_user_by_email", {"email": user["email"]})
    known = {key: user[key] for key in ("first_name", "last_name", "zip")}
    said = f"My name is {user['first_name']} {user['last_name']}, my zip code is {user['zip']}."
    return said, Call("find_user_by_name_zip", known)


def expert_calls(task: ToolTask, arguments: bool) -> str:
    """Return the expert's calls, one a line, with their arguments or by name only."""
    return "\n".join(described(call) if arguments else call.name for call in task.calls)
