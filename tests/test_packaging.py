"""Test what a package index and an installer get: the readme's links, the version of the git tags, sdist and wheel."""

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
readme_for_index = runpy.run_path(str(ROOT / "setup.py"))["readme_for_index"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELATIVE = re.compile(r"\]\((?!https?:)[^)]*\)")


def test_relative_links_lead_to_the_source_and_others_stay():
    text = "[page](docs/a.md#part) ![picture](docs/b.png) [web](https://x.org/y) [here](#top)"
    assert readme_for_index(text, "https://forge/o/p/") == (
        "[page](https://forge/o/p/blob/HEAD/docs/a.md#part) ![picture](https://forge/o/p/raw/HEAD/docs/b.png) "
        "[web](https://x.org/y) [here](#top)"
    )


def test_without_a_source_the_words_of_relative_links_stay_and_pictures_go():
    text = "[page](docs/a.md) ![picture](docs/b.png) [web](https://x.org/y)"
    assert readme_for_index(text, None) == "page  [web](https://x.org/y)"


@pytest.mark.parametrize("source", ["https://forge/o/p", None])
def test_no_link_of_the_packaged_readme_is_relative(source):
    assert len(RELATIVE.findall(README)) > 8
    assert not RELATIVE.findall(readme_for_index(README, source))


def make(folder: Path, target: str, training: str) -> subprocess.CompletedProcess[str]:
    """Run a target of the Makefile in ``folder``, with a shell command in place of the recipes; it gets their words."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / ".venv" / ".installed").touch()
    (folder / "training.sh").write_text(training)
    words = ["make", "-s", target, "TUNE=sh training.sh"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def save_step(folder: Path, step: int, latest: bool = True) -> None:
    """Leave a step's config.json in the folder of a run, with `latest` pointing to it."""
    (folder / f"step_{step}").mkdir(parents=True)
    (folder / f"step_{step}" / "config.json").touch()
    if latest:
        (folder / "latest").symlink_to(f"step_{step}")


BASES = {"base": ["base"], "base_easy": ["base_easy"], "base_world": ["base_world"], "bases": ["base", "base_1", "base_2"]}
TRAINS = 'for word; do case $word in output_dir=*) d=${word#*=};; esac; done; echo "$d $*" >> trained\n'
SAVES = "rm -f $d/latest; mkdir -p $d/step_700; touch $d/step_700/config.json; ln -s step_700 $d/latest\n"
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", BASES)
def test_a_base_whose_training_was_interrupted_is_trained_on_and_a_complete_one_is_not(target, tmp_path):
    folders = [tmp_path / "runs" / "tiny" / name for name in BASES[target]]
    for folder in folders:
        save_step(folder, 60)
    assert make(tmp_path, target, TRAINS + SAVES).returncode == 0
    trained = (tmp_path / "trained").read_text().splitlines()
    assert [line.split()[0] for line in trained] == [str(folder.relative_to(tmp_path)) for folder in folders]
    assert all(line.endswith("resume_from_checkpoint=auto") for line in trained)
    assert make(tmp_path, target, TRAINS + SAVES).returncode == 0
    assert (tmp_path / "trained").read_text().splitlines() == trained, "they were complete"


@needs_make
def test_a_copy_of_a_base_without_its_steps_is_not_trained(tmp_path):
    (tmp_path / "runs" / "tiny" / "base" / "latest").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "base" / "latest" / "config.json").touch()
    assert make(tmp_path, "base", TRAINS).returncode == 0 and not (tmp_path / "trained").exists()


@needs_make
@pytest.mark.parametrize("earlier", [False, True])
def test_a_complete_base_whose_link_is_lost_or_at_an_earlier_step_gets_it_back_without_training(earlier, tmp_path):
    folder = tmp_path / "runs" / "tiny" / "base"
    save_step(folder, 700, latest=False)
    if earlier:
        save_step(folder, 60)
    assert make(tmp_path, "base", TRAINS).returncode == 0 and not (tmp_path / "trained").exists()
    assert (folder / "latest").readlink() == Path("step_700")


@needs_make
def test_a_training_that_a_signal_ends_with_status_0_stops_make(tmp_path):
    save_step(tmp_path / "runs" / "tiny" / "base", 60)
    done = make(tmp_path, "base", TRAINS)
    assert done.returncode and "runs/tiny/base is not trained to its last step; run make again" in done.stderr


def test_the_last_step_that_the_makefile_looks_for_is_that_of_the_base_s_config():
    steps = re.search(r"^max_steps: (\d+)$", (ROOT / "configs" / "tiny" / "base.yaml").read_text(), re.MULTILINE)[1]
    assert set(re.findall(r"step_(\d+)", (ROOT / "Makefile").read_text())) == {steps}
    assert "\noutput_dir: runs/tiny/base\n" in (ROOT / "configs" / "tiny" / "base.yaml").read_text()


def run(*command: str, cwd: Path, **environment: str) -> str:
    # What the machine's git is set to, and a checkout around the folder, change nothing.
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


BUILD = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def build_sdist(source: Path, into: Path) -> tuple[email.message.Message, Path, list[str]]:
    """Return the metadata, the file and the names in it."""
    run(sys.executable, "-c", BUILD, "build_sdist", str(into), cwd=source)
    (path,) = into.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        metadata = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    return email.message_from_string(metadata), path, names


@pytest.mark.slow
def test_the_sdist_has_the_version_of_the_tag_and_installs_without_git(tmp_path):
    pytest.importorskip("setuptools_scm", reason="setuptools-scm, of the extra test, is not installed")
    source = tmp_path / "source"
    outside = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "site", "build", "dist")
    shutil.copytree(ROOT, source, ignore=outside)

    metadata, _, names = build_sdist(source, tmp_path / "plain")
    assert metadata["Version"] == "0.1.dev0"  # neither tag nor git
    assert {"recipes/opsd_distributed.py", "configs/tiny/opsd.yaml", "pidistill/py.typed", "setup.py"} <= set(names)

    shutil.rmtree(source / "pidistill.egg-info")
    who = ("-c", "user.name=n", "-c", "user.email=e@x")
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "All"]):
        run("git", *words, cwd=source)
    metadata, _, _ = build_sdist(source, tmp_path / "untagged")
    assert re.fullmatch(r"0\.1\.dev1\+g\w+", metadata["Version"])
    run("git", *who, "tag", "v9.8.7", cwd=source)
    metadata, path, names = build_sdist(source, tmp_path / "tagged")
    assert metadata["Version"] == "9.8.7"
    assert metadata["Description-Content-Type"] == "text/markdown" and "privileged information" in metadata.get_payload()
    assert not RELATIVE.findall(metadata.get_payload())
    assert {"recipes/opsd_distributed.py", "configs/tiny/opsd.yaml", "docs/running.md", "tests/test_packaging.py"} <= set(names)

    # The wheel of the sdist, made and installed where no checkout is.
    installed = tmp_path / "installed"
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(sys.executable, "-m", "pip", "install", *flags, "--target", str(installed), str(path), cwd=tmp_path)
    program = "import sys, pidistill.commands.main as m; print(m.__file__); m.main()"
    for words, expected in ((["--version"], "pidistill 9.8.7"), (["ls"], "tiny/pi_distill")):
        shown = run(sys.executable, "-c", program, *words, cwd=tmp_path, PYTHONPATH=str(installed))
        assert str(installed) in shown and expected in shown
