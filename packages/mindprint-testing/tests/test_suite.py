"""Tests of the suite: it passes a sound backend, catches every seeded defect, and cannot be departed from quietly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from defects import DEFECTS, EXAMPLE, Defect, caught, failures

from mindprint.contract import CAPABILITIES
from mindprint_testing import BackendConformance
from mindprint_testing.claims import NEEDS
from mindprint_testing.override import conformance_tests

SUBCLASS = f"""
import sys

import pytest
sys.path[:0] = [{str(EXAMPLE.parent)!r}, "site"]
from mindprint_hello.model_folder import write_model
from mindprint_testing import BackendConformance, departs

class TestHello(BackendConformance):
    backend_name = "hello-here"
    @pytest.fixture
    def model_folder(self, tmp_path):
        return write_model(tmp_path / "hello", hidden=32)
"""


def run(folder: Path, body: str, *options: str) -> str:
    """Return pytest's output for a test class with `body`. The sound backend is installed as `hello-here`."""
    metadata = folder / "site" / "hello_here-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hello-here\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[mindprint.backends]\nhello-here = mindprint_hello.plugin\n")
    (folder / "test_it.py").write_text(SUBCLASS + body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *options]
    done = subprocess.run([*command, "test_it.py"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_every_seeded_defect_is_caught_by_the_test_that_should(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how many; `python packages/mindprint-testing/tests/defects.py` says which, and by which test."""
    assert len(DEFECTS) >= 20
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    results = caught(DEFECTS, failures(DEFECTS))
    with capsys.disabled():
        print(f"\nseeded defects caught: {sum(results.values())} of {len(results)}")
    assert [name for name, seen in results.items() if not seen] == []


def test_a_sound_backend_passes_every_test() -> None:
    (failed,) = failures([Defect("none", "", ())], everything=True)
    assert failed == set()


def test_every_test_says_what_its_failure_means() -> None:
    for name, test in conformance_tests(BackendConformance).items():
        assert name == "test_capability" or "If it fails" in (test.__doc__ or ""), name


def test_a_failure_shows_its_meaning(tmp_path: Path) -> None:
    """The class claims nothing, the backend offers sampling."""
    output = run(tmp_path, "", "-k", "capabilities_are")
    assert "meaning of this failure" in output
    assert "a capability is offered untested" in output


def test_a_capability_that_is_not_claimed_is_listed_with_its_needs(tmp_path: Path) -> None:
    output = run(tmp_path, "", "-rs", "-k", "test_capability")
    listed = dict(re.findall(r"not claimed: (\w+) \(needs (.+)\)$", output, re.MULTILINE))
    assert listed == NEEDS
    assert set(NEEDS) == CAPABILITIES


def test_the_needs_of_a_capability_are_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name, needs in NEEDS.items() if f"| `{name}` | {needs} |" not in page] == []


def test_experts_are_tested_where_they_are_claimed(tmp_path: Path) -> None:
    """The backend of this test computes no Mixtral, so that none of their tests passes."""
    output = run(tmp_path, "    capabilities = frozenset({'sampling', 'experts'})\n", "-k", "of_stacks or are_listed")
    assert "2 failed" in output or "2 errors" in output


@pytest.mark.parametrize(
    "body",
    [
        "    def test_adamw_is_torchs(self): pass\n",
        "    test_adamw_is_torchs = None\n",
        "    @departs(because=' ')\n    def test_adamw_is_torchs(self): pass\n",
    ],
    ids=["replaced", "removed", "empty reason"],
)
def test_an_override_without_a_reason_fails(tmp_path: Path, body: str) -> None:
    output = run(tmp_path, body, "-k", "adamw")
    assert "1 failed" in output
    assert "test_adamw_is_torchs is part of the conformance suite and was overridden without a stated reason" in output


def test_an_override_with_a_reason_is_accepted(tmp_path: Path) -> None:
    body = "    @departs(because='it has SGD')\n    def test_adamw_is_torchs(self): pass\n"
    assert "1 passed" in run(tmp_path, body, "-k", "adamw")
