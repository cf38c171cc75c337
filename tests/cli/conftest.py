"""What the tests of the command line share: calling it, and one short demo."""

import json

import pytest
from typer.testing import CliRunner

from optiscope.cli import app


@pytest.fixture(scope="session")
def diag():
    """Runs the command line; any exception but the one that ends a command fails the test."""

    def diag(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return diag


@pytest.fixture(scope="session")
def strict_json():
    """Reads JSON as other languages do: NaN and Infinity are none."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return lambda text: json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="session")
def demo(diag, tmp_path_factory):
    """The short demo, run once: its folder, and the result of the command."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, diag("demo", "--short", "-o", folder / "demo.zarr", "--json")
