"""The code in docs/multicast.md works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ..conftest import free_port

GUIDE = (Path(__file__).parents[2] / "docs" / "multicast.md").read_text()
CODE = "\n\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))

# Tests for code that the guide shows without a test.
MORE = """
async def test_answering_all(nursery):
    (member,) = await trio_udp.open_endpoints(0, host="0.0.0.0")
    (asking,) = await trio_udp.open_endpoints(0, host="0.0.0.0")
    async with member, asking:
        member.join_group("239.192.77.77", interface="lo")
        asking.multicast_interface = "lo"
        await asking.send_to(b"?", ("239.192.77.77", member.local_address[1]))
        question = await member.receive()
        answer_all(question, b"!")
        assert (await member.receive()).payload == b"!"

async def test_waking():
    await wake(bytes(6), "127.0.0.1")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs an interface lo")
def test_the_code_runs(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in the guide passes, pasted into one file, and so do the functions beside them."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    code = (CODE + MORE).replace("7777", str(free_port()))
    pytester.makepyfile(code)
    result = pytester.runpytest_subprocess(timeout=60)
    result.assert_outcomes(passed=code.count("def test_"))
