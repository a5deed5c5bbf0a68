"""Runs inside the sandbox: executes one submission, then answers calls to its functions.

Requests come in on stdin and replies go out on the original stdout, one JSON object a line. The
grader trusts nothing that is said here: a submission that tampers with this process can only change
the values its own functions return. No test, reference value or solution is ever sent here.
"""

import base64
import json
import os
import resource
import signal

import numpy as np


def encode(value):
    """Return a number, string, array or nested container as JSON; anything else is a TypeError."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": [value.dtype.str, list(np.shape(value)), data]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [encode(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v) for k, v in value.items()}}
    raise TypeError(f"a {type(value).__name__} came back; numbers and arrays are expected")


def decode(value, functions=False):
    """Return what was encoded. Only the worker, never the grader, turns source into functions."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "array":
        dtype, shape, data = content
        if np.dtype(dtype).kind not in "biufc":
            raise ValueError(f"an array of dtype {dtype} came back")
        array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
        return array if shape else array[()]
    if kind == "function" and functions:
        return eval(content, {"np": np})
    if kind == "dict":
        return {k: decode(v, functions) for k, v in content.items()}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](decode(v, functions) for v in content)
    raise ValueError(f"unknown kind {kind!r}")


def limit(memory_gib, processes, file_mib):
    """Bound what this process and its children may take; None leaves a bound as it is."""
    for what, most in [(resource.RLIMIT_AS, int(memory_gib * 2**30)), (resource.RLIMIT_NPROC, processes),
                       (resource.RLIMIT_FSIZE, file_mib * 2**20), (resource.RLIMIT_CORE, 0)]:
        if most is not None:
            resource.setrlimit(what, (most, most))


def stop_cell(*_):
    raise TimeoutError("the cell ran too long and was stopped")


def run_cells(shell, cells, seconds):
    """Execute the cells, at most `seconds` each; return the errors, and the numbers of the cells that were stopped."""
    errors, hung = [], []
    for number, source in enumerate(cells, 1):
        signal.alarm(seconds)
        try:
            result = shell.run_cell(source, silent=True)
            error = result.error_before_exec or result.error_in_exec
        except BaseException as caught:
            error = caught
        signal.alarm(0)
        if isinstance(error, TimeoutError):
            hung.append(number)
        if error is not None:
            errors.append(f"code cell {number}: {type(error).__name__}: {error}"[:300])
    return {"errors": errors, "hung": hung}


def call(shell, name, args, kwargs):
    """Call the author's function of this name with decoded arguments; return its value, or its error, encoded."""
    try:
        if name not in shell.user_ns:
            raise NameError(f"{name} is not defined")
        return {"value": encode(shell.user_ns[name](*decode(args, True), **decode(kwargs, True)))}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main():
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the notebook prints goes nowhere

    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance(history_load_length=0)
    shell.history_manager.enabled = False
    signal.signal(signal.SIGALRM, stop_cell)

    for line in requests:
        request = json.loads(line)
        if "cells" in request:
            limit(**request["limits"])
            answer = run_cells(shell, request["cells"], request["cell_seconds"])
        else:
            answer = call(shell, **request)
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
