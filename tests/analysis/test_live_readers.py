"""Reads of a run that is being written show whole commits."""

import json
import subprocess
import sys
from pathlib import Path


def test_no_read_of_a_live_run_shows_half_a_record():
    """300 of the reads that `live_reading.py` makes 100,000 of."""
    command = [sys.executable, Path(__file__).with_name("live_reading.py"), "--reads", "300", "--plain-every", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout)
    assert counted["open_run"] + counted["xarray"] == 300
    # It grew between reads, else nothing was tried.
    assert counted["states"] > 30
