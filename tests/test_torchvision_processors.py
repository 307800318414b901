"""The rows of `test_family_processors.py` whose parts need torchvision, in a process that has it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import ROWS, SHIPPED, is_at_least
from tiny_processors import PROCESSORS, SINCE


HERE = Path(__file__).parent
NEED_IT = [
    name
    for name, (_, _, needs) in PROCESSORS.items()
    if "torchvision" in needs and ROWS[name].is_installed and is_at_least(SINCE.get(name, SHIPPED))
]


@pytest.mark.contract
@pytest.mark.timeout(900)
def test_processors_that_need_torchvision(torchvision_folder):
    chosen = f"images_and_videos or {' or '.join(NEED_IT)}"
    paths = [str(HERE.parent), str(HERE), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "with_torchvision", "-k", chosen]
        + [str(HERE / "test_family_processors.py")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TORCHVISION_FOLDER": str(torchvision_folder),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    [count] = re.findall(r"(\d+) passed", done.stdout)
    assert int(count) >= len(NEED_IT) and "skipped" not in done.stdout
