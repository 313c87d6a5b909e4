"""The Python entry points that the package documents run as they are written."""

import re
import textwrap

import pidistill
from tests.support.runs import metrics, save_config, small_config, weights


def documented_code() -> str:
    """Return the indented block of the package's docstring that begins with an import."""
    (block,) = re.findall(
        r"\n((?: {4}\S.*\n|\n(?= {4}))+)", pidistill.__doc__[pidistill.__doc__.index("    from omegaconf") - 1 :]
    )
    return textwrap.dedent(block)


def test_the_documented_code_trains_a_run(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    cfg = small_config("pi_distill", tiny_base, tmp_path / "run", max_steps=2)
    save_config(cfg, tmp_path / "configs" / "tiny" / "pi_distill.yaml")
    monkeypatch.chdir(tmp_path)
    code = documented_code()
    assert "recipe.train()" in code and "recipe.cleanup()" in code
    exec(compile(code, "pidistill.__doc__", "exec"), {})
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2]
    assert weights(tmp_path / "run")
