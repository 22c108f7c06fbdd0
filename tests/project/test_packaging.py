"""The package as others install it: what it declares, what it needs, and what a wheel of it holds."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from shutil import copy, copytree, ignore_patterns
from types import SimpleNamespace

import pytest
from helpers import ROOT, setup_argument
from helpers import dataset_dicts as made
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import accent_plugin

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "accent_plugin").rglob("*.py")
    if path.stem != "__main__"
)
# `serve` imports it, and says which extra is missing.
WITH_AN_EXTRA = {"accent_plugin.serving.api", "accent_plugin.serving.guard"}
# Extras of those who work on the package.
NOT_FOR_USERS = {"test", "lint", "bench"}


# As setup.py gives them; what is installed may be older.
EXTRAS = setup_argument("extras_require")
DECLARED = SimpleNamespace(
    required=setup_argument("install_requires"),
    optional=[line for name, lines in EXTRAS.items() if name not in NOT_FOR_USERS for line in lines],
)
# Name in an import -> distributions that have it.
PROVIDERS = {
    module: {canonicalize_name(name) for name in names}
    for module, names in importlib.metadata.packages_distributions().items()
}


def names_of(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported(node, deferred=False):
    """Yield the package of each import under a node, and whether it is in a function, so that it may be absent."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.partition(".")[0], deferred
        yield from imported(child, deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_is_declared(module):
    required, optional = names_of(DECLARED.required), names_of(DECLARED.optional)
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for package, deferred in sorted(set(imported(tree))):
        if package in sys.stdlib_module_names or package == "accent_plugin":
            continue
        deferred = deferred or module in WITH_AN_EXTRA
        allowed = required | optional if deferred else required
        assert PROVIDERS.get(package, {canonicalize_name(package)}) & allowed, (
            f"{module} imports {package}, which setup.py does not {'declare' if deferred else 'require'}"
        )


# ---------------------------------------------------------------------------------- with what is required, and no more


def installed_with(requirements):
    """Distributions that come with these: they, what they require, and so on."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in found:
                continue
            found.add((name, extra))
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # of another platform
            for needed in map(Requirement, lines):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in found}


ALONE = """
import importlib, json, sys
from importlib.machinery import PathFinder

hidden, modules, calls = json.load(sys.stdin)

class Declared(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Declared

def outcome(act, *arguments):
    try:
        act(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found = {module: outcome(importlib.import_module, module) for module in modules}
for call in calls:
    found[call] = outcome(eval, f"accent_plugin.{call}", {"accent_plugin": sys.modules["accent_plugin"]})
print(json.dumps(found))
"""
# What asks for a package of an extra -> its error without.
CALLS = {
    "encoder.lora.require_peft()": "EncoderError: .*pip install 'accent_plugin[lora]'",
    "training.options.make_tensorboard_logger(True, 'logs')": "ConfigError: .*pip install tensorboard",
    "corpus.synthetic.espeak()": "DataError: .*pip install accent_plugin[synthetic]",
    "serving.server._make(None, '', None, None, False, True, '')": "ConfigError: .*pip install 'accent_plugin[serve]'",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Module or call -> its error, or None, in a process that finds nothing but what `pip install` brings."""
    there = installed_with(DECLARED.required)
    hidden = sorted(module for module, names in PROVIDERS.items() if not names & {*there, "accent-plugin"})
    run = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=json.dumps([hidden, MODULES, list(CALLS)]),
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({*MODULES} - WITH_AN_EXTRA))
def test_a_module_is_imported_without_extras(alone, module):
    assert alone[module] is None


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_what_needs_an_extra_says_which(alone, call):
    start, _, end = CALLS[call].partition(".*")
    assert alone[call] and alone[call].startswith(start) and alone[call].endswith(end)


# -------------------------------------------------------------------------------------------------------------- built


def run(*command, cwd, **variables):
    """Standard output of a command that must succeed, without this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, the wheel made from it, and the wheel made from the checkout."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "checkout"
    # Of a copy: setuptools writes beside its sources.
    for name in ("accent_plugin", "tests", "recipes", "hparams"):
        made_by_runs = ("data", "results") if name == "recipes" else ()
        copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore_patterns("__pycache__", *made_by_runs))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--no-isolation", tree]
    run(*build, "--outdir", folder / "sdist", cwd=folder)
    run(*build, "--outdir", folder / "direct", "--wheel", cwd=folder)
    (sdist,), (wheel,) = (folder / "sdist").glob("*.tar.gz"), (folder / "sdist").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return SimpleNamespace(sdist=sdist, wheel=wheel, direct=direct)


def content(wheel):
    """Name -> bytes of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_no_more(built):
    package = (path for path in (ROOT / "accent_plugin").rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in package if path.parent.name != "__pycache__"}
    assert {name for name in content(built.wheel) if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_sdist_and_the_checkout_make_the_same_wheel(built):
    assert content(built.wheel) == content(built.direct)


@pytest.mark.slow
def test_a_wheel_has_the_licence(built):
    files = content(built.wheel)
    (licence,) = (name for name in files if name.endswith(".dist-info/licenses/LICENSE"))
    assert files[licence] == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_sdist_has_no_half_of_the_tests(built):
    """setuptools would put test_*.py in it, without what they import."""
    with tarfile.open(built.sdist) as archive:
        assert not [name for name in archive.getnames() if "/tests" in name]


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory):
    """A new environment with the wheel in it, which borrows what this one has of all else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True, symlinks=os.name != "nt")
    where = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    scripts = sysconfig.get_path("scripts", "venv", where)
    python = os.path.join(scripts, "python")
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", built.wheel, cwd=folder)
    # A folder named so gives its packages, but its own .pth files, such as an editable install's, are not read.
    site = sysconfig.get_path("purelib", "venv", where)
    borrowed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    with open(os.path.join(site, "borrowed.pth"), "w", encoding="utf-8") as file:
        file.write("\n".join(sorted(borrowed)) + "\n")
    empty = folder / "empty"
    empty.mkdir()
    command = os.path.join(scripts, "accent-plugin")
    return SimpleNamespace(python=python, command=command, site=site, empty=empty)


@pytest.mark.slow
def test_an_installed_package_needs_no_checkout(fresh):
    code = "import accent_plugin.training.brain; print(accent_plugin.__file__)"
    assert run(fresh.python, "-c", code, cwd=fresh.empty).startswith(fresh.site)


@pytest.mark.slow
def test_the_installed_command_tells_its_version(fresh):
    assert run(fresh.command, "--version", cwd=fresh.empty).startswith(f"accent_plugin {accent_plugin.__version__}\n")


@pytest.mark.slow
def test_the_installed_command_helps(fresh):
    assert run(fresh.command, "--help", cwd=fresh.empty).startswith("usage: accent-plugin")


@pytest.mark.slow
def test_the_recipe_runs_with_the_installed_package(fresh, tiny_encoder, tmp_path):
    """From a checkout that lacks the package, so that none but the installed one can be taken."""
    for name in ("recipes", "hparams"):
        ignored = ignore_patterns("__pycache__", "data", "results")
        copytree(ROOT / name, tmp_path / "checkout" / name, symlinks=True, ignore=ignored)
    accents = ("us", "england", "scotland")
    corpus = made.save(tmp_path / "corpus", **made.three_splits(accents, clients=(4, 2, 2)))
    command = [
        *(fresh.python, "train.py", "hparams/wav2vec2_base.yaml", "--data_folder", corpus),
        *("--output_folder", tmp_path / "out", "--accents", f"[{', '.join(accents)}]"),
        *("--wav2vec2_hub", tiny_encoder("wav2vec2-group"), "--num_workers", "0", "--number_of_epochs", "1"),
        *("--device", "cpu", "--noprogressbar", "--prepared_folder", tmp_path / "prepared"),
    ]
    run(*command, cwd=tmp_path / "checkout/recipes/CommonVoiceAccent")
    assert (tmp_path / "out/report/report.md").is_file()
