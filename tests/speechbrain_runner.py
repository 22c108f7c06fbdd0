#!/usr/bin/env python3
"""Run SpeechBrain's own recipe tests on this recipe: `python tests/speechbrain_runner.py SPEECHBRAIN_CHECKOUT`.

Its `recipe_tests.py` runs every row of the register in place, as it stands here; its consistency tests run on a copy of
its tree with the recipe laid over it. Exits with 0 where all pass.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from helpers import register

RUN = "import sys; from tests.utils.recipe_tests import run_recipe_tests as run; sys.exit(0 if run() else 1)"


def run_rows(checkout, environment):
    """Every row of the register with SpeechBrain's runner; whether all passed."""
    register.make_samples()
    # Its module is called tests.utils.recipe_tests, and this tree has a folder called tests, too.
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(checkout / "tests/utils", Path(place) / "tests/utils")
        (Path(place) / "tests/__init__.py").touch()
        done = subprocess.run([sys.executable, "-c", RUN], cwd=register.ROOT, env=environment | {"PYTHONPATH": place})
    for number, row in enumerate(register.rows(), start=2):
        folder = register.command(row, number)[2]
        errors = (folder / "stderr.txt").read_text(encoding="utf-8") if (folder / "stderr.txt").is_file() else "not run"
        if not (folder / ".passed").is_file():
            print(f"FAILED {row['Hparam_file']}\n{errors[-2000:]}")
    return done.returncode == 0


def run_consistency(checkout, environment):
    """SpeechBrain's consistency tests with this recipe in its tree; whether all passed."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        shutil.copytree(checkout, tree, symlinks=True, ignore=shutil.ignore_patterns(".git"))
        # With links followed, as a copy into their repository would be made.
        recipe = Path("recipes") / register.REGISTER.stem
        shutil.copytree(register.ROOT / recipe, tree / recipe, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(register.REGISTER, tree / "tests/recipes")
        # The others of that folder need a network, or every optional package of SpeechBrain.
        tests = ["tests/consistency/test_recipe.py", "tests/consistency/test_yaml.py"]
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(words, cwd=tree, env=environment).returncode == 0


def main(arguments):
    """Run both; return the exit code."""
    if len(arguments) != 1 or not Path(arguments[0], "tests/utils/recipe_tests.py").is_file():
        print(__doc__, file=sys.stderr)
        return 2
    checkout = Path(arguments[0]).resolve()
    # The runner calls `python`: it has to be this one.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    passed = {"recipe_tests.py": run_rows(checkout, environment), "consistency": run_consistency(checkout, environment)}
    for name, good in passed.items():
        print(f"{name}: {'passed' if good else 'FAILED'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
