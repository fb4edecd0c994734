"""`fastlora bench` whose arms alone are measured: `python bench_known.py bench ARGUMENTS`.

The workers that it starts come through here too. What comes before the arms, the machine's probe and the
reference, costs 6 s of imports each, and does not matter to who stops the benchmark in an arm.
"""

from __future__ import annotations

import json
import sys
from functools import partial

if __name__ == "__main__":
    if sys.argv[1] in ("probe", "reference"):
        print(json.dumps({"status": "ok", "machine": {}, "driver": None, "ceilings": {}}))
    elif sys.argv[1] == "bench":
        from fastlora.bench import run
        from fastlora.cli.main import main

        run.Bench = partial(run.Bench, command=(sys.executable, __file__))  # type: ignore[assignment,misc]
        main()
    else:
        from fastlora.bench.worker import main as work

        sys.exit(work())
