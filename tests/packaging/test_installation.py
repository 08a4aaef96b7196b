"""The installed distribution: the command, its start-up cost, and libraries that must import together."""

import importlib.metadata
import json
import resource
import subprocess
import sys

import pytest

HEAVY = (
    "torch", "diffusers", "transformers", "hydra", "omegaconf", "pandas", "matplotlib", "submitit", "scipy",
)  # fmt: skip
MAX_HELP_CPU_S = 0.5


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_command_and_subcommands_are_registered() -> None:
    """The console command exists, and each layer that has subcommands registers them."""
    distribution = importlib.metadata.distribution("fewstep")
    scripts = distribution.entry_points.select(group="console_scripts")
    assert {entry.name: entry.value for entry in scripts} == {"fewstep": "experiments.cli:main"}
    commands = distribution.entry_points.select(group="fewstep.commands")
    assert {entry.name for entry in commands} == {"experiments", "ablations", "slurm", "analysis"}
    assert all(callable(entry.load()) for entry in commands)


def test_help_starts_quickly() -> None:
    """``fewstep --help`` costs less than 0.5 s of CPU time (the best of three: bytecode may be cold)."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run_python("from experiments.cli import main; main(['--help'])")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0, result.stderr
        assert "usage: fewstep" in result.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < MAX_HELP_CPU_S


def loaded_after(code: str) -> list[str]:
    """The large libraries that are loaded once ``code`` has run in a fresh interpreter."""
    report = f"\nimport json, sys\nprint('\\n' + json.dumps(sorted(set(sys.modules) & set({HEAVY!r}))))"
    result = run_python(code + report)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_help_imports_nothing_heavy() -> None:
    """The help of the command and of every subcommand needs none of the large libraries."""
    code = """
import contextlib
from experiments.cli import build_parser, main
from experiments.parser import commands
for words, _ in commands(build_parser()):
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
"""
    assert loaded_after(code) == []
    assert loaded_after("import torch") == ["torch"]


@pytest.mark.parametrize("package", ["ablations", "analysis"])
def test_package_imports_without_torch(package: str) -> None:
    """Importing every module of a torch-free layer leaves torch unloaded, through libraries too."""
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
sys.exit("torch" in sys.modules)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_heavy_libraries_import_together() -> None:
    """torch and torchvision belong to one build (operators register), beside open_clip and clean-fid."""
    code = """
import torch, torchvision, open_clip
from cleanfid import fid
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [4.0, 4.0, 5.0, 5.0]])
print(torchvision.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.1]), 0.5).tolist())
"""
    result = run_python(code)
    assert result.stdout.splitlines()[-1:] == ["[1, 2]"], result.stderr
