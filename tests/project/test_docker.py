"""What a build of the images would not show, read from the Dockerfile and the page: nothing here needs an engine."""

import json
import re
import threading
from fnmatch import translate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from helpers import ROOT, setup_argument

from accent_plugin.cli.parser import make_parser

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8")
TARGETS = ["gpu", "onnx", "cpu"]


def read_stages(text):
    """Stage -> its `base` and `steps`, pairs of an instruction and its argument, with lines joined as Docker does."""
    joined = re.sub(r"\\\n", "", re.sub(r"^\s*(#.*)?\n", "", text, flags=re.M))
    stages = {}
    for line in joined.splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            current = stages[name] = SimpleNamespace(base=base, steps=[])
        else:
            current.steps.append((word, rest))
    return stages


STAGES = read_stages(TEXT)
STEPS = [(name, *step) for name, stage in STAGES.items() for step in stage.steps]


def steps_of(name):
    """All steps of a stage and of those it stands on, from the ground up."""
    stage = STAGES.get(name)
    return [] if stage is None else [*steps_of(stage.base), *stage.steps]


def last(name, word):
    return [rest for step, rest in steps_of(name) if step == word][-1]


def copied():
    """Sources of the checkout, by name."""
    sources = [rest.split()[:-1] for _, word, rest in STEPS if word == "COPY" and not rest.startswith("--from=")]
    return {source for each in sources for source in each}


def is_ignored(path):
    """Whether .dockerignore keeps a path out: the last line that fits it or a folder above it decides."""
    found = False
    for line in IGNORED.splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        fits = re.compile(translate(pattern.removeprefix("**/")))
        depth = len(PurePosixPath(pattern).parts)
        for part in (PurePosixPath(path), *PurePosixPath(path).parents[:-1]):
            if fits.match(part.name) if anywhere else len(part.parts) == depth and fits.match(str(part)):
                found = not line.startswith("!")
    return found


# --------------------------------------------------------------------------------------------------- what goes into it


def test_every_module_is_sent_and_nothing_else_of_a_checkout():
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "accent_plugin").rglob("*.py")]
    assert modules and not [path for path in modules if is_ignored(path)]
    for path in (".git", ".git/config", ".venv/bin/python", "data/demo/corpus", "results", "tests/conftest.py", ".env"):
        assert is_ignored(path)
    for path in (
        "accent_plugin/__pycache__",
        "accent_plugin/__pycache__/cli.cpython-312.pyc",
        "accent_plugin/cli/main.pyc",
    ):
        assert is_ignored(path)
    kept = {path.name for path in ROOT.iterdir() if not is_ignored(path.name)}
    assert kept == {PurePosixPath(source).parts[0] for source in copied()}


def test_the_default_image_is_for_processors():
    assert list(STAGES)[-1] == "cpu"


def test_versions_are_those_that_are_tested():
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", STAGES["base"].base)
    parts = [part for _, word, rest in STEPS if word == "RUN" for part in rest.split("&&")]
    installs = [part for part in parts if "uv pip install" in part]
    assert installs
    for line in installs:
        assert "--constraints constraints.txt" in line or "--no-deps" in line
    assert [part for part in parts if part.startswith("pip install") and re.search(r" uv==\d\S+$", part)]


def test_only_the_image_for_processors_asks_for_pytorchs_builds_for_them():
    assert ("ENV", "UV_TORCH_BACKEND=cpu") in STAGES["build-cpu"].steps
    assert ("ARG", "UV_TORCH_BACKEND") in STAGES["build-gpu"].steps
    assert not any("UV_TORCH_BACKEND" in rest for name, _, rest in STEPS if name not in ("build-cpu", "build-gpu"))


def test_the_image_without_torch_has_what_the_page_on_onnx_says():
    page = (ROOT / "docs/exchange.md").read_text(encoding="utf-8")
    (packages,) = re.findall(r"pip install -c constraints\.txt (onnxruntime .*)", page)
    (line,) = (rest for word, rest in STAGES["build-onnx"].steps if word == "RUN")
    assert set(packages.split()) < set(line.split())
    assert steps_of("build-onnx")[-1][1] == line


