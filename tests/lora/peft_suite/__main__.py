import os
import sys
from pathlib import Path

import pytest

here = Path(__file__).parent
sys.path.insert(0, str(here.parents[2]))
sys.path.append(str(here.parent))  # last: it has a folder peft too
tests = os.environ.get("PEFT_TESTS")
if not tests:
    sys.exit('PEFT_TESTS is not set: give the folder "tests" of a checkout of PEFT.')
tests = Path(tests).resolve()
files = [f"{tests}/test_custom_models.py", f"{tests}/test_initialization.py"]
options = ["-c", os.devnull, "--rootdir", str(tests), "-p", "peft_suite.plugin", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, *files, *sys.argv[1:]]))
