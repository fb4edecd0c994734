"""The doctor on this machine, with its real libraries."""

from __future__ import annotations

import json

import torch
from click.testing import CliRunner

from fastlora.cli.main import cli


def test_nothing_is_wrong_where_the_tests_run() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert [check for check in checks.values() if check["status"] == "wrong"] == []
    assert done.exit_code == 0
    assert torch.__version__ in checks["torch"]["found"]
    where = "on the GPU" if torch.cuda.is_available() else "in Triton's interpreter, on the CPU"
    assert where in checks["kernels"]["found"]
    assert all(check["remedy"] for check in checks.values() if check["status"] != "ok")