# ----------------------------------------------------------------------------------------------------------- what runs


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_not_run_as_root(target):
    user, group = last(target, "USER").split(":")
    assert int(user) > 999 and int(group) > 999
    made = " ".join(rest for word, rest in steps_of(target) if word == "RUN")
    assert f"--uid {user}" in made and f"--gid {group}" in made
    # Files are copied as root's, so that what runs cannot change them.
    assert not any("--chown" in rest or "--chmod" in rest for _, _, rest in STEPS)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_no_compiler_and_no_cache(target):
    for word, rest in steps_of(target):
        if word == "RUN":
            assert not re.search(r"\b(pip|uv|gcc|g\+\+|build-essential|curl|wget|git)\b", rest)
            if "apt-get install" in rest:
                assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
                assert rest.index("apt-get clean") > rest.index("apt-get install")
    assert STAGES[target].base == "runtime" and STAGES["runtime"].base == "base"
    assert all(word == "COPY" and rest.startswith("--from=") for word, rest in STAGES[target].steps)


def test_no_image_holds_a_secret_or_downloads_by_itself():
    assert not any("TOKEN" in rest or word == "ADD" for _, word, rest in STEPS)
    variables = dict(part.split("=", 1) for part in last("cpu", "ENV").split())
    assert variables["HOME"] == "/tmp" and variables["HF_HUB_OFFLINE"] == variables["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_started_is_a_command_of_this_package(target):
    entry, command = json.loads(last(target, "ENTRYPOINT")), json.loads(last(target, "CMD"))
    # The exec form, and an init that hands signals on.
    assert entry[:2] == ["tini", "--"] and "tini" in " ".join(rest for word, rest in steps_of(target) if word == "RUN")
    scripts = setup_argument("entry_points")["console_scripts"]
    assert f"{entry[2]}=accent_plugin.cli.main:main" in scripts and len(entry) == 3
    given = make_parser().parse_args(command)
    assert (given.host, str(given.port), given.model) == ("0.0.0.0", last(target, "EXPOSE"), "/model")
    assert given.token is None


# ---------------------------------------------------------------------------------------------------------- its health


@pytest.fixture
def server():
    """A server whose `status` can be set, and what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            running.asked.append(self.path)
            self.send_response(running.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.status = [], 200
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_the_check_of_health_asks_the_server_and_no_proxy(server, monkeypatch):
    given = re.fullmatch(r"((?:--\S+ +)+)CMD (.*)", last("cpu", "HEALTHCHECK"))
    python, option, code = json.loads(given[2])
    assert (python, option) == ("python", "-c")
    place = f"http://127.0.0.1:{last('cpu', 'EXPOSE')}/"
    assert place in code
    code = code.replace(place, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    exec(code, {})
    assert server.asked == ["/api/health"]
    server.status = 503
    with pytest.raises(OSError, match="503"):
        exec(code, {})


# --------------------------------------------------------------------------------------------------------- what is said


def test_the_page_builds_and_runs_what_is_there():
    built = re.findall(r"docker build .*?--target (\S+) .*?-t (\S+)", PAGE)
    assert {target for target, _ in built} == set(TARGETS)
    assert set(re.findall(r"\baccent-plugin:\w+", PAGE)) == {name for _, name in built}
    assert set(re.findall(r"\b127\.0\.0\.1:\d+:(\d+)", PAGE)) == {last("cpu", "EXPOSE")}
    assert set(re.findall(r"build-arg (\w+)=", PAGE + TEXT)) <= {rest for _, word, rest in STEPS if word == "ARG"}
    assert "-e ACCENT_PLUGIN_TOKEN" in PAGE


def test_commands_behind_an_images_name_exist():
    text = PAGE.replace("\\\n", " ")
    found = re.findall(r"^    docker run .*accent-plugin:\w+ +(\S.*)$", text, flags=re.M)
    commands = [line.split() for line in found]
    verbs = [words for words in commands if words[0] != "train.py"]
    for words in verbs:
        assert make_parser().parse_args(words).model == "/model"
    assert verbs and len(verbs) < len(commands)


@pytest.mark.parametrize("text", [TEXT, PAGE, IGNORED], ids=["Dockerfile", "docker.md", ".dockerignore"])
def test_no_registry_is_named(text):
    assert not re.findall(r"\b[\w-]+\.(?:org|com|io|net|dev)\b(?!\.)", text)
    assert not re.search(r"index-url|find-links|://(?!127\.0\.0\.1)", text)
