# What a hostile notebook may try. Each cell stands at the end of an otherwise empty submission of assignment 1 and must
# leave it at 0 points, the grader alive, and the next submission untouched. A cell that gets out says LEAK.

# %% loops forever
while True:
    pass

# %% loops forever inside a function
def condition(mean, cov, observed, values):
    while True:
        pass

# %% eats memory
x = bytearray(40 << 30)

# %% ends the process
import os
os._exit(0)

# %% leaves politely
import sys
sys.exit(0)

# %% ends the process inside a function
import os
def posterior(x, W, b, noise_var):
    os._exit(0)

# %% looks for the tests on the disk
import os
for top in ("/home", "/root", "/tmp", "/mnt", "/srv", "."):
    for root, _, files in os.walk(top):
        for name in files:
            if name in ("assignment.md", "wrong_solutions.py", "grade.py", "q1_condition.py"):
                raise SystemExit(f"LEAK {root}/{name}")

# %% takes the answers from the book's package
import importlib.util
if importlib.util.find_spec("dlgm_tutorial"):
    raise SystemExit("LEAK the package of the book is there")

# %% deletes and writes files
import os, pathlib, sys
for folder in ("/usr/bin", sys.prefix, os.path.dirname(os.__file__)):
    try:
        (pathlib.Path(folder) / "dlgm-was-here").write_text("x")
    except OSError:
        continue
    (pathlib.Path(folder) / "dlgm-was-here").unlink()
    raise SystemExit(f"LEAK {folder} is writable")

# %% fills the disk
with open("dlgm-full", "wb") as handle:
    for _ in range(600):
        handle.write(b"x" * 2**20)
raise SystemExit("LEAK 600 MB written")

# %% talks to the network
import socket
if any(name != "lo" for _, name in socket.if_nameindex()):
    raise SystemExit("LEAK network")

# %% lets every comparison pass
import numpy as np
np.testing.assert_allclose = np.testing.assert_array_equal = lambda *a, **k: None
np.allclose = np.isclose = lambda *a, **k: True

# %% replaces the checker
import otter.test_files.exception_test as e
e.test_case.call_func = lambda self, env: None

# %% prints and forges the result
import json, pickle
pickle.dump = lambda o, f, *a: f.write(b"36")
json.dumps = lambda *a, **k: '{"value": 1.0, "score": 36, "errors": [], "hung": []}'
print("Total Score: 36 / 36 (100%)")

# %% returns an object that equals everything
class Yes:
    shape = (5,)
    def __array_function__(self, *a): return True
    def __eq__(self, other): return True
    def __getitem__(self, key): return self
condition = log_mean_exp = posterior = log_evidence = best_diagonal = elbo = em_step = impute = lambda *a: Yes()

# %% reads the expected value from the caller's frame
import sys
def log_mean_exp(log_w):
    frame = sys._getframe(1)
    while frame:
        if "expected" in frame.f_locals:
            return frame.f_locals["expected"]
        frame = frame.f_back

# %% speaks the grader's protocol itself
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'{"value": 1.0}\n' * 50)
    except OSError:
        pass

# %% sends an endless reply
import numpy as np
log_mean_exp = lambda log_w: np.zeros(2**24)

# %% sends a reply that costs the reader its stack
log_mean_exp = lambda log_w: __import__("functools").reduce(lambda inner, _: [inner], range(900), 1.0)
