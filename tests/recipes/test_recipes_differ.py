"""Test that two recipes have the same methods in the same order, and the same bodies but where a list names them."""

import ast

from tests.support.runs import ROOT

# Methods that one of the two has alone, and why.
PI_DISTILL_ALONE = {"sampling_teacher"}  # at α=0 the teacher's weights sample
OPSD_ALONE = {"sample_groups", "guide_failed_groups", "dataset_completions"}  # Guide-GRPO; GKD
# Methods of both whose bodies differ: which parts there are, who samples, and whose weights did.
DIFFERENT = {"setup", "sample_round", "sample_from", "score_behaviour"}
# Names that differ wherever they stand.
CLASSES = {"PiDistillRecipe", "OPSDRecipe"}


def functions(name: str) -> dict[str, str]:
    """The functions of a recipe, in its order: name → what it does, whatever its comments say."""
    tree = ast.parse((ROOT / "recipes" / f"{name}_distributed.py").read_text())
    found = {node.name: ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    (recipe,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Recipe")]
    order = [node.name for node in (*recipe.body, *tree.body) if isinstance(node, ast.FunctionDef)]
    return {name: found[name] for name in order}


def test_pi_distill_and_opsd_have_the_same_methods_in_the_same_order():
    ours, theirs = list(functions("pi_distill")), list(functions("opsd"))
    assert set(ours) - set(theirs) == PI_DISTILL_ALONE and set(theirs) - set(ours) == OPSD_ALONE
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


def test_the_bodies_of_pi_distill_and_opsd_differ_in_the_named_methods_only():
    ours, theirs = functions("pi_distill"), functions("opsd")
    for body in (ours, theirs):
        for name in CLASSES:
            body["recipe_main"] = body["recipe_main"].replace(name, "Recipe")
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == DIFFERENT


def test_the_sft_recipe_has_the_methods_of_the_others_in_their_order():
    """It has no round: demonstrations take the place of what others sample."""
    ours, theirs = list(functions("sft")), list(functions("pi_distill"))
    assert set(ours) - set(theirs) == {"next_demonstrations"}
    assert [name for name in theirs if name in ours] == [name for name in ours if name != "next_demonstrations"]


def test_a_recipe_stays_short_enough_to_be_read():
    lines = {
        name: len((ROOT / "recipes" / f"{name}_distributed.py").read_text().splitlines()) for name in ("pi_distill", "opsd")
    }
    assert lines["pi_distill"] <= 220 and lines["opsd"] <= 260
