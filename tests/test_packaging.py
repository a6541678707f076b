"""The Makefile, and the wheel: built from the sdist, installed beside the dependencies of this environment, and
run from there.

`mlxmoe/metal`, `mlxmoe/convert` and `mlxmoe/bench` are links to folders at the top; another build backend may leave
them out without a word.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

import mlxmoe

ROOT = Path(__file__).resolve().parents[1]
CODE = {"mlxmoe": ROOT / "mlxmoe", "mlxmoe/convert": ROOT / "convert", "mlxmoe/bench": ROOT / "bench"}
DATA = {"mlxmoe/metal": ROOT / "metal", "mlxmoe/demo": ROOT / "mlxmoe" / "demo"}
# import name: distribution, where they differ
DISTRIBUTIONS = {"mlx_lm": "mlx-lm", "huggingface_hub": "huggingface-hub", "prompt_toolkit": "prompt-toolkit"}


class Installed(NamedTuple):
    sdist: Path
    wheel: Path
    bin: Path  # the environment's python and mlxmoe


def run(*command: str | Path, cwd: Path) -> str:
    """Stdout of a command that must succeed, without what would lead it back to this checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Builds from a copy, so that nothing is left in the tree, and without isolation, so without a network."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave_out)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    (site,) = environment.glob("lib/python*/site-packages")
    # The dependencies come from here. What a .pth names is searched last, and its own .pth files, an editable install
    # among them, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return Installed(sdist, wheel, environment / "bin")


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != ".DS_Store"
    }


def test_runs_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    script = (
        "import mlxmoe, mlxmoe.bench.cli, mlxmoe.convert.cli\n"
        "from importlib.resources import files\n"
        "modules = mlxmoe, mlxmoe.convert.cli, mlxmoe.bench.cli\n"
        "print(*(module.__file__ for module in modules), files('mlxmoe') / 'metal', sep='\\n')\n"
    )
    package = next((installed.bin.parent / "lib").glob("python*")) / "site-packages" / "mlxmoe"
    paths = run(installed.bin / "python", "-c", script, cwd=tmp_path).splitlines()
    assert paths == [str(package / name) for name in ("__init__.py", "convert/cli.py", "bench/cli.py", "metal")]


def test_version(installed: Installed, tmp_path: Path) -> None:
    assert run(installed.bin / "mlxmoe", "--version", cwd=tmp_path) == f"mlxmoe {mlxmoe.__version__}\n"


@pytest.mark.parametrize("command", ["chat", "convert"])
def test_help(installed: Installed, tmp_path: Path, command: str) -> None:
    assert run(installed.bin / "mlxmoe", command, "--help", cwd=tmp_path).startswith(f"usage: mlxmoe {command} ")


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_holds_everything(installed: Installed, kind: str) -> None:
    """Every module, every file of metal/ and of the demo model; as files, not as links that lead nowhere."""
    if kind == "wheel":
        with zipfile.ZipFile(installed.wheel) as archive:
            held = {name for name in archive.namelist() if not name.endswith("/")}
    else:
        with tarfile.open(installed.sdist) as tar:
            held = {member.name.partition("/")[2] for member in tar.getmembers() if member.isreg()}
    expected = {"mlxmoe/py.typed", "mlxmoe/prompts.jsonl"}
    for place, folder in CODE.items():
        expected |= {f"{place}/{path.name}" for path in folder.glob("*.py")}
    for place, folder in DATA.items():
        if folder.is_dir():
            expected |= {f"{place}/{name}" for name in files(folder)}
    assert "mlxmoe/metal/README.md" in expected
    assert expected - held == set()
    if kind == "wheel":
        beside = {name for name in held - expected if ".dist-info/" not in name}
        assert beside == set(), "the wheel holds what the package does not"
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


def test_metadata_names_what_the_code_imports(installed: Installed) -> None:
    """A dependency that only comes along with another one may stop doing so."""
    with zipfile.ZipFile(installed.wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == mlxmoe.__version__
    always, extras = set(), set()
    for line in metadata.get_all("Requires-Dist", []):
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-")
        if "extra ==" not in line:
            always.add(name)
        elif not re.search(r"extra == ['\"](dev|vectors)['\"]", line):
            extras.add(name)
    for folder in CODE.values():
        for path in folder.glob("*.py"):
            used = {DISTRIBUTIONS.get(name, name) for name in imports(path, inside=False)}
            missing = used - sys.stdlib_module_names - {"mlxmoe"} - always
            assert not missing, f"{path.name} imports {missing}, which pyproject.toml does not require"
            # What an extra brings is imported where it is used, so that the rest works without it
            used = {DISTRIBUTIONS.get(name, name) for name in imports(path, inside=True)}
            missing = used - sys.stdlib_module_names - {"mlxmoe"} - always - extras
            assert not missing, f"{path.name} imports {missing}, which neither pyproject.toml nor an extra requires"


def imports(path: Path, inside: bool) -> set[str]:
    """Packages that a module imports when it is imported itself; with `inside` those of its functions and classes too."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


# -- the Makefile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile beside an environment that is set up, whose python prints its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    script(tmp_path / ".venv" / "bin" / "python", 'printf "<%s>" "$@"')
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PROMPT", "PYTHON"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=60)


PROMPTS = [
    "Once upon a time",
    'it\'s "quoted"',
    "$5 and $HOME, $(ls) ${PATH} $$ `id`",
    "100 % # no; comment | & > x",
    "back\\slash \\n",
    "two\nlines",
    "naïve 日本語 🙂",
    "--help",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_it_was_written(checkout: Path, prompt: str) -> None:
    expected = f"<-m><mlxmoe><chat><--prompt={prompt}>"
    assert make(checkout, "chat", f"PROMPT={prompt}").stdout == expected
    assert make(checkout, "chat", PROMPT=prompt).stdout == expected


def test_a_prompt_is_not_run(checkout: Path) -> None:
    """make expands what it exports: the raw prompt must not be exported under its own name."""
    make(checkout, "chat", "PROMPT=$(shell touch was-run)")
    assert not (checkout / "was-run").exists()


def test_without_a_prompt(checkout: Path) -> None:
    done = make(checkout, "chat")
    assert (done.stdout, done.stderr) == ("<-m><mlxmoe><chat>", "")


def test_set_up_again_only_when_the_requirements_change(checkout: Path) -> None:
    os.utime(checkout / "pyproject.toml", (2e9, 2e9))
    done = make(checkout, "chat")
    assert done.stdout == "<-m><mlxmoe><chat>"  # what pip says goes to stderr
    assert "<pip>" in done.stderr
    assert "<--editable><.>" in done.stderr


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("exit 1", "mlxmoe needs Python 3.11 or newer"),
        ('case "$2" in *darwin*) exit 1;; esac', "mlxmoe needs an Apple Silicon Mac"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "apt-get install python3-venv"),
    ],
)
def test_a_python_that_will_not_do(checkout: Path, python: str, words: str) -> None:
    shutil.rmtree(checkout / ".venv")
    done = make(checkout, "chat", f"PYTHON={script(checkout / 'a python', python)}")
    said, failed = done.stderr.splitlines()
    assert done.returncode == 2
    assert words in said
    assert failed.startswith("make: ***")
    assert not (checkout / ".venv").exists()


def test_the_oldest_python_is_said_once() -> None:
    """The Makefile checks what pyproject.toml requires."""
    (required,) = re.findall(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    text = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"version_info < \(3, (\d+)\)", text)) == {required}
    assert f"Python 3.{required} or newer" in text
