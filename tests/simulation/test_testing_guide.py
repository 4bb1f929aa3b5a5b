"""The code in docs/testing.md works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
CODE = "\n\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))


# Finding a fault is enough. Shrinking it to the mildest network conditions takes Hypothesis a minute.
QUICK = """
from hypothesis import Phase, settings
settings.register_profile("quick", phases=[Phase.generate])
settings.load_profile("quick")
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project that is set up as the guide says."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    return pytester


def test_the_code_runs(project: pytest.Pytester) -> None:
    """Every test in the guide passes, pasted into one file."""
    project.makepyfile(CODE)
    result = project.runpytest_subprocess(timeout=120)
    result.assert_outcomes(passed=CODE.count("def test_"))


def test_the_fault_is_found(project: pytest.Pytester) -> None:
    """With a shorter idle timeout, the test of the protocol fails, and shows the partition."""
    assert CODE.count("idle_timeout=300") == 1
    project.makeconftest(QUICK)
    project.makepyfile(CODE.replace("idle_timeout=300", "idle_timeout=60"))
    result = project.runpytest_subprocess("-k", "added_once", timeout=120)
    result.assert_outcomes(failed=1, deselected=CODE.count("def test_") - 1)
    assert "TooSlowError" in result.stdout.str()
    assert " cut off " in result.stdout.str()
