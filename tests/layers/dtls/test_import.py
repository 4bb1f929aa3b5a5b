"""The extra ``dtls``: only programs that use trio_udp.dtls need OpenSSL."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import trio_udp
from trio_udp import dtls


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    return result.stdout + result.stderr


def test_openssl_is_imported_when_it_is_used() -> None:
    """Importing trio_udp does not import OpenSSL; the first use of trio_udp.dtls does."""
    program = (
        "import sys, trio_udp; print('OpenSSL' in sys.modules); trio_udp.dtls.secure; print('OpenSSL' in sys.modules)"
    )
    assert run(program).split() == ["False", "True"]


@pytest.mark.parametrize("missing", ["OpenSSL", "service_identity"])
@pytest.mark.parametrize("use", ["trio_udp.dtls", "from trio_udp import dtls", "import trio_udp.dtls"])
def test_without_the_extra(missing: str, use: str) -> None:
    """Without the extra, the first use says what to install, and the rest of trio_udp works."""
    output = run(
        f"import sys; sys.modules['{missing}'] = None; import trio_udp; print(trio_udp.Limits().max_clients); {use}"
    )
    assert output.startswith("10000\n")
    last_line = "ImportError: trio_udp.dtls needs pyOpenSSL and service-identity: pip install 'trio-udp[dtls]'\n"
    assert output.endswith(last_line)


def test_other_names_are_unknown() -> None:
    """Any other unknown name of the package raises AttributeError as usual."""
    with pytest.raises(AttributeError, match="module 'trio_udp' has no attribute 'dtlz'"):
        trio_udp.dtlz  # type: ignore[attr-defined]  # noqa: B018


def test_public_names() -> None:
    """Every public name has ``trio_udp.dtls`` as its module, and is documented with all its members."""
    for name in dtls.__all__:
        thing = getattr(dtls, name)
        assert thing.__module__ == "trio_udp.dtls"
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for attribute, member in inspect.getmembers(thing):
                if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert inspect.getdoc(member), f"{name}.{attribute}"
