"""Put small errors into a module, one at a time, and print those that its tests do not notice.

    python tests/mutate.py accent_plugin/pooling.py tests/test_pooling.py

`make mutants` installs what it needs. Everything happens in a copy of the working tree; errors are drawn at random with
a fixed seed where there are more than `--most`.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# torch does not survive a fork of the process that has computed with it: a server that has only imported it forks.
CONFIG = """[mutmut]
source_paths={package}
only_mutate={module}
also_copy=
{others}
pytest_add_cli_args_test_selection=
{tests}
pytest_add_cli_args=
    -m
    not slow
    -p
    no:cacheprovider
    -p
    no:xdist
process_isolation=forkserver
timeout_constant=10
use_setproctitle=false
on_dependency_change=ignore
debug=true
use_git_change_detection=false
"""


def copy_tree(folder):
    """Copy what git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def names_of_mutants(module):
    """All errors that can be put into a module, as mutmut calls them."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    made = mutate_file_contents(str(module), module.read_text(encoding="utf-8"))
    return [get_mutant_name(module, name) for name in made.mutant_names]


def main():
    """Return mutmut's exit code where it failed; errors that are not noticed are for a person to judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--most", type=int, default=50, help="errors to try")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these again, by the names that were printed")
    given = parser.parse_args()
    mutmut = Path(sys.executable).with_name("mutmut")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy_tree(folder)
        package = given.module.parts[0]
        lists = {
            "others": [path.name for path in folder.iterdir() if path.name not in (package, "tests")],
            "tests": given.tests,
        }
        lists = {key: "\n".join(f"    {name}" for name in sorted(names)) for key, names in lists.items()}
        (folder / "setup.cfg").write_text(CONFIG.format(package=package, module=given.module, **lists))
        os.chdir(folder)
        names = names_of_mutants(given.module)
        chosen = given.only or sorted(random.Random(given.seed).sample(names, min(given.most, len(names))))
        run = subprocess.run([mutmut, "run", "--max-children", "1", *chosen], stdout=subprocess.PIPE, text=True)
        if run.returncode:
            print(run.stdout)
            return run.returncode
        results = subprocess.run([mutmut, "results"], capture_output=True, text=True, check=True).stdout
        states = dict(re.findall(r"(\S+): (.+)", results))
        left = {name: states[name] for name in chosen if name in states}
        for name in left:
            subprocess.run([mutmut, "show", name], check=True)
    print(f"{given.module}: {len(chosen)} of {len(names)} errors tried, {len(left)} not noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
