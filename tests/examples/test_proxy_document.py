"""The code in docs/proxy-protocol.md works."""

from __future__ import annotations

import ast
import re
import socket
import struct
from collections.abc import Coroutine
from pathlib import Path
from types import CodeType
from typing import Any

from trio_udp.testing import SimulatedNetwork

PAGE = Path(__file__).parents[2] / "docs" / "proxy-protocol.md"


async def test_the_program_for_tests() -> None:
    """The last program of the page runs, and its assertion holds."""
    program = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1]
    code = compile(program, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(code, CodeType)
    names: dict[str, Any] = {"SimulatedNetwork": SimulatedNetwork, "socket": socket, "struct": struct}
    running: Coroutine[Any, Any, None] = eval(code, names)
    await running
    assert names["datagram"].payload == b"query"
