"""Importing the package costs nothing that is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import expertsteer

_HEAVY = "assert not {'torch', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)"


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_is_light():
    python(f"import sys, expertsteer; dir(expertsteer); {_HEAVY}")


@pytest.mark.parametrize("command", [(), ("fit",)])
def test_asking_for_help_is_light(command):
    shown = python(
        "import sys\n"
        "from expertsteer.cli.app import main\n"
        f"sys.argv = ['expertsteer', *{command!r}, '--help']\n"
        "try:\n    main()\n"
        f"except SystemExit as stop:\n    assert stop.code == 0\n    {_HEAVY}\n"
    )
    assert "expertsteer" in shown


def test_every_public_name_resolves():
    assert dir(expertsteer) == expertsteer.__all__
    for name in expertsteer.__all__:
        assert getattr(expertsteer, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        expertsteer.nonsense  # noqa: B018
