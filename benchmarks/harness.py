"""Times candidates side by side: interleaved, as ratios to a reference, with the noise floor beside them.

A shared machine drifts, and whoever is timed last pays for it. So every round runs a block of each candidate in a
shuffled order, and compares it with the reference *of the same round*. The reference enters twice: "A against A" is
the noise floor, and a difference inside it is no difference. Seconds are those of the processor that this process
used (on one thread, what others do on the machine is then not charged), on a GPU those of the clock.
"""

import argparse
import gc
import json
import os
import platform
import random
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from dlgm_tutorial import __version__

AGAIN = "the reference again"
RESULTS = Path(__file__).parent / "results"


def clock():
    """Seconds: processor time of this process without a GPU, else wall time after the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def compare(candidates, *, reference, rounds=21, block=1, seed=0, work=None):
    """Time the candidates and return {name: {ratio, low, high, ratios, seconds}}; ratio 1 is the reference.

    candidates: {name: function without arguments, one unit of work}; block: calls in a row, whose median counts.
    work: {name: amount}, to compare seconds per amount where the slow are given less to do (default 1 each).
    ratio: median over the rounds, low and high its quartiles.
    """
    amount = {name: (work or {}).get(name, 1) for name in candidates}
    candidates, amount[AGAIN] = {**candidates, AGAIN: candidates[reference]}, amount[reference]
    seconds = {name: [] for name in candidates}
    shuffle = random.Random(seed).sample
    for function in candidates.values():  # warm up
        function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in shuffle(list(candidates), len(candidates)):
                units = []
                for _ in range(block):
                    start = clock()
                    candidates[name]()
                    units.append(clock() - start)
                seconds[name].append(float(np.median(units)) / amount[name])
    finally:
        gc.enable()
    report = {}
    for name, values in seconds.items():
        ratios = np.array(values) / np.array(seconds[reference])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        report[name] = {"ratio": middle, "low": low, "high": high, "seconds": float(np.median(values)),
                        "ratios": ratios.tolist()}
    return report


def write(name, title, aim, reports, **facts):
    """Write benchmarks/results/NAME.json and print its table. reports: {unit: what `compare` returned}."""
    contents = {"name": name, "title": title, "aim": aim, **facts, "reports": reports, "machine": {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": [round(x, 2) for x in os.getloadavg()]},
        "versions": {"dlgm_tutorial": __version__, "python": platform.python_version(),
                     "torch": str(torch.__version__), "numpy": np.__version__},
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(contents, indent=1) + "\n")
    part.replace(RESULTS / f"{name}.json")
    print(f"{title} (aim: {aim})")
    for unit, report in reports.items():
        for candidate, row in report.items():
            print(f"  {unit:24} {candidate:44} {row['ratio']:7.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                  f" {row['seconds']:.3g} s")


def processor():
    """Name of the processor, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def arguments(rounds):
    """The options of a benchmark's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of interleaved blocks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return options
