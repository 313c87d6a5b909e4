"""Name the checker behind jaxtyping under pytest; like Python's own type rules, it takes an int where a float is annotated."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
